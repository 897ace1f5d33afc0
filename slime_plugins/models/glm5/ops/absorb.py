"""The two products with which MLA's absorbed form enters and leaves its core, head by head.

On a GPU they are written where they stay, without copies between them. On a CPU einsum takes less memory: products with gaps
between their rows keep buffers of the library (a training step of 49 M parameters 1.35 instead of 1.27 GB).
"""

from __future__ import annotations

import torch
from torch import Tensor


def absorbed_queries(query: Tensor, w_key: Tensor) -> Tensor:
    """[t, heads, nope + rope], [heads, nope, latent] -> [t, heads, latent + rope]: q @ W_k of each head, then its rope part."""
    if query.is_cuda:
        return AbsorbedQueries.apply(query, w_key)
    nope, rope = query.split([w_key.shape[1], query.shape[2] - w_key.shape[1]], dim=-1)
    return torch.cat([torch.einsum("thn,hnl->thl", nope, w_key), rope], dim=-1)


def released_values(out: Tensor, w_value: Tensor) -> Tensor:
    """[t, heads, latent], [heads, value, latent] -> [t, heads, value]: out @ W_v^T for each head."""
    return ReleasedValues.apply(out, w_value) if out.is_cuda else torch.einsum("thl,hvl->thv", out, w_value)


class AbsorbedQueries(torch.autograd.Function):
    """As absorbed_queries."""

    @staticmethod
    def forward(ctx, query: Tensor, w_key: Tensor) -> Tensor:
        ctx.save_for_backward(query, w_key)
        return _with_tail(query, w_key)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        query, w_key = ctx.saved_tensors
        nope, latent = w_key.shape[1:]
        # [heads, nope, t] @ [heads, t, latent]
        of_weight = torch.bmm(query[..., :nope].permute(1, 2, 0), grad[..., :latent].transpose(0, 1))
        return _with_tail(grad, w_key.transpose(1, 2)), of_weight


class ReleasedValues(torch.autograd.Function):
    """As released_values."""

    @staticmethod
    def forward(ctx, out: Tensor, w_value: Tensor) -> Tensor:
        ctx.save_for_backward(out, w_value)
        return _with_tail(out, w_value.transpose(1, 2))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        out, w_value = ctx.saved_tensors
        return _with_tail(grad, w_value), torch.bmm(grad.permute(1, 2, 0), out.transpose(0, 1))


def _with_tail(x: Tensor, weight: Tensor) -> Tensor:
    """[t, heads, a + tail], [heads, a, b] -> [t, heads, b + tail]: the products are written where they stay."""
    a, b = weight.shape[1:]
    tail = x.shape[2] - a
    made = x.new_empty(*x.shape[:2], b + tail)
    torch.bmm(x[..., :a].transpose(0, 1), weight, out=made[..., :b].transpose(0, 1))
    if tail:
        made[..., b:] = x[..., a:]
    return made
