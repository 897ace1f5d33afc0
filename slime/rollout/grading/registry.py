"""Graders by name, as the workers call them.

A grader is a function of (response, label, metadata). It raises ValueError when it cannot grade: a label that is missing, a
question that names no right choice. It never answers 0 for that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from slime.rollout.grading.choices import grade_gpqa
from slime.rollout.grading.dapo import grade_dapo
from slime.rollout.grading.deepscaler import grade_deepscaler
from slime.rollout.grading.f1 import token_f1
from slime.rollout.grading.ifbench import grade_ifbench
from slime.rollout.grading.mathematics import grade_math, same_answer
from slime.rollout.grading.question import Question, Verdict
from slime.rollout.grading.response import last_boxed, without_end_tokens


def _labels(question: Question) -> list[str]:
    """The answers that count as right: one, or those of a list."""
    if question.label is None:
        raise ValueError("the sample has no label to grade against; name its column with --label-key")
    return [str(label) for label in question.label] if isinstance(question.label, list) else [str(question.label)]


GRADERS: dict[str, Callable[[Question], Verdict]] = {
    "math": lambda q: int(any(grade_math(q.response, label) for label in _labels(q))),
    "dapo": lambda q: max((grade_dapo(q.response, label) for label in _labels(q)), key=lambda found: found["score"]),
    "deepscaler": lambda q: int(any(grade_deepscaler(q.response, label) for label in _labels(q))),
    "f1": lambda q: max(token_f1(q.response, label) for label in _labels(q)),
    "gpqa": lambda q: grade_gpqa(q.response, q.label, q.metadata),
    "ifbench": lambda q: grade_ifbench(q.response, q.metadata),
}


@lru_cache(maxsize=1)
def warm_up() -> None:
    """Import the libraries of algebra and fill what they keep after their first calls: tables of the grammar, late imports."""
    for answer, label in (
        (r"\frac{3}{2}x^2-\sqrt{3}y", "x"), (r"2\pi+\log_{2}8-\ln 3", r"\binom{5}{2}!"), ("x<3", r"(-\infty,3)"),
        ("2x+4y=8", "x+2y=4"), (r"\sin x+\cos^2 x", "e^{x}"), (r"[1,2)\cup(3,\infty)", "|x|"), (r"\pm\sqrt{2}", "1,2"),
    ):  # fmt: skip
        same_answer(answer, label)


def verdict(question: Question) -> Verdict:
    if question.boxed and question.grader != "math":  # which looks for the box itself
        content = last_boxed(without_end_tokens(question.response)) or ""
        question = Question(question.grader, content, question.label, question.metadata)
    return GRADERS[question.grader](question)
