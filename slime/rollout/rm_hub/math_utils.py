"""The import path that users' graders know: `from slime.rollout.rm_hub.math_utils import grade_answer_verl`."""

from __future__ import annotations

from typing import Any

from slime.rollout.grading.response import last_boxed as extract_answer
from slime.rollout.rm_hub.by_name import graded

__all__ = [
    "extract_answer", "extract_boxed_answer", "grade_answer", "grade_answer_mathd", "grade_answer_sympy", "grade_answer_verl",
]  # fmt: skip

extract_boxed_answer = extract_answer


def grade_answer_verl(solution_str: str, ground_truth: Any) -> bool:
    """Whether the last box of a solution is the label, as `--rm-type math` says; without a label, no."""
    return bool(ground_truth) and bool(graded("math", solution_str, ground_truth))


def grade_answer(given_answer: str | None, ground_truth: Any) -> bool:
    """The same for an answer that was taken out of its box."""
    return given_answer is not None and grade_answer_verl(f"\\boxed{{{given_answer}}}", ground_truth)


# Two ways of comparing there, one here.
grade_answer_mathd = grade_answer_sympy = grade_answer
