"""Making every bucket present on every trainer rank, so that each can hand it to the engine that shares its device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from slime.types.weight_bucket import WeightBucket
from slime.weights.buckets import flat_bytes


@dataclass(frozen=True)
class Source:
    """One rank that sends a part of the model."""

    rank: int
    buckets: Iterator[WeightBucket] | None
    """Its buckets, on itself and on the ranks of its tensor-parallel group: making a bucket is a collective of that group, so
    they all advance together. None on every other rank."""


def broadcast_buckets(
    sources: Sequence[Source], *, rank: int, device: torch.device, group: dist.ProcessGroup | None = None
) -> Iterator[WeightBucket]:
    """All buckets of all sources, on every rank, in the same order.

    Buckets are already in wire format, so FP8 models cross the network as FP8. Every rank takes part in the same collectives:
    per bucket one object broadcast (names and offsets) and one of the bytes; a source ends with an empty message. Sources send
    one after another.
    """
    for source in sources:
        while True:
            bucket = next(source.buckets, None) if source.buckets is not None else None
            header = [bucket.metas if bucket is not None else None]
            dist.broadcast_object_list(header, src=source.rank, group=group, device=device)
            metas = header[0]
            if metas is None:
                break
            if rank != source.rank:
                bucket = WeightBucket(metas, torch.empty(flat_bytes(metas), dtype=torch.uint8, device=device))
            dist.broadcast(bucket.flat, src=source.rank, group=group)
            yield bucket
