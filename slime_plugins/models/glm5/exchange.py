"""Moving the sparse core's tensors between the two ways to share it inside a tensor-parallel group: by heads and by queries.

Every projection is split by heads. The core itself gathers `topk` latent rows per query and all heads of a query read the same
ones, so a rank that holds all heads of its queries reads each row once where head shards read it tp times.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from slime.compat.megatron import prepare

prepare()

from megatron.core.tensor_parallel.mappings import all_to_all  # noqa: E402


def heads_to_queries(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[t, heads / tp, width] of every rank -> [t / tp, heads, width]: all heads of this rank's slice of the rows."""
    size = dist.get_world_size(group)
    by_owner = all_to_all(group, x)
    return by_owner.view(size, len(x) // size, *x.shape[1:]).transpose(0, 1).flatten(1, 2)


def queries_to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[t / tp, heads, width] of every rank -> [t, heads / tp, width], the inverse of heads_to_queries."""
    size = dist.get_world_size(group)
    by_owner = x.view(len(x), size, -1, x.shape[2]).transpose(0, 1)
    return all_to_all(group, by_owner.flatten(0, 1))


def whole_weight(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[rows / tp, width] of every rank -> [rows, width]; backward adds up what the ranks' queries contributed to each shard.

    The sum is made in float32 (float64 stays) and rounded once to the parameter's dtype.
    """
    return _WholeWeight.apply(shard, group)


class _WholeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shard: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = shard.new_empty(len(shard) * dist.get_world_size(group), *shard.shape[1:])
        dist.all_gather_into_tensor(whole, shard.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
        own = wide.new_empty(len(wide) // dist.get_world_size(ctx.group), *wide.shape[1:])
        dist.reduce_scatter_tensor(own, wide, group=ctx.group)
        return own.to(grad.dtype), None
