"""DeepScaleR's rule: the thought must have ended, and the boxed answer after it must be the label."""

from __future__ import annotations

from slime.rollout.grading.mathematics import grade_math
from slime.rollout.grading.response import answer_part


def grade_deepscaler(response: str, label: str) -> bool:
    """After the last </think>, or between the first and the second ###Response; without either: wrong. An empty label:
    wrong."""
    if not label.strip():
        return False
    if "</think>" in response:
        solution = answer_part(response)
    else:
        parts = response.split("###Response", 2)
        if len(parts) == 1:
            return False
        solution = parts[1]
    return grade_math(solution, label)
