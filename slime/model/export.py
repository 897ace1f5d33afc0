"""The trained weights as Hugging Face tensors, in the order of the layers, for the weight stream and for saving."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from slime.model.layout import unmerge, unshard
from slime.model.local import LocalTensor, local_tensors, split_of
from slime.model.names import Entry, NameTable
from slime.parallel import Ranks

NamedTensors = list[tuple[str, Tensor]]


def export_weights(
    chunks: list[torch.nn.Module], table: NameTable, ranks: Ranks, *, gather_to_source: bool = True, experts: bool | None = None
) -> Iterator[NamedTensors]:
    """HF tensors of this rank's pipeline stage and expert shard; tensors of one list must reach an engine in one update call.

    Collective within the tensor-parallel group, whose members iterate in step. gather_to_source: one rank per stage (dense
    weights) and one per stage and expert shard (experts) gets tensors, the others get empty lists; otherwise every rank gets
    its own stage's. experts: only the routed experts (True) or only the rest (False); both unless said.
    A tensor may share memory with the model: consume it before the next optimizer step. Tied copies are given once, by their
    owner.
    """
    partners = Counter(entry.together for entry in table.entries if entry.together)
    waiting: dict[str, NamedTensors] = {}
    arrived: Counter[str] = Counter()
    for local in local_tensors(chunks, ranks):
        if local.is_copy or (local.name in table.aliases and not (ranks.is_first_stage and ranks.pp_size == 1)):
            continue
        entry = table[local.name]
        if experts is not None and experts != (entry.expert is not None):
            continue
        tensors = _gathered(entry, local, ranks, gather_to_source)
        if not entry.together:
            yield tensors
            continue
        waiting.setdefault(entry.together, []).extend(tensors)
        arrived[entry.together] += 1
        if arrived[entry.together] == partners[entry.together]:
            yield waiting.pop(entry.together)
    assert not waiting, f"incomplete groups of weights: {sorted(waiting)[:3]}"


def _gathered(entry: Entry, local: LocalTensor, ranks: Ranks, gather_to_source: bool) -> NamedTensors:
    if gather_to_source and _replica_number(entry, ranks) != 0:
        return []
    _, size = split_of(entry, ranks)
    if entry.split == "none" or size == 1:
        shards = [local.tensor]
    else:
        own = local.tensor.contiguous()
        shards = [torch.empty_like(own) for _ in range(size)]
        dist.all_gather(shards, own, group=ranks.etp_group if entry.expert is not None else ranks.tp_group)
    if gather_to_source and split_of(entry, ranks)[0] != 0:
        return []
    whole = unshard(entry, shards)
    return [(tensor.name, piece) for tensor, piece in zip(entry.hf, unmerge(entry, whole), strict=True)]


def _replica_number(entry: Entry, ranks: Ranks) -> int:
    """Which copy of the (gathered) tensor this rank's group holds; the same for all members of the group."""
    return ranks.edp_rank if entry.expert is not None else dist.get_rank(ranks.dp_cp_group)
