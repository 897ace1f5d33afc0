"""Weights for tokens whose generator's probability differs from the trainer's (engine against Megatron numerics, old versions).

All take log-probs of the same tokens, [r], from the trainer at rollout time and from the engine, and return constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slime.algorithms.segments import segment_mean, segment_sum

MAX_LOG_RATIO = 20.0
"""Log-ratios are bounded at +-20, a factor of 5e8 and beyond every clip: e^x of more overflows, and 0 * inf is nan."""


@dataclass(frozen=True)
class ImportanceWeights:
    weight: Tensor
    """[r] multiplies the token's policy loss."""
    ratio: Tensor
    """[r] the raw ratio trainer / engine of the level; infinite in `truncated` and `icepop` where the engine gave the token no
    probability."""
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


def bounded_log_ratio(log_ratio: Tensor) -> Tensor:
    """Within +-MAX_LOG_RATIO. Outside it is constant to autograd: a token that far off teaches nothing by itself."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def ratios(
    train_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor, segments: Tensor, num_segments: int, *, level: str
) -> Tensor:
    """Trainer's over engine's probability [r], between e^-20 and e^20: of each token ("token"), of the sample's trained tokens
    together ("sequence"), or its mean per token ("geometric"), then equal over a sample.

    A sequence's is the unbiased one and varies with its length; a token's is biased and does not (MIS,
    https://yingru.notion.site/When-Speed-Kills-Stability-271211a558b7808d8b12d403fd15edda).
    """
    gap = bounded_log_ratio(train_log_probs.detach() - rollout_log_probs)
    if level == "sequence":
        gap = segment_sum(gap * mask, segments, num_segments)[segments]
    elif level == "geometric":
        gap = segment_mean(gap, mask, segments, num_segments)[segments]
    elif level != "token":
        raise ValueError(f"an importance ratio is of a token, sequence or geometric, not of {level!r}")
    return bounded_log_ratio(gap).exp()


def weigh(ratio: Tensor, *, mode: str, low: float, high: float) -> tuple[ImportanceWeights, Tensor]:
    """-> (weights, keep [r] 0 or 1: tokens of which nothing is trained). `ratio` as `ratios` gives it.

    truncate: at most high. clip: at least low, too. icepop: 0 outside [low, high], which leaves KL and entropy of the token.
    mask: the ratio as it is, and nothing of what lies outside is trained.
    """
    inside = (ratio >= low) & (ratio <= high)
    keep = torch.ones_like(ratio)
    match mode:
        case "truncate":
            weight = ratio.clamp(max=high)
        case "clip":
            weight = ratio.clamp(low, high)
        case "icepop":
            weight = torch.where(inside, ratio, torch.zeros_like(ratio))
        case "mask":
            return ImportanceWeights(ratio, ratio, (~inside).float()), inside.float()
        case _:
            raise ValueError(f"an importance weight is made by truncate, clip, mask or icepop, not by {mode!r}")
    return ImportanceWeights(weight, ratio, (weight != ratio).float()), keep


def accepted(ratio: Tensor, *, low: float, high: float) -> Tensor:
    """Rejection sampling: 1 where the ratio lies in [low, high], else 0. [r]"""
    return ((ratio >= low) & (ratio <= high)).float()


def not_vetoed(token_ratio: Tensor, mask: Tensor, segments: Tensor, num_segments: int, *, threshold: float) -> Tensor:
    """0 for every token of a sample that has a trained token with a ratio below `threshold`, else 1. [r]"""
    catastrophic = ((token_ratio < threshold) & (mask > 0)).float()
    return (segment_sum(catastrophic, segments, num_segments) == 0).float()[segments]
