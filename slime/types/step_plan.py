"""One optimizer step, decided before any device is touched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StepPlan:
    """Which samples each data-parallel rank runs, in which micro-batches, and how much each sample weighs.

    The loss of the step is sum over its samples i of loss_weight[i] * sum over tokens of loss_mask * token_loss, and gradients
    are *summed* over ranks and micro-batches. No rank divides by anything, so no split can change the result.
    """

    step_id: int
    """0-based within the rollout."""
    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    """[dp rank][micro-batch] -> sample positions in the RolloutBatch; every rank has the same number of micro-batches."""
    loss_weight: np.ndarray
    """float64 [n] over the whole RolloutBatch, 0 for samples outside this step."""
    num_trajectories: int
    """What the learning-rate schedule advances by (slime's step global batch size)."""
    denominator: float
    """What the weights divide by: trajectories, or trained tokens with --calculate-per-token-loss. For users' own reducers."""

    def __post_init__(self) -> None:
        counts = {len(rank) for rank in self.micro_batches}
        if len(counts) != 1:
            raise ValueError(f"step {self.step_id}: data-parallel ranks have {sorted(counts)} micro-batches, not equally many")
        placed = [position for rank in self.micro_batches for micro in rank for position in micro]
        if len(placed) != len(set(placed)):
            twice = sorted({position for position in placed if placed.count(position) > 1})
            raise ValueError(f"step {self.step_id}: samples {twice[:8]} are planned more than once")
        stray = sorted(set(np.flatnonzero(self.loss_weight).tolist()) - set(placed))
        if stray:
            raise ValueError(f"step {self.step_id}: samples {stray[:8]} have a loss weight but are on no rank")

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one rank."""
        return len(self.micro_batches[0])

    @property
    def positions(self) -> tuple[int, ...]:
        """All samples of the step, ascending."""
        return tuple(sorted(position for rank in self.micro_batches for micro in rank for position in micro))
