"""A group whose rewards are all equal has no advantage and would train nothing (DAPO, arXiv 2503.14476, 3.2)."""

from __future__ import annotations

from typing import Any

import numpy as np

from slime.rollout.base_types import Group, flatten
from slime.rollout.filter_hub.base_types import DynamicFilterOutput

_SMALLEST_STD = 1e-6


def check_reward_nonzero_std(args: Any, group: Group, **kwargs: Any) -> DynamicFilterOutput:
    """Drop a group with equal rewards; the reason carries the reward, e.g. `zero_std_1.0`."""
    rewards = np.array([sample.get_reward_value(args) for sample in flatten(group)], dtype=np.float64)
    if rewards.std() > _SMALLEST_STD:
        return DynamicFilterOutput(keep=True)
    return DynamicFilterOutput(keep=False, reason=f"zero_std_{round(float(rewards[0]), 1)}")


def check_reward_nonzero_std_with_fallback(args: Any, group: Group, **kwargs: Any) -> DynamicFilterOutput:
    """The same, but such a group is taken when there would otherwise be too few."""
    output = check_reward_nonzero_std(args, group)
    return DynamicFilterOutput(output.keep, output.reason, keep_when_insufficient=not output.keep)
