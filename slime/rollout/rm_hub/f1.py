"""The import path that users' graders know: f1_score."""

from __future__ import annotations

from collections import Counter

from slime.rollout.grading.f1 import token_f1, words

__all__ = ["f1_score"]


def f1_score(prediction: str, ground_truth: str) -> tuple[float, float, float]:
    """(F1 as `--rm-type f1` says, precision, recall) over the words of both; all 0 where they share none."""
    score = token_f1(prediction, ground_truth)
    given, wanted = words(prediction), words(ground_truth)
    common = (Counter(given) & Counter(wanted)).total() if score else 0
    return score, common / max(1, len(given)), common / max(1, len(wanted))
