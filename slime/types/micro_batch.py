"""One packed stream on one rank: what the model's forward and the loss read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from slime.batch.layout import SequenceLayout
    from slime.types.selections import Selections


@dataclass(frozen=True)
class MicroBatch:
    """Local rows [t] go into the model; response tokens [r] go into the loss, whole and equal on every rank of the group."""

    positions: tuple[int, ...]
    """Rows of the RolloutBatch, in stream order; empty for a micro-batch that only keeps the collectives in step."""
    layout: SequenceLayout
    """Which stream rows this rank holds, and the sequence boundaries that attention must see."""
    tokens: Tensor
    """int64 [1, t], 0 on padding."""
    position_ids: Tensor
    """int64 [1, t]: 0-based within each sample, 0 on padding."""
    targets: Tensor
    """int64 [t]: the token after this row's in the same sample; 0 on padding and on a sample's last row."""
    draft_targets: Tensor
    """int64 [t]: the token two after this row's in the same sample, which the multi-token-prediction layer guesses; 0 where
    there is none."""
    response_rows: Tensor
    """int64 [r]: the stream row whose logits predict each response token."""
    draft_rows: Tensor
    """int64 [r]: the stream row from which the multi-token-prediction layer guesses each response token; -1 where the sample
    has none (its second token)."""
    segments: Tensor
    """int64 [r]: which of `positions` each response token belongs to, 0-based."""
    loss_mask: Tensor
    """float32 [r]."""
    loss_weight: Tensor
    """float32 [r]: the StepPlan's weight of the token's sample. The loss is sum(loss_weight * loss_mask * token_loss)."""
    denominator: float
    """Of the whole step; see StepPlan."""
    mean_importance_weight: float = 1.0
    """Of the whole step's trained tokens, by which --tis-batch-normalize divides; 1 without it."""
    rollout_log_probs: Tensor | None = None
    """float32 [r]: the engine's."""
    old_log_probs: Tensor | None = None
    """float32 [r]: of the policy that the importance ratio is measured against."""
    ref_log_probs: Tensor | None = None
    """float32 [r]: of the reference model."""
    teacher_log_probs: Tensor | None = None
    """float32 [r]."""
    advantages: Tensor | None = None
    """float32 [r]."""
    values: Tensor | None = None
    """float32 [r]: the critic's, before the rollout's steps."""
    returns: Tensor | None = None
    """float32 [r]: what the critic learns to expect."""
    kept_limited: Tensor | None = None
    """bool [t]: local rows whose next token was drawn from some words alone; None where no sampling cut the vocabulary."""
    kept_rows: Tensor | None = None
    """int64 [n], rising: local row of each such word."""
    kept_words: Tensor | None = None
    """int64 [n]: the word."""
    selections: tuple[Selections, ...] | None = None
    """Of each sample, what the engines' sparse attention read; None where the trainer's own indexers choose."""
    metadata: tuple[Mapping[str, Any], ...] | None = None
    """Of each sample its train_metadata, for a --custom-loss-function-path; None where no sample of the rollout has any."""

    @property
    def num_samples(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`."""
        moved: dict[str, object] = {"layout": self.layout.to(device)}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device, non_blocking=True)
        return replace(self, **moved)
