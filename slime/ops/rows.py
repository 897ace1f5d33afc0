"""Rows of tokens that go to several places, and come back summed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Order:
    """Each of t tokens in k rows of n = t k, in the order of what they go to, then of tokens.

    No size depends on values, so nothing here waits for a device.
    """

    token: Tensor
    """int64 [n]: whose row this is."""
    places: Tensor
    """int64 [t, k]: the rows of a token, ascending."""
    chosen: Tensor
    """int64 [n]: token x targets + target, the entry of the flat map that the row stands for."""

    @staticmethod
    def of(chosen: Tensor, k: int) -> Order:
        """chosen: bool [t, targets] with k true in every row; the rows of a token with fewer would be those of others."""
        t, targets = chosen.shape
        place = (chosen.t().flatten().cumsum(0) - 1).view(targets, t).t()
        # Those not chosen meet in a column more, which is cut off.
        column = (chosen.cumsum(1) - 1).masked_fill(~chosen, k)
        entry = torch.arange(t * targets, device=chosen.device).view(t, targets)
        places, entries = (
            source.new_zeros(t, k + 1).scatter_(1, column, source)[:, :k].contiguous() for source in (place, entry)
        )
        ordered = torch.empty_like(entries.view(-1)).scatter_(0, places.view(-1), entries.view(-1))
        return Order(ordered // targets, places, ordered)

    def spread(self, tokens: Tensor) -> Tensor:
        """[t, h] -> [n, h]: every token in each of its rows."""
        return _Spread.apply(tokens, self.token, self.places)

    def collect(self, rows: Tensor) -> Tensor:
        """[n, h] -> [t, h]: the sum of a token's rows in their order, at least in float32, rounded once; spread's transpose."""
        return _Collect.apply(rows, self.token, self.places)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, token: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return tokens.index_select(0, token)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _sum(grad, *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, token: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return _sum(rows, places)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None


def _sum(rows: Tensor, places: Tensor) -> Tensor:
    """out[i] = the sum of rows[places[i]]."""
    if rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16, torch.float32):
        from slime.ops.triton_kernels import sum_rows

        return sum_rows(rows.contiguous(), places)
    wide = torch.promote_types(rows.dtype, torch.float32)
    out = torch.zeros(len(places), rows.shape[1], dtype=wide, device=rows.device)
    for place in places.unbind(1):
        out += rows.index_select(0, place)
    return out.to(rows.dtype)
