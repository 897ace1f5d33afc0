"""Weights for tokens whose generator's probability differs from the trainer's (engine against Megatron numerics, old versions).

Both take log-probs of the same tokens, [r], from the trainer at rollout time and from the engine, and return constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImportanceWeights:
    weight: Tensor
    """[r] multiplies the token's policy loss."""
    ratio: Tensor
    """[r] the raw ratio trainer / engine; infinite where the engine gave the token no probability."""
    changed: Tensor
    """[r] 1 where weight is not the raw ratio."""


def truncated(train_log_probs: Tensor, rollout_log_probs: Tensor, *, low: float, high: float) -> ImportanceWeights:
    """Truncated importance sampling: clamp(e^(train - rollout), low, high) (https://fengyao.notion.site/off-policy-rl)."""
    ratio = (train_log_probs.detach() - rollout_log_probs).exp()
    weight = ratio.clamp(low, high)
    return ImportanceWeights(weight, ratio, (weight != ratio).float())


def icepop(train_log_probs: Tensor, rollout_log_probs: Tensor, *, low: float, high: float) -> ImportanceWeights:
    """IcePop: the ratio inside [low, high], 0 outside, so tokens the engine and the trainer disagree on teach nothing
    (Ling team, https://ringtech.notion.site/icepop; GLM-5, arXiv 2602.15763)."""
    ratio = (train_log_probs.detach() - rollout_log_probs).exp()
    inside = (ratio >= low) & (ratio <= high)
    # Not ratio * inside: an infinite ratio times 0 is nan.
    return ImportanceWeights(torch.where(inside, ratio, torch.zeros_like(ratio)), ratio, (~inside).float())
