"""The import path that users' graders know: `from slime.rollout.rm_hub.math_dapo_utils import compute_score`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slime.rollout.grading.response import last_boxed
from slime.rollout.rm_hub.by_name import graded

__all__ = ["compute_score"]

_STRICT_LOOK_BACK = 100


def compute_score(
    solution_str: str, ground_truth: Any, strict_box_verify: bool = False, pause_tokens_index: Sequence[int] | None = None
) -> dict[str, Any]:
    """{"score": 1.0 or -1.0, "acc": bool, "pred": text} of `--rm-type dapo`.

    strict_box_verify: the last box of the last 100 characters (or from 100 before the last of `pause_tokens_index` on) must be
    the label letter by letter; pred is then None without a box.
    """
    if not strict_box_verify:
        return graded("dapo", solution_str, ground_truth)
    start = -_STRICT_LOOK_BACK if pause_tokens_index is None else max(0, pause_tokens_index[-1] - _STRICT_LOOK_BACK)
    pred = last_boxed(solution_str[start:])
    return {"score": 1.0 if pred == ground_truth else -1.0, "acc": pred == ground_truth, "pred": pred}
