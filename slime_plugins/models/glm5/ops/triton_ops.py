"""Interleaved RoPE and RMSNorm as one Triton kernel each, forward and backward. Same signatures and results as torch_ops."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


def rope_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """torch_ops.rope_interleaved; x may be any strided view whose last dimension is contiguous. Gradient to x only."""
    return _Rope.apply(x, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _rotate(grad, *ctx.saved_tensors, True), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Turned by the angle, or back by it (the transpose, hence the gradient)."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    wide = x if x.dim() == 3 else x[:, None]
    t, heads, d = wide.shape
    if x.numel():
        pairs = d // 2
        heads_at_once = max(1, min(triton.next_power_of_2(heads), 2048 // triton.next_power_of_2(d)))
        _rope[(t, triton.cdiv(heads, heads_at_once))](
            wide, cos.contiguous(), sin.contiguous(), out, heads, pairs, wide.stride(0), wide.stride(1),
            BACK=back, HEADS=heads_at_once, PAIRS=triton.next_power_of_2(pairs), num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _rope(
    x, cos, sin, out, heads, pairs, row_stride, head_stride, BACK: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, PAIRS)
    column = tl.arange(0, 2 * PAIRS)
    inside = (head < heads)[:, None] & (column < 2 * pairs)[None, :]
    v = tl.load(x + row * row_stride + head[:, None] * head_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(v, [HEADS, PAIRS, 2]))
    c = tl.load(cos + row * pairs + pair, mask=pair < pairs, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + row * pairs + pair, mask=pair < pairs, other=0.0).to(tl.float32)[None, :]
    if BACK:
        s = -s
    turned = tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), [HEADS, 2 * PAIRS])
    tl.store(out + (row * heads + head[:, None]) * 2 * pairs + column[None, :], turned, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch_ops.rms_norm. The gradient of weight is summed in float32 over fixed groups of rows: the same bits every time."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        out = torch.empty_like(flat)
        scale = torch.empty(len(flat), dtype=torch.float32, device=x.device)
        if len(flat):
            _norm[(len(flat),)](flat, weight, out, scale, flat.shape[1], eps, **_launch(flat.shape[1]))
        ctx.save_for_backward(flat, weight, scale)
        ctx.shape = x.shape
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        flat, weight, scale = ctx.saved_tensors
        n, d = flat.shape
        grad = grad.reshape(n, d).contiguous()
        grad_x = torch.empty_like(flat)
        groups = min(max(n, 1), 264)  # two per multiprocessor of an H100
        partial = torch.zeros(groups, d, dtype=torch.float32, device=flat.device)
        if n:
            _norm_backward[(groups,)](flat, weight, scale, grad, grad_x, partial, n, d, triton.cdiv(n, groups), **_launch(d))
        return grad_x.view(ctx.shape), partial.sum(0).to(weight.dtype), None


@triton.jit
def _norm(x, weight, out, scale, d, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    v = tl.load(x + row * d + c, mask=c < d, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(v * v, axis=0) / d + eps)
    w = tl.load(weight + c, mask=c < d, other=0.0).to(tl.float32)
    tl.store(scale + row, r)
    tl.store(out + row * d + c, v * r * w, mask=c < d)


@triton.jit
def _norm_backward(x, weight, scale, grad, grad_x, partial, n, d, rows_each, BLOCK: tl.constexpr):
    group = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    w = tl.load(weight + c, mask=c < d, other=0.0).to(tl.float32)
    of_weight = tl.zeros([BLOCK], tl.float32)
    for row in range(group * rows_each, tl.minimum((group + 1) * rows_each, n)):
        at = row.to(tl.int64) * d + c
        r = tl.load(scale + row)
        v = tl.load(x + at, mask=c < d, other=0.0).to(tl.float32) * r
        g = tl.load(grad + at, mask=c < d, other=0.0).to(tl.float32)
        of_weight += g * v
        g = g * w
        tl.store(grad_x + at, (g - v * (tl.sum(g * v, axis=0) / d)) * r, mask=c < d)
    tl.store(partial + group.to(tl.int64) * d + c, of_weight, mask=c < d)


def _launch(d: int) -> dict[str, int]:
    block = triton.next_power_of_2(d)
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 512))}
