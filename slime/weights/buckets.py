"""Packing named tensors into flat byte buffers of bounded size, and reading them back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slime.types.weight_bucket import TensorMeta, WeightBucket
from slime.weights.wire import padded


def flat_bytes(metas: Sequence[TensorMeta]) -> int:
    """Length of the buffer that `metas` describe."""
    return metas[-1].start + padded(metas[-1].nbytes) if metas else 0


def pack_bucket(named: Sequence[tuple[str, Tensor]]) -> WeightBucket:
    """Copy tensors of any dtypes into one new uint8 buffer on their device.

    A new buffer each time: an engine may answer before its copy kernels have run, so a reused one would corrupt the last.
    """
    metas, start = [], 0
    for name, tensor in named:
        nbytes = tensor.numel() * tensor.element_size()
        metas.append(TensorMeta(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), start, nbytes))
        start += padded(nbytes)
    device = named[0][1].device if named else torch.device("cpu")
    flat = torch.zeros(flat_bytes(metas), dtype=torch.uint8, device=device)
    for meta, (_, tensor) in zip(metas, named, strict=True):
        flat[meta.start : meta.start + meta.nbytes].copy_(tensor.contiguous().view(-1).view(torch.uint8))
    return WeightBucket(tuple(metas), flat)


def dense_bucket(bucket: WeightBucket) -> WeightBucket:
    """A copy without gaps between the tensors, wide number formats first so that each is aligned to its own: what SGLang
    receives over a group of processes."""
    width = {meta.name: getattr(torch, meta.dtype).itemsize for meta in bucket.metas}
    metas, start = [], 0
    flat = torch.empty(sum(meta.nbytes for meta in bucket.metas), dtype=torch.uint8, device=bucket.flat.device)
    for meta in sorted(bucket.metas, key=lambda meta: -width[meta.name]):
        flat[start : start + meta.nbytes].copy_(bucket.flat[meta.start : meta.start + meta.nbytes])
        metas.append(replace(meta, start=start))
        start += meta.nbytes
    return WeightBucket(tuple(metas), flat)


def unpack_bucket(bucket: WeightBucket) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bucket, as views of its buffer."""
    for meta in bucket.metas:
        raw = bucket.flat[meta.start : meta.start + meta.nbytes]
        yield meta.name, raw.view(getattr(torch, meta.dtype)).view(meta.shape)


def fill_buckets(groups: Iterable[Sequence[tuple[str, Tensor]]], *, limit_bytes: int) -> Iterator[WeightBucket]:
    """Groups of tensors, in order, into buckets of at most `limit_bytes`; no group is split, a larger one travels alone."""
    if limit_bytes <= 0:
        raise ValueError(f"--update-weight-buffer-size is {limit_bytes}; it is a number of bytes and must be positive")
    waiting: list[tuple[str, Tensor]] = []
    waiting_bytes = 0
    for group in groups:
        group_bytes = sum(tensor.numel() * tensor.element_size() for _, tensor in group)
        if waiting and waiting_bytes + group_bytes > limit_bytes:
            yield pack_bucket(waiting)
            waiting, waiting_bytes = [], 0
        waiting.extend(group)
        waiting_bytes += group_bytes
    if waiting:
        yield pack_bucket(waiting)
