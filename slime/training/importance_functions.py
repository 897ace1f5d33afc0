"""Importance functions with slime's signature: what --use-tis and --use-rs call, and what --custom-tis-function-path can name.

A function gets one tensor per sample (whole responses, whatever the context-parallel size) and the flat token loss [r]. It
gives back the weighted loss [r], one mask per sample that may drop tokens, and per-token values [r] to report. Users know two
of them as slime.backends.megatron_utils.loss.{vanilla_tis_function, icepop_function}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slime.algorithms.importance import ImportanceWeights, accepted, icepop, not_vetoed, ratios, truncated, weigh

Weighted = tuple[Tensor, Sequence[Tensor], dict[str, Tensor]]


def importance_function(
    args: Any,
    *,
    pg_loss: Tensor,
    train_log_probs: Sequence[Tensor],
    rollout_log_probs: Sequence[Tensor],
    loss_masks: Sequence[Tensor],
    mean_weight: float = 1.0,
    **rest: Any,
) -> Weighted:
    """What the flags say: --tis-mode and --tis-level make weights, --use-rs drops tokens, --rs-veto-threshold whole samples.

    mean_weight: of the whole step, by which --tis-batch-normalize divides.
    """
    train, rollout = _joined(train_log_probs, rollout_log_probs, pg_loss)
    lengths = [len(mask) for mask in loss_masks]
    mask = torch.cat([pg_loss.new_zeros(0), *(mask.to(pg_loss) for mask in loss_masks)])
    segments = torch.repeat_interleave(torch.tensor(lengths, device=pg_loss.device))

    def of(level: str) -> Tensor:
        return ratios(train, rollout, mask, segments, len(lengths), level=level)

    weights, keep = weigh(of(args.tis_level), mode=args.tis_mode, low=args.tis_lower_bound, high=args.tis_upper_bound)
    shown = {"tis": weights.ratio, "tis_clipfrac": weights.changed, "tis_abs": (weights.ratio - 1).abs()}
    if args.use_tis:
        pg_loss = pg_loss * weights.weight / mean_weight
    else:  # --use-rs alone
        keep = torch.ones_like(keep)
    if args.use_rs:
        kept = accepted(of(args.rs_level), low=args.rs_lower_bound, high=args.rs_upper_bound)
        if args.rs_veto_threshold is not None:
            allowed = not_vetoed(of("token"), mask, segments, len(lengths), threshold=args.rs_veto_threshold)
            kept, shown["rs_vetoed"] = kept * allowed, 1 - allowed
        keep, shown["rs_dropped"] = keep * kept, 1 - kept
    return pg_loss, (mask * keep).split(lengths), shown


def weight_moments(args: Any, *, train_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> Tensor:
    """[count, sum] of one sample's importance weights in float64: of its trained tokens, or, above the level of tokens, one."""
    one = torch.zeros(len(mask), dtype=torch.long)
    ratio = ratios(train_log_probs, rollout_log_probs, mask, one, 1, level=args.tis_level)
    weights, _ = weigh(ratio, mode=args.tis_mode, low=args.tis_lower_bound, high=args.tis_upper_bound)
    trained = weights.weight[mask > 0].double()
    if args.tis_level != "token":
        trained = trained[:1]
    return torch.tensor([float(len(trained)), float(trained.sum())], dtype=torch.float64)


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
