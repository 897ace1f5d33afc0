"""What the engines' sparse attention read, for the layers of one rank that compute a selection."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slime.model.hf_config import HfConfig
from slime.model.stream import Stream
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
        reads, and of padding: they read the topk nearest before them. On the stream's device, where most is worked out:
        only what was named is unpacked here and travels.
        """
        rows, starts = stream.rows[mine].int(), stream.starts[mine].int()
        begin = torch.maximum(rows - topk + 1, starts)[:, None]
        keys = begin + torch.arange(topk, dtype=torch.int32, device=rows.device)
        keys.masked_fill_(keys > rows[:, None], -1)
        told = rows - starts < topk  # such a row reads all before it
        first = mine.start or 0
        for segment in stream.segments:
            low = max(segment.local, first)
            high = min(segment.local + segment.end - segment.begin, first + len(rows))
            number = stream.bounds.index(segment.sample)
            if low >= high or number >= len(self.samples):
                continue
            place = segment.begin + low - segment.local - segment.sample
            open_, end = max(place, topk), min(place + high - low, self.lengths[number])
            if open_ >= end:
                continue
            said = self.samples[number].rows(layer, open_, end, topk)
            [named] = np.nonzero(said[:, 0] >= 0)
            at = torch.from_numpy(named + (low - first + open_ - place)).to(rows.device)
            keys[at] = torch.from_numpy(said[named] + np.int32(segment.sample)).to(rows.device)
            told[at] = True
        return keys, told


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
