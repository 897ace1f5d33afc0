"""The import path that users' graders know: compute_ifbench_reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slime.rollout.rm_hub.by_name import graded

__all__ = ["compute_ifbench_reward"]


def compute_ifbench_reward(response: str, label: Any, metadata: Mapping[str, Any] | None = None) -> float:
    """0.0 or 1.0, as `--rm-type ifbench` says; the instructions are in the metadata."""
    return float(graded("ifbench", response, label, metadata))
