"""What the ranks of a sparse-attention layer send each other.

The sparse core is shared inside a tensor-parallel group by heads or by queries. Every projection is split by heads; the core
gathers `topk` latent rows per query, and all heads of a query read the same ones, so a rank that holds all heads of its queries
reads each row once where head shards read it tp times. The indexer's rows may be scored by another rank than their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from slime.compat.megatron import prepare

prepare()

from megatron.core.tensor_parallel.mappings import all_to_all  # noqa: E402

from slime_plugins.models.glm5.balance import Move  # noqa: E402


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


@dataclass(frozen=True)
class Traffic:
    """What `moves` mean for one rank: which of its rows it scores, which others score, and which of theirs it scores."""

    kept: Tensor
    """int64 [k]: own rows scored here, counted within this rank's slice."""
    sent: Tensor
    """int64 [s]: own rows scored elsewhere, likewise; by scorer."""
    received: Tensor
    """int64 [r]: rows of the stream scored here for others; by owner."""
    sent_to: list[int]
    """Rows per rank of the group."""
    received_from: list[int]
    group: dist.ProcessGroup

    @staticmethod
    def of(moves: Sequence[Move], share: int, group: dist.ProcessGroup, device: torch.device) -> Traffic:
        """moves: sorted, of the whole group. share: rows of each rank's slice."""
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        out = [move for move in moves if move.owner == rank]
        come = [move for move in moves if move.scorer == rank]
        sent = _ranges(out) - rank * share
        stays = torch.ones(share, dtype=torch.bool)
        stays[sent] = False
        return Traffic(
            kept=stays.nonzero().squeeze(1).to(device),
            sent=sent.to(device),
            received=_ranges(come).to(device),
            sent_to=[sum(move.rows for move in out if move.scorer == other) for other in range(size)],
            received_from=[sum(move.rows for move in come if move.owner == other) for other in range(size)],
            group=group,
        )

    def select(
        self,
        select: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        query: Tensor,
        gates: Tensor,
        starts: Tensor,
        ends: Tensor,
        bounds: Sequence[int],
    ) -> Tensor:
        """`select(query, gates, starts, ends)` -> int32 [rows, topk] for this rank's rows, each done by its scorer.

        query [rows, H, D], gates [rows, H]: travel in one message, byte for byte. bounds: of the stream's samples.
        """
        message = torch.cat([_bytes(query[self.sent]), _bytes(gates[self.sent])], dim=1)
        arrived = self._exchange(message, self.sent_to, self.received_from)
        split = query[0].numel() * query.element_size()
        other_query = arrived[:, :split].contiguous().view(query.dtype).view(-1, *query.shape[1:])
        other_gates = arrived[:, split:].contiguous().view(gates.dtype)
        begins = torch.tensor(bounds, device=starts.device)
        other_starts = begins[torch.searchsorted(begins, self.received, right=True) - 1]
        picked = select(
            torch.cat([query[self.kept], other_query]),
            torch.cat([gates[self.kept], other_gates]),
            torch.cat([starts[self.kept], other_starts]),
            torch.cat([ends[self.kept], self.received + 1]),
        )
        whole = picked.new_empty(len(query), picked.shape[1])
        whole[self.kept] = picked[: len(self.kept)]
        whole[self.sent] = self._exchange(picked[len(self.kept) :], self.received_from, self.sent_to)
        return whole

    def _exchange(self, rows: Tensor, to: list[int], come: list[int]) -> Tensor:
        arrived = rows.new_empty(sum(come), rows.shape[1])
        dist.all_to_all_single(arrived, rows.contiguous(), come, to, group=self.group)
        return arrived


def _ranges(moves: Sequence[Move]) -> Tensor:
    return torch.cat([torch.arange(0), *(torch.arange(move.begin, move.end) for move in moves)])


def _bytes(rows: Tensor) -> Tensor:
    return rows.flatten(1).contiguous().view(torch.uint8)
