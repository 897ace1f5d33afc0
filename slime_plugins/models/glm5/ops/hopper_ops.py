"""DSA operators on Hopper: CUDA C++ kernels of this folder (csrc/), and FlashMLA's forward where it is asked for.

Same signatures and results as torch_ops, up to 16-bit rounding. A shape or dtype that the kernels do not take (a tiny model's)
goes to torch_ops: `takes_sparse_mla` and `takes_index_topk` say which.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import pathlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slime.ops import cuda_build
from slime_plugins.models.glm5.ops import torch_ops
from slime_plugins.models.glm5.ops.flash_mla import Forward

CSRC = pathlib.Path(__file__).parent / "csrc"
DK, DV = 576, 512
INDEX_HEADS, INDEX_DIM = 32, 128
WORKSPACE_BYTES = 1 << 28
"""Scores held at once by index_topk: 256 MB, whatever t and T are (at least 8 rows)."""
KEYS_PER_BLOCK = 8192
"""Keys that one block of the score kernel walks through; its 8 queries are loaded once for them."""
STAGING_BYTES = 5_000_000_000
"""Per-(query, key) gradients held at once by the backward: 2112 queries of top-k 2048; half as many, and so on, where memory is
short."""

_deterministic = False


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Within: the backward of sparse_mla adds each key's contributions in query order; the same inputs give the same bits.

    torch.use_deterministic_algorithms(True) asks for the same.
    """
    global _deterministic
    before, _deterministic = _deterministic, True
    try:
        yield
    finally:
        _deterministic = before


def _in_order() -> bool:
    return _deterministic or torch.are_deterministic_algorithms_enabled()


def takes_sparse_mla(q: Tensor, kv: Tensor, v_dim: int) -> bool:
    """bf16 on CUDA with the sizes of DeepSeek-V3.2 and GLM-5: rows of 576, values of 512."""
    return q.is_cuda and q.dtype == kv.dtype == torch.bfloat16 and q.shape[2] == DK and v_dim == DV


def takes_index_topk(q: Tensor, k: Tensor) -> bool:
    """bf16 on CUDA with 32 heads of 128."""
    return q.is_cuda and q.dtype == k.dtype == torch.bfloat16 and q.shape[1:] == (INDEX_HEADS, INDEX_DIM)


def sparse_mla(q: Tensor, kv: Tensor, indices: Tensor, *, scale: float, v_dim: int, flash_mla: Forward | None = None):
    """torch_ops.sparse_mla; `flash_mla` as returned by flash_mla.find replaces our forward."""
    torch_ops.check_sparse_mla(q, kv, indices)
    if not takes_sparse_mla(q, kv, v_dim):
        return torch_ops.sparse_mla(q, kv, indices, scale=scale, v_dim=v_dim)
    return _SparseMLA.apply(_rows(q), _rows(kv), _rows(indices.to(torch.int32)), scale, flash_mla)


def _rows(x: Tensor) -> Tensor:
    """x contiguous at a multiple of 16 bytes, as the kernels' loads want it."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


class _SparseMLA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, indices, scale, flash_mla):
        forward = sparse_mla_forward if flash_mla is None else flash_mla
        out, lse = forward(q, kv, indices, scale)
        ctx.save_for_backward(q, kv, indices, out, lse)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _):
        q, kv, indices, out, lse = ctx.saved_tensors
        grad_q, grad_kv = sparse_mla_backward(q, kv, indices, out, lse, _rows(grad_out), ctx.scale)
        return grad_q, grad_kv.to(kv.dtype), None, None, None


def sparse_mla_forward(q: Tensor, kv: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Our forward, everything contiguous, indices int32 -> (out [t, h, 512] bf16, lse [t, h] float32)."""
    t, heads, _ = q.shape
    out = q.new_empty(t, heads, DV)
    lse = torch.empty(t, heads, dtype=torch.float32, device=q.device)
    taken = torch.empty(1, dtype=torch.int32, device=q.device)
    with torch.cuda.device(q.device):
        library = _library("sparse_mla_fwd")
        cuda_build.call(library.sparse_mla_forward, q, kv, indices, out, lse, taken, t, heads, indices.shape[1], float(scale))
    return out, lse


