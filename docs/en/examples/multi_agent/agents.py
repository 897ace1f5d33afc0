"""Two who solve and one who chooses: one prompt, three answers, one reward for how it ended.

python docs/en/examples/multi_agent/agents.py FOLDER      writes train.jsonl, eval.jsonl and sft.jsonl
"""

from __future__ import annotations

import asyncio
import random
import re
import sys
from pathlib import Path

from tiny_data import hold_out, write

from slime.rollout.agents.loop import run_agent
from slime.rollout.agents.session import Session

BOXED = re.compile(r"\\boxed\{(\d+)\}")


async def generate(args, sample, sampling_params):
    async def team(session: Session) -> float:
        problem = sample.metadata["problem"]
        solvers = await asyncio.gather(*(session.ask(solve(problem)) for _ in range(2)))
        proposed = [boxed(turn.answer["content"]) for turn in solvers]
        chosen = await session.ask(choose(problem, *proposed))
        return float(boxed(chosen.answer["content"]) == sample.label)

    return await run_agent(args, sample, sampling_params, team)


def boxed(text: str) -> str:
    found = BOXED.findall(text)
    return found[-1] if found else "?"


def solve(problem: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {problem}?"}]


def choose(problem: str, one: str, other: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {problem}? {one} or {other}?"}]


# ------------------------------------------------------------------------------------------------------------- the data


def main(folder: Path, *, num_eval: int = 4, num_sft: int = 8192, seed: int = 0) -> None:
    """Sums of digits up to 3. Solvers of the warm start are right in half of the cases; who chooses takes the first or the
    second."""
    generator = random.Random(seed)
    known, held_out = hold_out([(a, b) for a in range(4) for b in range(4)], num_eval, generator)

    def answered(asked: list[dict[str, str]], digit: int | str) -> dict:
        return {"messages": [*asked, {"role": "assistant", "content": f"\\boxed{{{digit}}}"}]}

    sft = []
    for number in range(num_sft):
        a, b = generator.choice(known)
        problem = f"{a} plus {b}"
        guesses = [a + b if generator.random() < 0.5 else generator.randrange(7) for _ in range(2)]
        asked = choose(problem, *map(str, guesses)) if number % 2 else solve(problem)
        sft.append(answered(asked, generator.choice(guesses)))

    def prompts(pairs: list[tuple[int, int]]) -> list[dict]:
        problems = [(f"{a} plus {b}", str(a + b)) for a, b in pairs]
        return [{"prompt": solve(text), "label": total, "metadata": {"problem": text}} for text, total in problems]

    write(folder, train=prompts(known * 40), eval=prompts(held_out), sft=sft)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
