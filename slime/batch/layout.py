"""Where each row of a rank's packed stream comes from: one index vector for every context-parallel layout.

The *stream* of a micro-batch is the plain concatenation of its samples, [T]. A rank holds t of those rows, padded so that
tensor and context parallelism divide them. `rows` says which; everything else (tokens, targets, positions, results) follows by
indexing, and values that ranks computed apart become whole by `spread` and one sum over the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceLayout:
    """One rank's share of a micro-batch's stream."""

    rows: Tensor
    """int64 [t]: stream index of each local row; -1 is padding."""
    lengths: tuple[int, ...]
    """Tokens of each sample; the stream is their concatenation."""
    cu_seqlens: Tensor
    """int32 [k + 1]: where sequences begin in the padded stream of all ranks together, as attention must see them. Trailing
    padding is a sequence of its own, so no sample ever attends to it or it to a sample."""
    cp_rank: int
    cp_size: int
    is_a_slice: bool = False
    """The rows are consecutive rows of the stream, then padding."""

    @staticmethod
    def contiguous(lengths: Sequence[int], *, cp_rank: int = 0, cp_size: int = 1, multiple: int = 1) -> SequenceLayout:
        """Rank r holds the r-th equal slice of the padded concatenation (slime's --allgather-cp).

        `multiple`: rows per rank are a multiple of it (tensor parallel size x --data-pad-size-multiplier).
        """
        _check(lengths, cp_rank, cp_size, multiple)
        total = sum(lengths)
        share = max(1, -(-total // (cp_size * multiple))) * multiple
        rows = torch.arange(cp_rank * share, (cp_rank + 1) * share)
        rows[rows >= total] = -1
        return SequenceLayout(rows, tuple(lengths), _boundaries(lengths, share * cp_size), cp_rank, cp_size, is_a_slice=True)

    @staticmethod
    def zigzag(lengths: Sequence[int], *, cp_rank: int = 0, cp_size: int = 1, multiple: int = 1) -> SequenceLayout:
        """Every sample is cut into 2 x cp_size chunks; rank r holds chunks r and 2 x cp_size - 1 - r, so causal work is even.

        A sample is padded to whole chunks; `cu_seqlens` counts those paddings to the sample they end.
        """
        _check(lengths, cp_rank, cp_size, multiple)
        if cp_size == 1:
            return SequenceLayout.contiguous(lengths, multiple=multiple)
        pieces, padded, start = [], [], 0
        for length in lengths:
            chunk = -(-length // (2 * cp_size))
            for number in (cp_rank, 2 * cp_size - 1 - cp_rank):
                inside = torch.arange(number * chunk, (number + 1) * chunk)
                pieces.append(torch.where(inside < length, inside + start, -1))
            padded.append(2 * cp_size * chunk)
            start += length
        rows = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
        share = max(1, -(-len(rows) // multiple)) * multiple
        rows = torch.nn.functional.pad(rows, (0, share - len(rows)), value=-1)
        return SequenceLayout(rows, tuple(lengths), _boundaries(padded, share * cp_size), cp_rank, cp_size)

    @property
    def length(self) -> int:
        """T, rows of the whole stream without padding."""
        return sum(self.lengths)

    @property
    def starts(self) -> tuple[int, ...]:
        """Stream index of each sample's first token."""
        starts, position = [], 0
        for length in self.lengths:
            starts.append(position)
            position += length
        return tuple(starts)

    @property
    def max_seqlen(self) -> int:
        """Longest sequence of `cu_seqlens`."""
        return int((self.cu_seqlens[1:] - self.cu_seqlens[:-1]).max())

    def take(self, stream: Tensor, pad: float) -> Tensor:
        """[T, ...] -> [t, ...]: this rank's rows, `pad` where a row is padding."""
        local = stream.new_full((len(self.rows), *stream.shape[1:]), pad)
        keep = self.rows >= 0
        local[keep] = stream[self.rows[keep]]
        return local

    def spread(self, local: Tensor) -> Tensor:
        """[t, ...] -> [T, ...]: zeros where other ranks own the row, so that a sum over the group makes it whole."""
        stream = local.new_zeros((self.length, *local.shape[1:]))
        keep = self.rows >= 0
        stream[self.rows[keep]] = local[keep]
        return stream

    def to(self, device: torch.device) -> SequenceLayout:
        return SequenceLayout(
            self.rows.to(device, non_blocking=True),
            self.lengths,
            self.cu_seqlens.to(device, non_blocking=True),
            self.cp_rank,
            self.cp_size,
            self.is_a_slice,
        )


def _check(lengths: Sequence[int], cp_rank: int, cp_size: int, multiple: int) -> None:
    if any(length < 1 for length in lengths) or not 0 <= cp_rank < cp_size or multiple < 1:
        raise ValueError(
            f"lengths {list(lengths)} must be positive, rank {cp_rank} below {cp_size}, multiple {multiple} positive"
        )


def _boundaries(lengths: Sequence[int], padded_total: int) -> Tensor:
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    if bounds[-1] < padded_total:
        bounds.append(padded_total)
    return torch.tensor(bounds, dtype=torch.int32)
