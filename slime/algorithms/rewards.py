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


def leave_one_out(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """RLOO: each reward minus the mean of its group's other rewards (arXiv 2402.14740, eq. 9). float32 [n].

    That is n / (n - 1) times the distance from the whole group's mean. A group of one has no other: 0.
    """
    centred = normalize_by_group(rewards, groups, divide_by_std=False).astype(np.float64)
    _, member = np.unique(groups, return_inverse=True)
    count = np.bincount(member)[member]
    return np.where(count > 1, centred * count / np.maximum(count - 1, 1), 0.0).astype(np.float32)


def overlong_penalty(lengths: np.ndarray, *, longest: int, buffer: int, factor: float) -> np.ndarray:
    """DAPO's soft punishment of long responses (arXiv 2503.14476, eq. 13): what to add to the rewards. float64 [n] <= 0.

    lengths: response tokens [n]. 0 up to `longest - buffer` tokens, then linear to -factor at `longest` and beyond.
    """
    return -factor * np.clip((lengths - (longest - buffer)) / buffer, 0.0, 1.0)
