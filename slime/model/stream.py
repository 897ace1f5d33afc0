"""The packed token stream of one micro-batch as this rank's attention layers see it.

Made once per micro-batch from `PackedSeqParams.cu_seqlens_q` and kept on that object, which activation recompute captures too:
every layer, in the forward and in a recomputed forward, sees the same stream and the same shared indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from slime.compat.megatron import prepare

prepare()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region  # noqa: E402

_ATTRIBUTE = "_slime_stream"
TOLD = "_slime_told"
"""Of PackedSeqParams: Told, where a pass takes selections from elsewhere."""


@dataclass(frozen=True)
class Segment:
    """Consecutive local rows of one sample."""

    local: int
    """First local row."""
    begin: int
    """Its row in the whole stream."""
    end: int
    """One past the last row in the whole stream."""
    sample: int
    """Row at which the sample begins: keys of row i are sample <= j <= i."""


class Told(Protocol):
    """Selections from elsewhere. slime.training.index_replay makes them."""

    @property
    def needs_own(self) -> bool:
        """Is there a row that is read later and of which nothing is told? Equal on all ranks."""

    def keys(self, layer: int, stream: Stream, mine: slice, topk: int) -> tuple[Tensor, Tensor]:
        """(int32 [rows, topk] key rows of the whole stream, bool [rows]: told) of local rows `mine`; layer 0-based. On the
        stream's device."""


@dataclass
class Stream:
    """T rows in all, of which this context-parallel rank holds t. Rows of `gather`ed tensors are in stream order."""

    total: int
    bounds: tuple[int, ...]
    """Where samples begin in the whole stream, and its end: [0, ..., T]."""
    rows: Tensor
    """int64 [t]: place of each local row in the whole stream."""
    starts: Tensor
    """int64 [t]: row at which its sample begins. Keys of local row i: starts[i] <= j < ends[i]."""
    segments: tuple[Segment, ...]
    cp_group: dist.ProcessGroup | None
    order: Tensor | None
    """int64 [T]: where stream row i lies in the rank-by-rank concatenation; None when that is stream order already."""
    indices: dict[int, Tensor] = field(default_factory=dict)
    """Selected key rows by computing layer (1-based), int32 [rows, topk], -1 = none; shared by the layers after it. The rows
    are this tensor-parallel rank's slice of the t local ones, or all of them where the core is split by heads."""
    told: Told | None = None
    """What engines told that their layers selected, to be taken in the place of this rank's own selections."""
    tables: dict[object, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Rotary cos and sin by table."""
    derived: dict[object, object] = field(default_factory=dict)
    """What layers work out once per micro-batch, under keys of their own."""

    @property
    def positions(self) -> Tensor:
        """int64 [t]: position of each local row within its sample."""
        return self.rows - self.starts

    @property
    def ends(self) -> Tensor:
        """int64 [t]: one past the last key row of each local row."""
        return self.rows + 1

    def gather(self, local: Tensor) -> Tensor:
        """[t, ...] of every context-parallel rank -> [T, ...] in stream order; backward sums every rank's use of a row.

        Equal scores are broken by key order, so the order must be the stream's and not the ranks'.
        """
        if self.cp_group is None:
            return local
        whole = gather_from_sequence_parallel_region(local.contiguous(), group=self.cp_group)
        return whole if self.order is None else whole[self.order]


def stream_of(
    packed: PackedSeqParams, t: int, *, cp_group: dist.ProcessGroup | None, contiguous: bool, device: torch.device
) -> Stream:
    """The stream of this micro-batch; made at the first call for `packed`, the same object afterwards.

    t: rows of one context-parallel rank. contiguous: ranks hold equal slices of the stream (--allgather-cp), else two mirrored
    chunks of every sample (zigzag). Raises ValueError when cu_seqlens does not end at t x ranks.
    """
    if packed is None or packed.cu_seqlens_q is None:
        raise ValueError(
            "attention here works on packed sequences: pass packed_seq_params with cu_seqlens_q (one sample: [0, T])"
        )
    made = getattr(packed, _ATTRIBUTE, None)
    if made is None:
        made = make_stream(packed.cu_seqlens_q.tolist(), t, cp_group=cp_group, contiguous=contiguous, device=device)
        made.told = getattr(packed, TOLD, None)
        setattr(packed, _ATTRIBUTE, made)
    if len(made.rows) != t:
        raise ValueError(f"one micro-batch, two lengths: {len(made.rows)} rows before, {t} now")
    return made


def make_stream(
    bounds: Sequence[int], t: int, *, cp_group: dist.ProcessGroup | None, contiguous: bool, device: torch.device
) -> Stream:
    """From the sample boundaries [0, ..., T]; see stream_of."""
    rank, size = (dist.get_rank(cp_group), dist.get_world_size(cp_group)) if cp_group is not None else (0, 1)
    total = t * size
    if bounds[0] != 0 or bounds[-1] != total:
        raise ValueError(
            f"cu_seqlens runs from {bounds[0]} to {bounds[-1]}, but {size} context-parallel ranks hold {t} rows "
            f"each ({total}); "
            f"padding at the end of the stream must be a sequence of its own"
        )
    own = [_contiguous(bounds, t, r) if contiguous or size == 1 else _zigzag(bounds, t, r, size) for r in range(size)]
    segments = own[rank]
    order = None
    if size > 1 and not contiguous:
        order = torch.argsort(torch.cat([_rows(share) for share in own])).to(device)
    rows = _rows(segments).to(device)
    starts = torch.cat([torch.full((s.end - s.begin,), s.sample) for s in segments]).to(device)
    return Stream(total, tuple(bounds), rows, starts, tuple(segments), cp_group if size > 1 else None, order)


def _rows(segments: Sequence[Segment]) -> Tensor:
    return torch.cat([torch.arange(segment.begin, segment.end) for segment in segments])


def _contiguous(bounds: Sequence[int], t: int, rank: int) -> list[Segment]:
    first, last = rank * t, (rank + 1) * t
    segments = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        begin, stop = max(start, first), min(end, last)
        if begin < stop:
            segments.append(Segment(begin - first, begin, stop, start))
    return segments


def _zigzag(bounds: Sequence[int], t: int, rank: int, size: int) -> list[Segment]:
    """Every sample has 2 x size equal chunks, rank r holds chunks r and 2 x size - 1 - r; a padding sequence at the end that
    has no such chunks is dealt out in equal slices."""
    segments, local = [], 0
    for start, end in zip(bounds, bounds[1:], strict=False):
        length = end - start
        if length % (2 * size) == 0:
            chunk = length // (2 * size)
            pieces = [(start + n * chunk, chunk) for n in (rank, 2 * size - 1 - rank)]
        elif end == bounds[-1] and length % size == 0:
            pieces = [(start + rank * (length // size), length // size)]
        else:
            raise ValueError(f"a zigzag sample of {length} rows cannot be cut into {2 * size} equal chunks")
        for begin, count in pieces:
            if count:
                segments.append(Segment(local, begin, begin + count, start))
                local += count
    if local != t:
        raise ValueError(f"zigzag chunks of rank {rank} add up to {local} rows, not {t}")
    return segments
