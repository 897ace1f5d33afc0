"""Importance functions with slime's signature: what --use-tis calls, and what --custom-tis-function-path can name.

A function gets one tensor per sample (whole responses, whatever the context-parallel size) and the flat token loss [r]. It
gives back the weighted loss [r], one mask per sample that may drop tokens, and per-token values [r] to report. Users know both
as slime.backends.megatron_utils.loss.{vanilla_tis_function, icepop_function}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slime.algorithms.importance import ImportanceWeights, icepop, truncated

Weighted = tuple[Tensor, Sequence[Tensor], dict[str, Tensor]]


def vanilla_tis_function(
    args: Any,
    *,
    pg_loss: Tensor,
    train_log_probs: Sequence[Tensor],
    rollout_log_probs: Sequence[Tensor],
    loss_masks: Sequence[Tensor],
    **rest: Any,
) -> Weighted:
    """Truncated importance sampling: the ratio trainer / engine, bounded by --tis-clip-low and --tis-clip."""
    weights = truncated(*_joined(train_log_probs, rollout_log_probs, pg_loss), low=args.tis_clip_low, high=args.tis_clip)
    return _weighted(pg_loss, weights, loss_masks)


def icepop_function(
    args: Any,
    *,
    pg_loss: Tensor,
    train_log_probs: Sequence[Tensor],
    rollout_log_probs: Sequence[Tensor],
    loss_masks: Sequence[Tensor],
    **rest: Any,
) -> Weighted:
    """IcePop: the ratio inside --tis-clip-low and --tis-clip, else 0. The masks stay, so KL and entropy see every token."""
    weights = icepop(*_joined(train_log_probs, rollout_log_probs, pg_loss), low=args.tis_clip_low, high=args.tis_clip)
    return _weighted(pg_loss, weights, loss_masks)


def _joined(train: Sequence[Tensor], rollout: Sequence[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    empty = like.new_zeros(0)
    return torch.cat([empty, *train]), torch.cat([empty, *rollout])


def _weighted(pg_loss: Tensor, weights: ImportanceWeights, loss_masks: Sequence[Tensor]) -> Weighted:
    shown = {"tis": weights.ratio, "tis_clipfrac": weights.changed, "tis_abs": (weights.ratio - 1).abs()}
    return pg_loss * weights.weight, loss_masks, shown
