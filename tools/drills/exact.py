"""Whether a checkpoint is that of the run nobody disturbed: one number for all its tensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tools.drills.launch import newest

if TYPE_CHECKING:
    from torch import Tensor

DIGESTS = "digests.json"
"""Iteration -> digest of the undisturbed run's checkpoint."""


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a torch_dist checkpoint, whole, by name."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in stored.items()
        if isinstance(meta, TensorStorageMetadata)
    }
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state


def digest(folder: Path) -> str:
    """Of every tensor of a checkpoint: name, type, shape and bytes."""
    import torch

    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors(folder).items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def write_digests(base: Path, checkpoints: Path) -> None:
    found = {int(one.name.removeprefix("iter_")): digest(one) for one in sorted(checkpoints.glob("iter_*"))}
    (base / DIGESTS).write_text(json.dumps(found, indent=1) + "\n")


def is_exact(base: Path, checkpoints: Path) -> bool | None:
    """Of the newest checkpoint; None where there is none."""
    iteration = newest(checkpoints)
    if iteration is None:
        return None
    return json.loads((base / DIGESTS).read_text())[str(iteration)] == digest(checkpoints / f"iter_{iteration:07d}")
