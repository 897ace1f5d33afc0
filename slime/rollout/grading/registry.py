"""Graders by name, as the workers call them.

A grader is a function of (response, label, metadata). It raises ValueError when it cannot grade: a label that is missing, a
question that names no right choice. It never answers 0 for that.
"""

from __future__ import annotations

from collections.abc import Callable

from slime.rollout.grading.dapo import grade_dapo
from slime.rollout.grading.deepscaler import grade_deepscaler
from slime.rollout.grading.f1 import token_f1
from slime.rollout.grading.gpqa import grade_gpqa
from slime.rollout.grading.math_grader import grade_math, last_boxed
from slime.rollout.grading.question import Question, Verdict


def _text(question: Question) -> str:
    if question.label is None:
        raise ValueError("the sample has no label to grade against; name its column with --label-key")
    return str(question.label)


GRADERS: dict[str, Callable[[Question], Verdict]] = {
    "math": lambda q: int(grade_math(q.response, _text(q))),
    "dapo": lambda q: grade_dapo(q.response, _text(q)),
    "deepscaler": lambda q: int(grade_deepscaler(q.response, _text(q))),
    "f1": lambda q: token_f1(q.response, _text(q)),
    "gpqa": lambda q: grade_gpqa(q.response, q.label, dict(q.metadata)),
}


def verdict(question: Question) -> Verdict:
    if question.boxed:
        content = last_boxed(question.response) or ""
        question = Question(question.grader, content, question.label, question.metadata)
    return GRADERS[question.grader](question)
