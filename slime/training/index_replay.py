"""What the engines' sparse attention read, for the layers of one rank that compute a selection."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slime.model.hf_config import HfConfig
from slime.model.stream import Segment, Stream
from slime.types import RolloutBatch
from slime.types.selections import Selections


@dataclass(frozen=True)
class ReplayedIndices:
    """Of one micro-batch: its samples in stream order. slime.model.stream.Told."""

    samples: tuple[Selections, ...]
    lengths: tuple[int, ...]
    """Tokens of each, padding not counted."""

    @property
    def needs_own(self) -> bool:
        """Is there a token, between others, of which no engine has told? The layer's own indexer then chooses for it."""
        return any(selections.has_gap for selections in self.samples)

    def keys(self, layer: int, stream: Stream, mine: slice, topk: int) -> tuple[Tensor, Tensor]:
        """(int32 [rows, topk] key rows of the whole stream, rising, -1 = none; bool [rows], whether an engine told them).

        layer: 0-based. mine: of the stream's local rows. Nothing is told of a sample's last tokens, which no trained one
        reads, and of padding: they read the topk nearest before them.
        """
        count = len(stream.rows[mine])
        first = mine.start or 0
        keys, told = np.empty((count, topk), np.int32), np.zeros(count, bool)
        for segment in stream.segments:
            low = max(segment.local, first)
            high = min(segment.local + segment.end - segment.begin, first + count)
            if low < high:
                begin = segment.begin + low - segment.local
                self._fill(keys[low - first : high - first], told[low - first : high - first], layer, stream, segment, begin)
        return torch.from_numpy(keys), torch.from_numpy(told)

    def _fill(self, keys: np.ndarray, told: np.ndarray, layer: int, stream: Stream, segment: Segment, begin: int) -> None:
        count, topk = keys.shape
        place = begin - segment.sample
        places = place + np.arange(count)
        # Those of a token that reads all before it, and of one of which nothing is told.
        nearest = np.maximum(places[:, None] - topk + 1, 0) + np.arange(topk)
        keys[:] = np.where(nearest <= places[:, None], nearest, -1)
        number = stream.bounds.index(segment.sample)
        told[:] = places < topk
        if number < len(self.samples):
            said = self.samples[number].rows(layer, place, place + count, topk)
            named = (said[:, 0] >= 0) & (places < self.lengths[number])
            keys[named], told[named] = said[named], True
        keys[keys >= 0] += segment.sample


def check_selections(batch: RolloutBatch, hf: HfConfig) -> None:
    """Raises ValueError where the rollout has none, and where engines told of another model than this one."""
    if batch.indexer_topk is None:
        raise ValueError("--use-rollout-indexer-replay: this rollout has no selections; was it made without the flag?")
    topk, layers = hf["index_topk"], [layer for layer in range(hf.num_layers) if hf.runs_indexer(layer)]
    for selections in batch.indexer_topk:
        for piece in selections.pieces:
            if piece.topk != topk or list(piece.blocks) != layers:
                raise ValueError(
                    f"engines told of {piece.topk} places in layers {list(piece.blocks)}; this model selects {topk} in layers "
                    f"{layers}: they serve another model than the trainer's"
                )
