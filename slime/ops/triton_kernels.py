"""Triton kernels behind slime.ops on CUDA: each fuses what plain torch does in several passes over memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


def quantize_blocks(matrices: Sequence[tuple[Tensor, Tensor, Tensor]], block: int, fp8_max: float, smallest: float) -> None:
    """Each weight [out, in] -> its codes [out, in] e4m3 and scale_inv, written in place; rows of both are contiguous."""
    kinds: dict[tuple[torch.dtype, bool], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for matrix in matrices:
        kinds.setdefault((matrix[0].dtype, _in_sixteens(*matrix[:2])), []).append(matrix)
    for (dtype, aligned), alike in kinds.items():
        rows = np.array(
            [(*(one.data_ptr() for one in matrix), *matrix[0].shape, matrix[0].stride(0)) for matrix in alike], dtype=np.int64
        )
        tiles = -(-rows[:, 3] // block) * -(-rows[:, 4] // block)
        table = np.concatenate([rows, (np.cumsum(tiles) - tiles)[:, None]], axis=1)
        device = alike[0][0].device
        _quantize_block[(int(tiles.sum()),)](
            torch.from_numpy(np.repeat(np.arange(len(alike), dtype=np.int32), tiles)).to(device),
            torch.from_numpy(table).to(device),
            fp8_max, smallest, SOURCE=_SOURCES[dtype], ALIGNED=aligned, BLOCK=block, num_warps=4,
        )  # fmt: skip


_SOURCES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _in_sixteens(weight: Tensor, codes: Tensor) -> bool:
    """Whether rows of weight and codes can be read and written in vectors of 16 bytes."""
    numbers = (weight.data_ptr(), codes.data_ptr(), weight.shape[1], weight.stride(0))
    return all(number % 16 == 0 for number in numbers)


@triton.jit
def _quantize_block(owners, table, fp8_max, smallest_scale, SOURCE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of one matrix. owners [tiles]: its row of table [matrices, 7]: addresses of weight, codes and scales, rows,
    columns, elements from row to row, and its first tile."""
    row = table + tl.load(owners + tl.program_id(0)).to(tl.int64) * 7
    rows, cols, row_stride = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    if ALIGNED:
        cols, row_stride = tl.multiple_of(cols, 16), tl.multiple_of(row_stride, 16)
    tile = tl.program_id(0) - tl.load(row + 6)
    tile_cols = tl.cdiv(cols, BLOCK)
    r = (tile // tile_cols) * BLOCK + tl.arange(0, BLOCK)
    c = (tile % tile_cols) * BLOCK + tl.arange(0, BLOCK)
    inside = (r < rows)[:, None] & (c < cols)[None, :]
    weight = tl.load(row).to(tl.pointer_type(SOURCE)) + (r[:, None] * row_stride + c[None, :])
    codes = tl.load(row + 1).to(tl.pointer_type(tl.float8e4nv)) + (r[:, None] * cols + c[None, :])
    if ALIGNED:
        weight, codes = tl.multiple_of(weight, [16, 16]), tl.multiple_of(codes, [16, 16])
    x = tl.load(weight, mask=inside, other=0.0).to(tl.float32)
    amax = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    scale = tl.where(amax == 0.0, 1.0, tl.maximum(tl.div_rn(amax, fp8_max), smallest_scale))
    # x / scale, correctly rounded (the same bytes as the plain-torch formula) in 3 instructions instead of a division's 10:
    # a quotient from the rounded reciprocal, corrected by its own remainder. The conversion to e4m3 saturates.
    per_scale = tl.div_rn(1.0, scale)
    y = x * per_scale
    y = tl.fma(tl.fma(-y, scale, x), per_scale, y)
    tl.store(codes, y.to(tl.float8e4nv), mask=inside)
    tl.store(tl.load(row + 2).to(tl.pointer_type(tl.float32)) + tile, scale)


def add_row_stats(
    logits: Tensor, temperature: float, local_targets: Tensor, top: Tensor, sum_exp: Tensor, sum_x_exp: Tensor, target: Tensor
) -> None:
    """One pass over logits [r, v]: running max, sum of e^(x-max), sum of x e^(x-max), x at the target.

    x = logits / temperature. The four [r] float32 states are updated in place.
    """
    rows, cols = logits.shape
    if rows and cols:
        _row_stats[(rows,)](
            logits, local_targets, top, sum_exp, sum_x_exp, target, cols, logits.stride(0), 1.0 / temperature,
            BLOCK=4096, num_warps=8,
        )  # fmt: skip


@triton.jit
def _row_stats(logits, local_targets, top, sum_exp, sum_x_exp, target, cols, row_stride, per_temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    lane = tl.arange(0, BLOCK)
    # One maximum for the row so far, not one per lane: a single exponential per logit.
    highest = tl.load(top + row)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    before = highest
    for first in range(0, cols, BLOCK):
        c = first + lane
        x = tl.load(logits + c, mask=c < cols, other=float("-inf")).to(tl.float32) * per_temperature
        new = tl.maximum(highest, tl.max(x, axis=0))
        shift = tl.where(new == float("-inf"), 0.0, new)
        rescale = tl.exp(highest - shift)
        e = tl.exp(x - shift)
        total = total * rescale + e
        weighted = weighted * rescale + tl.where(e > 0.0, x * e, 0.0)
        highest = new
    old = tl.exp(before - tl.where(highest == float("-inf"), 0.0, highest))
    tl.store(top + row, highest)
    tl.store(sum_exp + row, tl.load(sum_exp + row) * old + tl.sum(total, axis=0))
    tl.store(sum_x_exp + row, tl.load(sum_x_exp + row) * old + tl.sum(weighted, axis=0))
    at = tl.load(local_targets + row)
    held = (at >= 0) & (at < cols)
    x = tl.load(logits + at, mask=held, other=0.0).to(tl.float32) * per_temperature
    tl.store(target + row, tl.load(target + row) + x)


def grad_logits(
    logits: Tensor, grad: Tensor, temperature: float, local_targets: Tensor, lse: Tensor, entropy: Tensor,
    grad_log_prob: Tensor, grad_entropy: Tensor | None,
) -> None:  # fmt: skip
    """grad [r, v] (any float dtype; may be logits itself) = d loss / d logits, one read and one write."""
    rows, cols = logits.shape
    if rows and cols:
        has_entropy = grad_entropy is not None
        _grad_logits[(rows, triton.cdiv(cols, 4096))](
            logits, grad, local_targets, lse, entropy, grad_log_prob, grad_entropy if has_entropy else lse, cols,
            logits.stride(0), grad.stride(0), 1.0 / temperature, HAS_ENTROPY=has_entropy, BLOCK=4096, num_warps=8,
        )  # fmt: skip


@triton.jit
def _grad_logits(
    logits, grad, local_targets, lse, entropy, grad_log_prob, grad_entropy, cols, row_stride, grad_stride, per_temperature,
    HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * row_stride + c, mask=c < cols, other=0.0).to(tl.float32) * per_temperature
    log_p = x - tl.load(lse + row)
    p = tl.exp(log_p)
    g = tl.load(grad_log_prob + row)
    slope = -g
    if HAS_ENTROPY:
        slope = slope - tl.load(grad_entropy + row) * (tl.where(p > 0.0, log_p, 0.0) + tl.load(entropy + row))
    y = p * slope + tl.where(c == tl.load(local_targets + row), g, 0.0)
    tl.store(grad + row * grad_stride + c, y * per_temperature, mask=c < cols)


class WeightedSwiGLU(torch.autograd.Function):
    """silu(gate) * up * probs of gate_up [n, 2f] (gate first) -> [n, f], in float32, rounded once; probs [n] or None."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, probs: Tensor | None) -> Tensor:
        n, width = gate_up.shape
        act = gate_up.new_empty(n, width // 2)
        if n:
            block = triton.next_power_of_2(min(width // 2, 2048))
            _swiglu[(n, triton.cdiv(width // 2, block))](
                gate_up, gate_up if probs is None else probs, act, width // 2, HAS_PROBS=probs is not None, BLOCK=block
            )
        ctx.save_for_backward(gate_up, probs)
        return act

    @staticmethod
    def backward(ctx, grad_act: Tensor):
        gate_up, probs = ctx.saved_tensors
        n, width = gate_up.shape
        grad_gate_up = torch.empty_like(gate_up)
        grad_probs = None if probs is None else torch.zeros(n, dtype=torch.float32, device=probs.device)
        if n:
            block = triton.next_power_of_2(min(width // 2, 2048))
            _swiglu_backward[(n,)](
                gate_up, gate_up if probs is None else probs, grad_act.contiguous(), grad_gate_up,
                gate_up if probs is None else grad_probs, width // 2, HAS_PROBS=probs is not None, BLOCK=block,
            )  # fmt: skip
        return grad_gate_up, None if probs is None else grad_probs.to(probs.dtype)


@triton.jit
def _swiglu(gate_up, probs, act, f, HAS_PROBS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * f + c, mask=c < f, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * f + f + c, mask=c < f, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    if HAS_PROBS:
        y = y * tl.load(probs + row).to(tl.float32)
    tl.store(act + row * f + c, y, mask=c < f)


@triton.jit
def _swiglu_backward(gate_up, probs, grad_act, grad_gate_up, grad_probs, f, HAS_PROBS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if HAS_PROBS:
        weight = tl.load(probs + row).to(tl.float32)
    of_probs = tl.zeros([BLOCK], tl.float32)
    for first in range(0, f, BLOCK):
        c = first + tl.arange(0, BLOCK)
        gate = tl.load(gate_up + row * 2 * f + c, mask=c < f, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * f + f + c, mask=c < f, other=0.0).to(tl.float32)
        g = tl.load(grad_act + row * f + c, mask=c < f, other=0.0).to(tl.float32)
        s = tl.sigmoid(gate)
        silu = gate * s
        if HAS_PROBS:
            of_probs += g * silu * up
        g = g * weight
        tl.store(grad_gate_up + row * 2 * f + c, g * up * s * (1.0 + gate * (1.0 - s)), mask=c < f)
        tl.store(grad_gate_up + row * 2 * f + f + c, g * silu, mask=c < f)
    if HAS_PROBS:
        tl.store(grad_probs + row, tl.sum(of_probs, axis=0))


class Rotation(torch.autograd.Function):
    """slime.ops.rope.rotate; x may be any view whose last dimension is contiguous."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, first: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.layout = interleaved, first
        return _turned(x, cos, sin, interleaved, first, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Back by the same angle: the transpose of a rotation.
        return _turned(grad, *ctx.saved_tensors, *ctx.layout, back=True), None, None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, first: int, *, back: bool) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, heads, width = x.shape
    if x.numel():
        at_once = max(1, min(triton.next_power_of_2(heads), 2048 // triton.next_power_of_2(width)))
        _rotate[(rows, triton.cdiv(heads, at_once))](
            x, cos.contiguous(), sin.contiguous(), out, heads, width, first, cos.shape[1], x.stride(0), x.stride(1),
            BACK=back, INTERLEAVED=interleaved, HEADS=at_once, WIDTH=triton.next_power_of_2(width),
            PAIRS=triton.next_power_of_2(cos.shape[1]), num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _rotate(
    x, cos, sin, out, heads, width, first, pairs, row_stride, head_stride,
    BACK: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    source = x + row * row_stride + head[:, None] * head_stride
    target = out + (row * heads + head[:, None]) * width
    c = tl.arange(0, WIDTH)[None, :]
    passes = (head < heads)[:, None] & (c < width) & ((c < first) | (c >= first + 2 * pairs))
    tl.store(target + c, tl.load(source + c, mask=passes, other=0.0), mask=passes)
    pair = tl.arange(0, PAIRS)
    cosine = tl.load(cos + row * pairs + pair, mask=pair < pairs, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sin + row * pairs + pair, mask=pair < pairs, other=0.0).to(tl.float32)[None, :]
    if BACK:
        sine = -sine
    if INTERLEAVED:
        both = tl.arange(0, 2 * PAIRS)[None, :]
        turns = (head < heads)[:, None] & (both < 2 * pairs)
        v = tl.load(source + first + both, mask=turns, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(v, [HEADS, PAIRS, 2]))
        turned = tl.reshape(tl.join(even * cosine - odd * sine, odd * cosine + even * sine), [HEADS, 2 * PAIRS])
        tl.store(target + first + both, turned, mask=turns)
    else:
        turns = (head < heads)[:, None] & (pair < pairs)[None, :]
        near, far = first + pair[None, :], first + pairs + pair[None, :]
        even = tl.load(source + near, mask=turns, other=0.0).to(tl.float32)
        odd = tl.load(source + far, mask=turns, other=0.0).to(tl.float32)
        tl.store(target + near, even * cosine - odd * sine, mask=turns)
        tl.store(target + far, odd * cosine + even * sine, mask=turns)


def sum_rows(rows: Tensor, places: Tensor) -> Tensor:
    """[n, h], int64 [t, k] -> [t, h]: out[i] = rows[places[i, 0]] + ... in float32 in that order, rounded once."""
    out = rows.new_empty(len(places), rows.shape[1])
    if out.numel():
        block = min(triton.next_power_of_2(rows.shape[1]), 2048)
        _sum_rows[(len(places), triton.cdiv(rows.shape[1], block))](
            rows, places, out, rows.shape[1], K=places.shape[1], BLOCK=block, num_warps=4
        )
    return out


@triton.jit
def _sum_rows(rows, places, out, h, K: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        place = tl.load(places + i * K + k)
        total += tl.load(rows + place * h + c, mask=c < h, other=0.0).to(tl.float32)
    tl.store(out + i * h + c, total, mask=c < h)
