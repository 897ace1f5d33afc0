"""The import path that users' graders know: compute_gpqa_reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slime.rollout.rm_hub.by_name import graded

__all__ = ["compute_gpqa_reward"]


def compute_gpqa_reward(response: str, label: Any, metadata: Mapping[str, Any] | None = None) -> float:
    """0.0 or 1.0, as `--rm-type gpqa` says."""
    return float(graded("gpqa", response, label, metadata))
