"""The body of an in-place weight update, made without importing SGLang.

SGLang unpickles `{"flattened_tensor": uint8 [nbytes], "metadata": [...]}` and reads six attributes of each metadata entry;
its unpickler admits types.SimpleNamespace, so the trainer needs no class of SGLang's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from slime.device import Device
from slime.types.weight_bucket import TensorMeta, WeightBucket

LOAD_FORMAT = "flattened_bucket"
# Viewing bytes as float32 needs offsets divisible by 4; 16 suits vector loads.
ALIGNMENT = 16


def bucket_payload(bucket: WeightBucket, device: Device) -> bytes:
    """A bucket as one engine rank reads it. CUDA: the buffer's IPC handle, so keep the bucket until the engine has answered."""
    metadata = [
        SimpleNamespace(
            name=meta.name,
            shape=torch.Size(meta.shape),
            dtype=getattr(torch, meta.dtype),
            start_idx=meta.start,
            end_idx=meta.start + meta.nbytes,
            numel=meta.nbytes,
        )
        for meta in bucket.metas
    ]
    return device.share({"flattened_tensor": bucket.flat, "metadata": metadata})


def flatten_bucket(named_tensors: Iterable[tuple[str, Tensor]], device: Device) -> bytes:
    """Named tensors of any dtypes, copied into one buffer, as a payload."""
    return bucket_payload(flat(list(named_tensors)), device)


def flat(named: Sequence[tuple[str, Tensor]]) -> WeightBucket:
    if not named:
        raise ValueError("a weight bucket holds at least one tensor; SGLang refuses an empty one")
    metas, parts, start = [], [], 0
    for name, tensor in named:
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
        metas.append(TensorMeta(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), start, raw.numel()))
        padding = -raw.numel() % ALIGNMENT
        parts += [raw, raw.new_zeros(padding)]
        start += raw.numel() + padding
    return WeightBucket(tuple(metas), torch.cat(parts))
