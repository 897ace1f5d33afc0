"""DeepScaleR's rule: the thought must have ended, and the boxed answer after it must be the label, up to algebra."""

from __future__ import annotations

from slime.rollout.grading.math_grader import grade_math


def grade_deepscaler(response: str, label: str) -> bool:
    """After the last </think>, or between the first and the second ###Response; without either: wrong. An empty label:
    wrong."""
    if not label.strip():
        return False
    if "</think>" in response:
        solution = response.split("</think>")[-1]
    elif "###Response" in response:
        solution = response.split("###Response")[1]
    else:
        return False
    return grade_math(solution, label, symbolic=True)
