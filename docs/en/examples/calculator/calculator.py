"""A policy that may compute with Python: the generate function, and the prompts and conversations that the example trains on.

python docs/en/examples/calculator/calculator.py FOLDER      writes train.jsonl, eval.jsonl and sft.jsonl
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from tiny_data import hold_out, write

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


def main(folder: Path, *, num_eval: int = 4, num_sft: int = 8192, seed: int = 0) -> None:
    """Most conversations use the tool; the others answer at once, and are right by chance alone.

    A conversation's loss is a mean over its tokens, so the first token of a long one counts little: with one guess to four
    calls the policy begins either way about as often.
    """
    generator = random.Random(seed)
    known, held_out = hold_out([(a, b) for a in range(4) for b in range(4)], num_eval, generator)
    sft = []
    for number in range(num_sft):
        a, b = generator.choice(known)
        guess = generator.choice(known)
        messages = with_the_tool(a, b) if number % 5 else from_memory(a, b, guess[0] * guess[1])
        sft.append({"messages": messages, "tools": [DEFINITION]})

    def prompts(pairs: list[tuple[int, int]]) -> list[dict]:
        return [{"prompt": [question(a, b)], "label": str(a * b)} for a, b in pairs]

    write(folder, train=prompts(known * 100), eval=prompts(held_out), sft=sft)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
