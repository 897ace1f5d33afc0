"""The distributed optimizer's state in a checkpoint that any layout can load, without a second copy of it.

megatron-core's `fully_reshardable` gathers the whole buffer of a data-parallel group at once, on every rank: over NCCL three
float32 arrays of its size on the GPU, and six in main memory. The experts on a GPU of the 744B recipe's last stage would take
58 GB of it. Here each parameter is put together by itself, on the one rank that holds most of it, and a rank that holds all
of it hands out what it has. Keys and values in the checkpoint are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slime.compat.megatron import prepare
from slime.device import get_device

prepare()

from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory  # noqa: E402
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402

PREFIX = "optimizer.state"
Sharded = ShardedTensor | ShardedTensorFactory


def put_state_together_by_parameter(optimizer: DistributedOptimizer) -> None:
    """From here on its `fully_reshardable` state is made parameter by parameter."""
    optimizer.sharded_param_state_fully_reshardable = functools.partial(param_state, optimizer)


def param_state(
    optimizer: DistributedOptimizer, model_state: dict[str, Any], is_loading: bool = False, metadata: dict | None = None
) -> dict[int, dict[str, Sharded]]:
    """What `DistributedOptimizer.sharded_param_state_fully_reshardable` returns, for the parameters of which this rank writes
    the state (saving) or holds a part (loading): number of the parameter -> {"param", "exp_avg", "exp_avg_sq"}.

    Called by all ranks of the data-parallel group together. model_state: the model's sharded state, whose tensors are the
    parameters themselves. Raises ValueError for a parameter that it does not hold.
    """
    described = {id(entry.data): entry for entry in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}
    state = {}
    for number, (parameter, slices) in enumerate(_parameters(optimizer)):
        if id(parameter) not in described:
            raise ValueError(f"the model's sharded state lacks a parameter of shape {tuple(parameter.shape)} that is trained")
        tensors = _empty(optimizer, parameter, slices) if is_loading else _whole(optimizer, parameter, slices)
        if tensors is not None:
            copy = 0 if slices.rank == slices.owner else 1 + slices.rank
            state[number] = {name: _entry(described[id(parameter)], name, tensor, copy) for name, tensor in tensors.items()}
    return state


@dataclass(frozen=True)
class Slices:
    """Which elements of a flattened parameter each rank of the data-parallel group holds."""

    numel: int
    bounds: tuple[tuple[int, int], ...]
    """By rank: (begin, end), equal where it holds none."""
    rank: int

    @property
    def owner(self) -> int:
        """The rank that holds most, of equal ones the first: it writes."""
        return max(range(len(self.bounds)), key=lambda rank: (self.length(rank), -rank))

    def length(self, rank: int) -> int:
        return self.bounds[rank][1] - self.bounds[rank][0]

    @staticmethod
    def of(start: int, end: int, bucket_start: int, share: int, *, ranks: int, rank: int) -> Slices:
        """A parameter at [start, end) of a buffer, in the bucket that begins at bucket_start and gives `share` elements to each
        rank."""
        cuts = [min(max(bucket_start + r * share, start), end) - start for r in range(ranks + 1)]
        return Slices(end - start, tuple(zip(cuts, cuts[1:], strict=False)), rank)


def _parameters(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, Slices]]:
    """In the order in which `load_parameter_state_from_fully_reshardable` counts."""
    group = optimizer.data_parallel_group
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    for buffer in optimizer.buffers:
        for parameter, (start, end, bucket_id) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            yield parameter, Slices.of(start, end, bucket.offset, bucket.grad_data.numel() // ranks, ranks=ranks, rank=rank)


def _held(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
    """This rank's slice of the main parameter and the moments, flat."""
    tensors = optimizer._get_main_param_and_optimizer_states(parameter)
    return {name: tensor.detach() for name, tensor in tensors.items() if name != "step"}


def _empty(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter, slices: Slices) -> dict[str, Tensor] | None:
    """Room for the whole parameter's state where this rank holds a part of it, which is cut out once it is loaded."""
    if not slices.length(slices.rank):
        return None
    return {name: torch.empty(parameter.shape, dtype=torch.float32) for name in _held(optimizer, parameter)}


def _whole(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter, slices: Slices) -> dict[str, Tensor] | None:
    """The whole parameter's state on its owner, None on the others."""
    if not slices.length(slices.rank):
        return None
    held = _held(optimizer, parameter)
    if slices.length(slices.owner) == slices.numel:
        return {name: _readable(tensor.float()).view(parameter.shape) for name, tensor in held.items()}
    names = sorted(held)
    own = torch.stack([held[name].float() for name in names]).to(get_device().torch_device)
    group = optimizer.data_parallel_group
    if slices.rank != slices.owner:
        _run([dist.P2POp(dist.isend, own, group=group, group_peer=slices.owner)])
        return None
    others = [rank for rank in range(len(slices.bounds)) if slices.length(rank) and rank != slices.rank]
    arrived = {rank: own.new_empty(len(names), slices.length(rank)) for rank in others}
    _run([dist.P2POp(dist.irecv, arrived[rank], group=group, group_peer=rank) for rank in others])
    whole = torch.empty(len(names), slices.numel, dtype=torch.float32)
    for rank, part in {**arrived, slices.rank: own}.items():
        whole[:, slice(*slices.bounds[rank])] = part.cpu()
    return {name: tensor.view(parameter.shape) for name, tensor in zip(names, whole.unbind(), strict=True)}


def _run(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _readable(tensor: Tensor) -> Tensor:
    """Checkpoints are written by a forked process, which cannot read page-locked memory of its parent."""
    return tensor.clone() if tensor.is_pinned() else tensor


def _entry(described: Sharded, name: str, tensor: Tensor, copy: int) -> Sharded:
    """The state `name` of the parameter that `described` describes. The data-parallel group's copy number 0 is written."""
    replica_id = (*described.replica_id[:2], copy)
    dtype = {} if isinstance(described, ShardedTensorFactory) else {"dtype": tensor.dtype}
    entry = replace(described, key=f"{PREFIX}.{name}.{described.key}", data=tensor, replica_id=replica_id, **dtype)
    entry.validate_metadata_integrity()
    return entry
