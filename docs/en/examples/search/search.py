"""A policy that may look things up: text in the answer asks, passages of a local index are written behind it.

python docs/en/examples/search/search.py FOLDER      writes corpus.jsonl, train.jsonl, eval.jsonl and sft.jsonl
"""

from __future__ import annotations

import random
import re
import sys
from functools import lru_cache
from pathlib import Path

from tiny_data import hold_out, write

from slime.rollout.agents.loop import environment_turn, model_turn
from slime.rollout.agents.retrieval import BM25
from slime.types.sample import Sample, Status

MAX_SEARCHES = 2
ASKED = re.compile(r"<search>(.*?)</search>\Z", re.S)


@lru_cache(maxsize=1)
def index(corpus: str) -> BM25:
    return BM25.of_file(corpus)


async def generate(args, sample: Sample, sampling_params) -> Sample:
    """Turns until one asks for nothing. `search_corpus` comes from the file of --custom-config-path."""
    for _ in range(MAX_SEARCHES):
        text = await model_turn(args, sample, sampling_params, stop=["</search>"])
        asked = ASKED.search(text)
        if asked is None or sample.status is not Status.COMPLETED:
            return sample
        environment_turn(args, sample, found(index(args.search_corpus), asked[1]))
    await model_turn(args, sample, sampling_params)
    return sample


def found(passages: BM25, query: str) -> str:
    best = passages.search(query, count=1)
    return f"<found>{best[0][0] if best else 'nothing'}</found>"


# ------------------------------------------------------------------------------------------------------------- the data


def question(box: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is in {box}? Answer in \\boxed{{}}"}]


def main(folder: Path, *, num_eval: int = 4, num_sft: int = 8192, seed: int = 0) -> None:
    """Twenty boxes, each with a digit. Most conversations look one up; the others guess.

    A conversation's loss is a mean over its tokens, so the first token of a long one counts little: with one guess to nine
    searches the policy begins either way about as often.
    """
    generator = random.Random(seed)
    boxes = list(range(10, 30))
    holds = {box: generator.randrange(10) for box in boxes}
    corpus = [f"In {box} is {digit}" for box, digit in holds.items()]
    passages = BM25(corpus)
    known, held_out = hold_out(boxes, num_eval, generator)
    sft = []
    for number in range(num_sft):
        box = generator.choice(known)
        guess = f"\\boxed{{{generator.randrange(10)}}}"
        looked_up = f"<search>{box}</search>{found(passages, str(box))}\\boxed{{{holds[box]}}}"
        answer = {"role": "assistant", "content": looked_up if number % 10 else guess}
        sft.append({"messages": [*question(box), answer]})

    def prompts(boxes: list[int]) -> list[dict]:
        return [{"prompt": question(box), "label": str(holds[box])} for box in boxes]

    write(folder, train=prompts(known * 20), eval=prompts(held_out), sft=sft, corpus=[{"text": text} for text in corpus])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
