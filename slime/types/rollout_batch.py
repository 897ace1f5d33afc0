"""The columns that a rollout hands to training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slime.types.kept_words import KeptWords
from slime.types.selections import Selections


@dataclass(frozen=True)
class RolloutBatch:
    """All samples of one rollout, column by column; row i is one sample everywhere.

    A column that may be absent is `None` for every row, never for some. The prompt group and the trajectory are columns:
    nothing downstream infers them from counts. Raises ValueError naming the column and the row of the first wrong length.
    """

    rollout_id: int
    """The loop counter that produced these samples."""
    tokens: tuple[np.ndarray, ...]
    """Per sample int64 [total_length]: prompt then response."""
    response_lengths: np.ndarray
    """int64 [n]: the last that many tokens are the response; at least one prompt token precedes them."""
    loss_masks: tuple[np.ndarray, ...]
    """Per sample float32 [response_length]: 1 where the token is trained."""
    rewards: np.ndarray
    """float32 [n]: what advantages are made of (already centred within groups for GRPO-like estimators)."""
    raw_rewards: np.ndarray
    """float32 [n]: what the grader said."""
    groups: np.ndarray
    """int64 [n]: samples of one prompt share it."""
    trajectories: np.ndarray
    """int64 [n]: samples fanned out of one execution share it; one trajectory weighs as much as another."""
    sample_ids: np.ndarray
    """int64 [n]: unique over the run, used in reports."""
    truncated: np.ndarray
    """bool [n]: stopped by the length limit."""
    rollout_log_probs: tuple[np.ndarray, ...] | None = None
    """Per sample float32 [response_length]: the engine's log-prob of each response token."""
    teacher_log_probs: tuple[np.ndarray, ...] | None = None
    """Per sample float32 [response_length]: a distillation teacher's log-prob of each response token."""
    routed_experts: tuple[np.ndarray, ...] | None = None
    """Per sample, whole numbers [rows, layers, topk] in the type that the engine sent: its experts of the first so many tokens,
    at most of all but the last; -1 where it named none."""
    kept_words: tuple[KeptWords, ...] | None = None
    """Per sample, what top-p and top-k sampling left for each response token."""
    indexer_topk: tuple[Selections, ...] | None = None
    """Per sample, what the engine's sparse attention read for its tokens."""
    metadata: tuple[Mapping[str, Any], ...] | None = None
    """Per sample its train_metadata, for functions of the user's alone; {} of a sample without."""
    weight_versions: tuple[tuple[str, ...], ...] = ()
    """Per sample the weight versions that generated it; empty where none was recorded."""

    def __post_init__(self) -> None:
        n, where = len(self.tokens), f"rollout {self.rollout_id + 1}"
        for name in ("response_lengths", "rewards", "raw_rewards", "groups", "trajectories", "sample_ids", "truncated"):
            column = getattr(self, name)
            if column.shape != (n,):
                raise ValueError(f"{where}: column {name} has shape {column.shape}, but there are {n} samples")
        if self.weight_versions and len(self.weight_versions) != n:
            raise ValueError(f"{where}: column weight_versions has {len(self.weight_versions)} rows, but there are {n} samples")
        for row, (tokens, response) in enumerate(zip(self.tokens, self.response_lengths, strict=True)):
            if tokens.ndim != 1 or not 0 < response < len(tokens):
                raise ValueError(
                    f"{where}, row {row} (sample {self.sample_ids[row]}): {tokens.shape} tokens with a response of {response}; "
                    f"a sample needs at least one prompt token and one response token"
                )
        for name in ("loss_masks", "rollout_log_probs", "teacher_log_probs"):
            self._check_per_token(name)
        for name in ("kept_words", "indexer_topk", "metadata"):
            told = getattr(self, name)
            if told is not None and len(told) != n:
                raise ValueError(f"{where}: column {name} has {len(told)} rows, but there are {n} samples")
        for row, experts in enumerate(self.routed_experts or ()):
            if experts.ndim != 3 or len(experts) > len(self.tokens[row]) - 1:
                raise ValueError(
                    f"{where}, row {row} (sample {self.sample_ids[row]}): routed_experts has shape {experts.shape}, the sample "
                    f"has {len(self.tokens[row])} tokens"
                )

    def _check_per_token(self, name: str) -> None:
        column = getattr(self, name)
        if column is None:
            return
        if len(column) != len(self.tokens):
            raise ValueError(
                f"rollout {self.rollout_id + 1}: column {name} has {len(column)} rows, but there are {len(self.tokens)} samples"
            )
        for row, values in enumerate(column):
            if values.shape != (self.response_lengths[row],):
                raise ValueError(
                    f"rollout {self.rollout_id + 1}, row {row} (sample {self.sample_ids[row]}): "
                    f"{name} has shape {values.shape}, the response has {self.response_lengths[row]} tokens"
                )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def total_lengths(self) -> np.ndarray:
        """int64 [n]: prompt plus response."""
        return np.array([len(tokens) for tokens in self.tokens], dtype=np.int64)

    @property
    def mask_sums(self) -> np.ndarray:
        """float64 [n]: trained tokens of each sample."""
        return np.array([mask.sum(dtype=np.float64) for mask in self.loss_masks], dtype=np.float64)
