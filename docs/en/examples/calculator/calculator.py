"""A policy that may compute with Python: the generate function, and the prompts and conversations that the example trains on.

python docs/en/examples/calculator/calculator.py FOLDER      writes train.jsonl, eval.jsonl and sft.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from slime.rollout.agents.loop import Tool, tool_generate
from slime.rollout.agents.sandbox import Limits, PythonSandbox

# As short as it can be: the tiny model reads a token for each letter. Tool.of() writes one with descriptions.
DEFINITION = {"type": "function", "function": {"name": "py"}}

_sandbox = PythonSandbox(Limits(cpu_seconds=2, wall_seconds=20, output_bytes=200))


async def py(code: str) -> str:
    """The value of an expression, or why it has none: the last line of what Python says."""
    told = (await _sandbox.run(f"print({code})")).for_the_policy()
    return told.rpartition("\n")[2]


generate = tool_generate([Tool(py, DEFINITION)], max_turns=3)


# ------------------------------------------------------------------------------------------------------------- the data


def question(a: int, b: int) -> dict[str, str]:
    return {"role": "user", "content": f"What is {a} times {b}?"}


def with_the_tool(a: int, b: int) -> list[dict]:
    call = {"type": "function", "function": {"name": "py", "arguments": {"code": f"{a}*{b}"}}}
    return [
        question(a, b),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": str(a * b)},
        {"role": "assistant", "content": f"\\boxed{{{a * b}}}"},
    ]


def from_memory(a: int, b: int, guess: int) -> list[dict]:
    return [question(a, b), {"role": "assistant", "content": f"\\boxed{{{guess}}}"}]


def main(folder: Path, *, num_eval: int = 16, num_sft: int = 8192, seed: int = 0) -> None:
    """Of the conversations half use the tool; the others answer at once, and are right by chance alone."""
    generator = random.Random(seed)
    pairs = [(a, b) for a in range(10) for b in range(10)]
    generator.shuffle(pairs)
    held_out, known = pairs[:num_eval], pairs[num_eval:]
    sft = []
    for number in range(num_sft):
        a, b = generator.choice(known)
        guess = generator.choice(known)
        messages = with_the_tool(a, b) if number % 2 else from_memory(a, b, guess[0] * guess[1])
        sft.append({"messages": messages, "tools": [DEFINITION]})
    folder.mkdir(parents=True, exist_ok=True)
    prompts = {name: [{"prompt": [question(a, b)], "label": str(a * b)} for a, b in rows]
               for name, rows in (("train", known * 20), ("eval", held_out))}  # fmt: skip
    for name, rows in (*prompts.items(), ("sft", sft)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
