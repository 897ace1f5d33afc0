#!/usr/bin/env python3
"""Write arithmetic prompts in the format of dapo-math-17k: train, evaluation and a warm-start set.

    python tools/make_arithmetic_data.py --output DIR --train 4096 --eval 64 --sft 8192 --task add --max-operand 5 --seed 0

writes DIR/train.jsonl and DIR/eval.jsonl (`prompt`: chat messages, `label`: the answer as text) and DIR/sft.jsonl (`messages`
with the answer in the form that the grader of `--rm-type math` wants). A prompt of the evaluation set occurs in no other file:
its operands do, in another wording or the other order. The same arguments give the same bytes on every machine.

How hard it is: the number of different problems grows with --max-operand squared; `add` is learned first, `add-mod` (only the
last digit counts) and `mul` later. A warm start that leaves something to learn: --label-noise makes a share of the SFT answers
wrong, --plain-share gives a share of them without the box that the grader reads.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

WORDINGS = (
    "What is the sum of {a} {op} {b}? Answer in \\boxed{{}}",
    "Compute {a} {op} {b}. Give only the final answer in \\boxed{{}}",
    "Question: what number is {a} {op} {b}? Put it inside \\boxed{{}}",
    "Solve {a} {op} {b} and put the answer in \\boxed{{}}",
)


@dataclass(frozen=True)
class Task:
    word: str
    answer: Callable[[int, int], int]
    suffix: str = ""


TASKS = {
    "add": Task("plus", lambda a, b: a + b),
    "add-mod": Task("plus", lambda a, b: (a + b) % 10, " mod 10"),
    "sub": Task("minus", lambda a, b: a - b),
    "mul": Task("times", lambda a, b: a * b),
}


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    statement: str = ""
    """What is asked, without its wording: 4 plus 5."""


def all_problems(
    task_name: str, *, min_operand: int, max_operand: int, num_wordings: int, second: list[int] | None = None
) -> list[Problem]:
    """Every wording of every ordered pair of operands; `second` names the second ones where they are fewer."""
    task = TASKS[task_name]
    operands = range(min_operand, max_operand + 1)
    problems = []
    for wording in WORDINGS[:num_wordings]:
        for a in operands:
            for b in operands if second is None else second:
                question = wording.format(a=a, op=task.word, b=f"{b}{task.suffix}")
                if task_name != "add":
                    question = question.replace("the sum of ", "")
                problems.append(Problem(question, str(task.answer(a, b)), f"{a} {task.word} {b}{task.suffix}"))
    return problems


def split(problems: list[Problem], *, num_eval: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(train, eval): disjoint, and every operand pair of eval is in train when there is more than one wording or order."""
    if not 0 <= num_eval <= len(problems) // 2:
        raise ValueError(
            f"--eval {num_eval} of {len(problems)} different prompts: at most half can be held out; raise --max-operand"
        )
    shuffled = list(problems)
    random.Random(f"split/{seed}").shuffle(shuffled)
    return shuffled[num_eval:], shuffled[:num_eval]


def draw(problems: list[Problem], count: int, *, seed: str) -> list[Problem]:
    """`count` problems, every one as often as every other (give or take one), in a shuffled order per pass."""
    generator, drawn = random.Random(seed), []
    while len(drawn) < count:
        epoch = list(problems)
        generator.shuffle(epoch)
        drawn += epoch
    return drawn[:count]


def preamble(problems: list[Problem], count: int, *, seed: str) -> str:
    """`count` solved problems in plain words, to make a prompt as long as one likes."""
    generator = random.Random(seed)
    return (
        "".join(f"{p.question.split(' Answer')[0]} {p.answer}. " for p in generator.choices(problems, k=count)) if count else ""
    )


def prompt_row(problem: Problem, *, task: str, index: int, part: str, before: str = "") -> dict[str, object]:
    return {
        "data_source": f"arithmetic/{task}",
        "prompt": [{"role": "user", "content": before + problem.question}],
        "label": problem.answer,
        "ability": "MATH",
        "reward_model": {"ground_truth": problem.answer, "style": "rule"},
        "extra_info": {"index": f"{part}-{index}"},
    }


