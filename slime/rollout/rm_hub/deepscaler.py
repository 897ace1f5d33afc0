"""The import path that users' graders know: get_deepscaler_rule_based_reward."""

from __future__ import annotations

from typing import Any

from slime.rollout.rm_hub.by_name import graded

__all__ = ["get_deepscaler_rule_based_reward"]


def get_deepscaler_rule_based_reward(response: str, label: Any) -> int:
    """0 or 1, as `--rm-type deepscaler` says."""
    return int(graded("deepscaler", response, label))
