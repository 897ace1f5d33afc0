"""Sums whose last digit counts, answered with a step in between or at once.

python docs/en/examples/sft_then_rl/data.py FOLDER      writes train.jsonl, eval.jsonl and sft.jsonl
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from tiny_data import hold_out, write


def question(a: int, b: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is the last digit of {a} plus {b}?"}]


def main(folder: Path, *, num_eval: int = 5, num_sft: int = 8192, seed: int = 0) -> None:
    """Sums of two numbers from 5 to 9, few enough for a tiny model to learn.

    Two of three conversations take a step and are right; the others answer at once and are right in two of five cases.

    A conversation's loss is a mean over its tokens, so the first token of a longer one counts less.
    """
    generator = random.Random(seed)
    known, held_out = hold_out([(a, b) for a in range(5, 10) for b in range(5, 10)], num_eval, generator)
    sft = []
    for number in range(num_sft):
        a, b = generator.choice(known)
        guess = (a + b) % 10 if generator.random() < 1 / 3 else generator.randrange(10)
        answer = f"{a} + {b} = {a + b} \\boxed{{{(a + b) % 10}}}" if number % 3 else f"\\boxed{{{guess}}}"
        sft.append({"messages": [*question(a, b), {"role": "assistant", "content": answer}]})

    def prompts(pairs: list[tuple[int, int]]) -> list[dict]:
        return [{"prompt": question(a, b), "label": str((a + b) % 10)} for a, b in pairs]

    write(folder, train=prompts(known * 20), eval=prompts(held_out), sft=sft)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