def sft_row(
    problem: Problem, *, answer: str, boxed: bool = True, restated: bool = False, before: str = ""
) -> dict[str, object]:
    said = f"\\boxed{{{answer}}}" if boxed else answer
    return {
        "messages": [
            {"role": "user", "content": before + problem.question},
            {"role": "assistant", "content": f"{problem.statement} = {said}" if restated else said},
        ],
        "label": problem.answer,
    }


def sft_rows(
    problems: list[Problem], texts: list[str], *, label_noise: float, plain_share: float, restated: bool = False, seed: int
) -> list[dict[str, object]]:
    """texts: what stands before each question. A share `label_noise` of the answers is another problem's, and a share
    `plain_share` is given without the box."""
    generator = random.Random(f"noise/{seed}")
    answers = sorted({problem.answer for problem in problems})
    rows = []
    for problem, before in zip(problems, texts, strict=True):
        noisy = generator.random() < label_noise
        answer = generator.choice(answers) if noisy else problem.answer
        boxed = generator.random() >= plain_share
        rows.append(sft_row(problem, answer=answer, boxed=boxed, restated=restated, before=before))
    return rows


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for train.jsonl, eval.jsonl and sft.jsonl")
    parser.add_argument("--task", choices=sorted(TASKS), default="add")
    parser.add_argument("--train", type=int, default=4096, help="rows; prompts repeat once all were used")
    parser.add_argument("--eval", type=int, default=32, help="rows, all different, none in train or sft")
    parser.add_argument("--sft", type=int, default=0, help="rows")
    parser.add_argument("--min-operand", type=int, default=0)
    parser.add_argument("--max-operand", type=int, default=5)
    parser.add_argument(
        "--second-operands", type=int, nargs="+", help="all that stand in second place (default: as many as in first place)"
    )
    parser.add_argument("--wordings", type=int, default=2, choices=range(1, len(WORDINGS) + 1))
    parser.add_argument(
        "--examples",
        type=int,
        default=0,
        help="solved problems before each question of train and eval, for long prompts; in sft any number up to that",
    )
    parser.add_argument("--label-noise", type=float, default=0.0, help="share of wrong answers in sft.jsonl, 0 to 1")
    parser.add_argument(
        "--plain-share", type=float, default=0.0, help="share of answers in sft.jsonl without \\boxed{}, 0 to 1"
    )
    parser.add_argument(
        "--restate", action="store_true", help="answers in sft.jsonl repeat the problem first (4 plus 5 = ...): longer ones"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    problems = all_problems(
        args.task,
        min_operand=args.min_operand,
        max_operand=args.max_operand,
        num_wordings=args.wordings,
        second=args.second_operands,
    )
    train, evaluation = split(problems, num_eval=args.eval, seed=args.seed)
    print(f"{args.task}: {len(problems)} different prompts, {len(evaluation)} of them held out")
    drawn = draw(train, args.train, seed=f"train/{args.seed}")
    for part, rows in (("train", drawn), ("eval", evaluation)):
        texts = [preamble(train, args.examples, seed=f"examples/{args.seed}/{part}/{i}") for i in range(len(rows))]
        made = [prompt_row(p, task=args.task, index=i, part=part, before=texts[i]) for i, p in enumerate(rows)]
        _write(args.output / f"{part}.jsonl", made)
    if args.sft:
        warm = draw(train, args.sft, seed=f"sft/{args.seed}")
        lengths = random.Random(f"lengths/{args.seed}")  # so that the model has seen every position that a prompt of train has
        counts = [lengths.randint(0, args.examples) for _ in warm]
        texts = [preamble(train, count, seed=f"examples/{args.seed}/sft/{i}") for i, count in enumerate(counts)]
        rows = sft_rows(
            warm, texts, label_noise=args.label_noise, plain_share=args.plain_share, restated=args.restate, seed=args.seed
        )
        _write(args.output / "sft.jsonl", rows)


if __name__ == "__main__":
    main()
