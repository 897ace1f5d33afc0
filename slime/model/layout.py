"""Tensors between the table's two sides: HF pieces <-> the whole Megatron tensor <-> one rank's shard. Pure, any dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slime.model.names import Entry


def merge(entry: Entry, pieces: Sequence[Tensor]) -> Tensor:
    """HF tensors of `entry`, in its order -> the whole Megatron tensor. Raises ValueError naming a mis-shaped one."""
    for tensor, expected in zip(pieces, entry.hf, strict=True):
        if tuple(tensor.shape) != expected.shape:
            raise ValueError(f"{expected.name} has shape {list(tensor.shape)}, the config says {list(expected.shape)}")
    if entry.merge == "single":
        return pieces[0]
    if entry.merge == "rows":
        return torch.cat(list(pieces))
    groups, per_group, width = entry.groups
    rest = pieces[0].shape[1:]
    query = pieces[0].reshape(groups, per_group * width, *rest)
    key, value = (piece.reshape(groups, width, *rest) for piece in pieces[1:])
    return torch.cat([query, key, value], dim=1).reshape(-1, *rest)


def unmerge(entry: Entry, whole: Tensor, *, size: int = 1) -> list[Tensor]:
    """The inverse of merge: contiguous HF tensors in the entry's order.

    size: of how many shards `whole` is one; its part of each HF tensor then (rows of a vocabulary with their padding).
    """
    if entry.merge == "single":
        return [whole]
    if entry.merge == "rows":
        return [part.contiguous() for part in whole.split([tensor.shape[0] // size for tensor in entry.hf])]
    groups, per_group, width = entry.groups
    rest, groups = whole.shape[1:], groups // size
    parts = whole.reshape(groups, (per_group + 2) * width, *rest).split([per_group * width, width, width], dim=1)
    return [part.reshape(-1, *rest).contiguous() for part in parts]


def shard_shape(entry: Entry, size: int, *, padded_vocab: int | None = None) -> tuple[int, ...]:
    """Shape of one of `size` tensor-parallel shards. Raises ValueError when the ranks do not divide it."""
    if entry.split == "none":
        return entry.shape
    axis = 1 if entry.split == "columns" else 0
    whole = padded_vocab if entry.split == "vocab" and padded_vocab else entry.shape[axis]
    units = whole
    if entry.groups:
        units = entry.groups[0]
    elif entry.split == "gated_rows":
        units = whole // 2
    if units % size:
        raise ValueError(
            f"{entry.name}: {units} {'query groups' if entry.groups else 'rows'} cannot be split over {size} ranks"
        )
    shape = list(entry.shape)
    shape[axis] = whole // size
    return tuple(shape)


def shard(entry: Entry, whole: Tensor, rank: int, size: int, *, padded_vocab: int | None = None) -> Tensor:
    """Rank `rank`'s part of the whole Megatron tensor; a vocabulary is padded with zero rows first."""
    if entry.split == "vocab" and padded_vocab and padded_vocab != whole.shape[0]:
        whole = torch.nn.functional.pad(whole, (0, 0, 0, padded_vocab - whole.shape[0]))
    if entry.split == "none" or size == 1:
        return whole
    shard_shape(entry, size, padded_vocab=padded_vocab)
    if entry.split == "gated_rows":
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    return whole.chunk(size, dim=1 if entry.split == "columns" else 0)[rank]


def unshard(entry: Entry, shards: Sequence[Tensor]) -> Tensor:
    """The inverse of shard: all ranks' parts, in rank order -> whole, vocabulary padding removed."""
    if entry.split == "none":
        return shards[0]
    if entry.split == "gated_rows" and len(shards) > 1:
        halves = [part.chunk(2) for part in shards]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    whole = shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=1 if entry.split == "columns" else 0)
    return whole[: entry.shape[0]] if entry.split == "vocab" else whole
