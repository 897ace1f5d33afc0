"""Rewards made comparable within a prompt's group (numpy: the rollout side has no torch)."""

from __future__ import annotations

import numpy as np

GROUP_STD_EPS = 1e-6
"""Added to the standard deviation; slime's value."""


def normalize_by_group(rewards: np.ndarray, groups: np.ndarray, divide_by_std: bool) -> np.ndarray:
    """Centre the rewards of each prompt's samples, and scale them by the group's spread if asked.

    rewards [n], groups [n] int -> float32 [n]: (r - mean_g) / (std_g + 1e-6) with the unbiased standard deviation, computed in
    float64. A group is the set of equal group ids, whatever their number or order. A group of one has no spread: it is only
    centred, to 0. GRPO (arXiv 2402.03300, 4.1.2); without the division, Dr. GRPO (arXiv 2503.20783).
    """
    if rewards.shape != groups.shape or rewards.ndim != 1:
        raise ValueError(f"rewards {rewards.shape} and groups {groups.shape} must be two vectors of one length")
    if not np.isfinite(rewards).all():
        bad = np.flatnonzero(~np.isfinite(rewards))
        raise ValueError(
            f"rewards of rows {bad[:8].tolist()} are not finite: {rewards[bad[:8]].tolist()}; check the reward function"
        )
    values = rewards.astype(np.float64)
    _, member = np.unique(groups, return_inverse=True)
    count = np.bincount(member)
    centred = values - (np.bincount(member, weights=values) / count)[member]
    if divide_by_std:
        square = np.bincount(member, weights=centred**2)
        std = np.sqrt(square / np.maximum(count - 1, 1))
        centred = np.where((count > 1)[member], centred / (std[member] + GROUP_STD_EPS), centred)
    return centred.astype(np.float32)
