"""Making every bucket present on every trainer rank, so that each can hand it to the engine that shares its device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from slime.types.weight_bucket import WeightBucket
from slime.weights.buckets import flat_bytes


def broadcast_buckets(
    own: Iterator[WeightBucket], *, sources: Sequence[int], rank: int, device: torch.device, group: dist.ProcessGroup | None = None
) -> Iterator[WeightBucket]:
    """All buckets of all source ranks, on every rank, in the same order.

    own: this rank's buckets if `rank` is one of `sources` (else it is not touched). Buckets are already in wire format, so FP8 models
    cross the network as FP8. Every rank takes part in the same collectives: per bucket one object broadcast (names and offsets) and
    one of the bytes; a source ends with an empty message. Sources send one after another.
    """
    for source in sources:
        while True:
            bucket = next(own, None) if rank == source else None
            header = [bucket.metas if bucket is not None else None]
            dist.broadcast_object_list(header, src=source, group=group)
            metas = header[0]
            if metas is None:
                break
            if bucket is None:
                bucket = WeightBucket(metas, torch.empty(flat_bytes(metas), dtype=torch.uint8, device=device))
            dist.broadcast(bucket.flat, src=source, group=group)
            yield bucket

