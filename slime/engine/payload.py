"""The body of an in-place weight update, made without importing SGLang.

SGLang unpickles `{"flattened_tensor": uint8 [nbytes], "metadata": [...]}` and reads six attributes of each metadata entry;
its unpickler admits types.SimpleNamespace, so the trainer needs no class of SGLang's. A call has a payload for each rank of the
engine, and each rank loads its own: their lists may differ, and one may be empty.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from slime.device import Device
from slime.types.weight_bucket import WeightBucket

LOAD_FORMAT = "flattened_bucket"


def bucket_payload(bucket: WeightBucket, device: Device) -> bytes:
    """A bucket as one engine rank reads it. CUDA: the buffer's IPC handle, so keep the bucket until the engine has answered.

    An empty bucket is for a rank that gets nothing in this call, in which it has to take part.
    """
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
    # There is no handle of a tensor without memory.
    flat = bucket.flat if bucket.metas else torch.zeros(1, dtype=torch.uint8, device=bucket.flat.device)
    return device.share({"flattened_tensor": flat, "metadata": metadata})
