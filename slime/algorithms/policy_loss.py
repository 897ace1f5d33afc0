"""Per-token policy-gradient losses. `log_ratio` is log pi_theta - log pi_old, differentiable in theta; [r] throughout."""

from __future__ import annotations

import torch
from torch import Tensor

from slime.algorithms.segments import segment_mean


def clipped_loss(
    log_ratio: Tensor, advantages: Tensor, *, eps_clip: float, eps_clip_high: float, eps_clip_c: float | None = None
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate: max(-r A, -clip(r, 1 - eps, 1 + eps_high) A), with r = e^log_ratio.

    -> (loss [r], clipped [r] 0 or 1: where the clipped branch is the larger one). PPO, arXiv 1707.06347, eq. 7; the separate
    upper bound is DAPO's clip-higher (arXiv 2503.14476, 3.1). `eps_clip_c` > 1 bounds the loss at -c A where A < 0 (dual clip,
    arXiv 1912.09729).
    """
    ratio = log_ratio.exp()
    free = -ratio * advantages
    bounded = -ratio.clamp(1 - eps_clip, 1 + eps_clip_high) * advantages
    loss = torch.maximum(free, bounded)
    if eps_clip_c is not None:
        if eps_clip_c <= 1:
            raise ValueError(
                f"--eps-clip-c {eps_clip_c} must be above 1: it bounds the ratio of tokens with negative advantage"
            )
        loss = torch.where(advantages < 0, torch.minimum(-eps_clip_c * advantages, loss), loss)
    return loss, (bounded > free).float()


def cispo_loss(
    log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, *, eps_clip: float, eps_clip_high: float
) -> tuple[Tensor, Tensor]:
    """CISPO: the clipped ratio is a constant weight, so no token loses its gradient (MiniMax-M1, arXiv 2506.13585, eq. 4).

    loss = -sg(clip(r, 1 - eps, 1 + eps_high)) A log_probs -> (loss [r], clipped [r]: where the weight was bounded).
    """
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1 - eps_clip, 1 + eps_clip_high)
    return -weight * advantages * log_probs, (weight != ratio).float()


def sequence_log_ratio(log_ratio: Tensor, mask: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """GSPO: every token gets its sample's mean masked log-ratio, so its ratio is the whole sequence's to the power 1 / length
    (arXiv 2507.18071, eq. 7). Differentiable: the gradient of a sequence reaches each of its tokens.
    """
    return segment_mean(log_ratio, mask, segments, num_segments)[segments]


def off_policy_sequence_mask(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, segments: Tensor, num_segments: int, *, delta: float
) -> Tensor:
    """1 for tokens to keep, 0 where the advantage is negative and the sequence's mean KL (old - new) exceeds `delta`
    (DeepSeek-V3.2, arXiv 2512.02556). Constant to autograd. [r].
    """
    divergence = segment_mean(-log_ratio.detach(), mask, segments, num_segments)[segments]
    return 1.0 - ((advantages < 0) & (divergence > delta)).float()


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, value_clip: float) -> tuple[Tensor, Tensor]:
    """max((v - R)^2, (v_old + clip(v - v_old, +-value_clip) - R)^2).

    -> (loss [r], clipped [r] 0 or 1: where the second is larger). Without the factor 1/2 of the squared error, as slime has it.
    The clip is that of PPO's first code (arXiv 2005.12729, 3).
    """
    free = (values - returns).square()
    bounded = (old_values + (values - old_values).clamp(-value_clip, value_clip) - returns).square()
    return torch.maximum(free, bounded), (bounded > free).float()