REDUCE, DROP, STAGE = range(3)
"""What the backward kernel does with a key's gradient: add it to memory, nothing (for timing), write it per (query, key)."""


def sparse_mla_backward(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, scale: float, *, store: int = STAGE
) -> tuple[Tensor, Tensor]:
    """-> (grad_q [t, h, 576] bf16, grad_kv [T, 576] float32). lse in natural log; everything contiguous.

    STAGE writes every (query, key) contribution in bf16 (STAGING_BYTES at a time) and then sums them by key; REDUCE adds them
    to grad_kv in float32 as they come and needs no such memory.
    """
    grad_q, grad_kv = torch.empty_like(q), torch.zeros(kv.shape, dtype=torch.float32, device=kv.device)
    with torch.cuda.device(q.device):
        inputs = _prepare(q, kv, indices, out, lse, grad_out, scale)
        if store == STAGE or _in_order():
            _staged_backward(inputs, grad_q, grad_kv)
        else:
            # Ascending: blocks that run side by side then reduce into keys that lie side by side, in the L2 cache.
            inputs = dataclasses.replace(inputs, indices=indices.sort(dim=1).values)
            _launch_backward(inputs, grad_q, grad_kv, REDUCE)
    return grad_q, grad_kv


@dataclasses.dataclass(frozen=True)
class _BackwardInputs:
    q: Tensor
    kv: Tensor
    """[T, 576] with the column order that the kernel wants."""
    grad_out: Tensor
    indices: Tensor
    lse: Tensor
    delta: Tensor
    """[t, h] sum over columns of out * grad_out."""
    scale: float

    def part(self, rows: slice, heads: slice) -> _BackwardInputs:
        of_both = {name: getattr(self, name)[rows, heads].contiguous() for name in ("q", "grad_out", "lse", "delta")}
        return dataclasses.replace(self, indices=self.indices[rows], **of_both)


def _prepare(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, scale: float
) -> _BackwardInputs:
    library = _library("sparse_mla_bwd")
    permuted = torch.empty_like(kv)
    delta = torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)
    cuda_build.call(library.sparse_mla_permute_keys, kv, permuted, len(kv))
    cuda_build.call(library.sparse_mla_row_dot, out, grad_out, delta, delta.numel())
    return _BackwardInputs(q, permuted, grad_out, indices, lse, delta, scale)


def _launch_backward(x: _BackwardInputs, grad_q: Tensor, grad_kv: Tensor, store: int) -> None:
    t, heads, _ = x.q.shape
    if t:
        cuda_build.call(
            _library("sparse_mla_bwd").sparse_mla_backward,
            x.q, x.kv, x.grad_out, x.indices, x.lse, x.delta, grad_q, grad_kv,
            t, heads, x.indices.shape[1], float(x.scale), store,
        )  # fmt: skip


def _staged_backward(x: _BackwardInputs, grad_q: Tensor, grad_kv: Tensor) -> None:
    t, heads, _ = x.q.shape
    staged, rows_at_once = _staging(x)
    for first in range(0, t, rows_at_once):
        rows = slice(first, min(first + rows_at_once, t))
        order, ends = _places_by_key(x.indices[rows], len(grad_kv))
        for first_head in range(0, heads, 64):  # one block of heads at a time: two would write the same places
            group = slice(first_head, min(first_head + 64, heads))
            part = x.part(rows, group)
            grad_q_part = grad_q[rows] if heads <= 64 else torch.empty_like(part.q)
            _launch_backward(part, grad_q_part, staged, STAGE)
            if heads > 64:
                grad_q[rows, group] = grad_q_part
            cuda_build.call(_library("sparse_mla_bwd").sparse_mla_sum_by_key, staged, order, ends, grad_kv, len(grad_kv))


def _staging(x: _BackwardInputs) -> tuple[Tensor, int]:
    """-> (room for the contributions of some queries, their number: a multiple of the multiprocessors, each works on one)."""
    row_bytes = max(1, x.indices.shape[1]) * DK * 2
    wave = torch.cuda.get_device_properties(x.q.device).multi_processor_count
    # Where the sums are cut decides their last bits: a deterministic run must not cut by how much memory happens to be free.
    rows = max(1, (STAGING_BYTES // 4 if _in_order() else STAGING_BYTES) // row_bytes)
    while True:
        rows = rows // wave * wave or rows
        here = max(1, min(rows, len(x.q)))
        try:
            return torch.empty(here * x.indices.shape[1], DK, dtype=torch.bfloat16, device=x.q.device), here
        except torch.OutOfMemoryError:
            if _in_order() or rows == 1:
                raise
            rows = max(1, rows // 2)


def _places_by_key(indices: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """-> (places of each key in the flat indices, key by key; where each key's places end)."""
    flat = indices.reshape(-1)
    library = _library("sparse_mla_bwd")
    counts = torch.zeros(keys, dtype=torch.int32, device=indices.device)
    cuda_build.call(library.sparse_mla_count_keys, flat, flat.numel(), counts)
    ends = counts.cumsum(0, dtype=torch.int32)
    if _in_order():
        # Places of -1 last, where no key's range reaches.
        order = torch.where(flat < 0, keys, flat).sort(stable=True).indices.to(torch.int32)
    else:
        order = torch.empty(flat.numel(), dtype=torch.int32, device=indices.device)
        cuda_build.call(library.sparse_mla_place_keys, flat, flat.numel(), ends - counts, order)
    return order, ends


def index_topk(q: Tensor, k: Tensor, gates: Tensor, starts: Tensor, ends: Tensor, *, topk: int) -> Tensor:
    """torch_ops.index_topk with the products of bf16 operands accumulated in float32."""
    torch_ops.check_index_topk(q, k, gates, starts, ends)
    if not takes_index_topk(q, k):
        return torch_ops.index_topk(q, k, gates, starts, ends, topk=topk)
    return _index_topk(q, k, gates, None, starts, ends, topk)


def index_topk_fp8(q: Tensor, k: Tensor, gates: Tensor, starts: Tensor, ends: Tensor, *, topk: int) -> Tensor:
    """torch_ops.index_topk_fp8 with FP8 products: scales of q are folded into the gates, those of k multiply the sums."""
    torch_ops.check_index_topk(q, k, gates, starts, ends)
    if not takes_index_topk(q, k):
        return torch_ops.index_topk_fp8(q, k, gates, starts, ends, topk=topk)
    q_codes, q_scale = torch_ops.quantize_vectors(q)
    k_codes, k_scale = torch_ops.quantize_vectors(k)
    return _index_topk(q_codes, k_codes, gates * q_scale, k_scale, starts, ends, topk)


@torch.no_grad()
def _index_topk(q, k, gates, key_scale, starts, ends, topk) -> Tensor:
    q, k, gates = _rows(q), _rows(k), _rows(gates.float())
    starts, ends = starts.to(torch.int32).contiguous(), ends.to(torch.int32).contiguous()
    t, keys = len(q), len(k)
    picked = torch.empty(t, topk, dtype=torch.int32, device=q.device)
    stride = -(-max(keys, 1) // 4) * 4
    rows_at_once = min(max(8, WORKSPACE_BYTES // (4 * stride) // 8 * 8), max(t, 1))
    scores = torch.empty(rows_at_once, stride, dtype=torch.float32, device=q.device)
    library = _library("indexer")
    with torch.cuda.device(q.device):
        for first in range(0, t, rows_at_once):
            rows = slice(first, min(first + rows_at_once, t))
            count = rows.stop - first
            cuda_build.call(
                library.indexer_scores, q[rows], k, gates[rows], key_scale, starts[rows], ends[rows], scores,
                count, keys, stride, KEYS_PER_BLOCK, int(key_scale is not None),
            )  # fmt: skip
            cuda_build.call(library.indexer_select, scores, stride, starts[rows], ends[rows], count, topk, picked[rows])
    return picked


@functools.cache
def _library(name: str) -> ctypes.CDLL:
    return cuda_build.load(CSRC / f"{name}.cu")
