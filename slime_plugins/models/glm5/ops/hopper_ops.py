"""DSA operators on Hopper: CUDA C++ kernels of this folder (csrc/), FlashMLA's forward where it is installed.

Same signatures and results as torch_ops, up to 16-bit rounding. A shape or dtype that the kernels do not take (a tiny model's) goes to
torch_ops: `takes_sparse_mla` and `takes_index_topk` say which.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import pathlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from slime.ops import cuda_build
from slime_plugins.models.glm5.ops import torch_ops

CSRC = pathlib.Path(__file__).parent / "csrc"
DK, DV = 576, 512
INDEX_HEADS, INDEX_DIM = 32, 128
WORKSPACE_BYTES = 1 << 28
"""Scores held at once by index_topk: 256 MB, whatever t and T are (at least 8 rows)."""
KEYS_PER_BLOCK = 8192
"""Keys that one block of the score kernel walks through; its 8 queries are loaded once for them."""
STAGING_BYTES = 1 << 30
"""Per-(query, key) gradients held at once by the deterministic backward."""

FlashMLA = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
_deterministic = False


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Within: the backward of sparse_mla adds each key's contributions in query order, so the same inputs give the same bits.

    For tests: it stages every contribution in float32 and is several times slower.
    """
    global _deterministic
    before, _deterministic = _deterministic, True
    try:
        yield
    finally:
        _deterministic = before


def takes_sparse_mla(q: Tensor, kv: Tensor, v_dim: int) -> bool:
    """bf16 on CUDA with the sizes of DeepSeek-V3.2 and GLM-5: rows of 576, values of 512."""
    return q.is_cuda and q.dtype == kv.dtype == torch.bfloat16 and q.shape[2] == DK and v_dim == DV


def takes_index_topk(q: Tensor, k: Tensor) -> bool:
    """bf16, or e4m3 codes, on CUDA with 32 heads of 128."""
    return q.is_cuda and q.dtype == k.dtype and q.dtype in (torch.bfloat16, torch.float8_e4m3fn) and q.shape[1:] == (32, 128)


def sparse_mla(q: Tensor, kv: Tensor, indices: Tensor, *, scale: float, v_dim: int, flash_mla: FlashMLA | None = None):
    """torch_ops.sparse_mla; `flash_mla` as returned by find_flash_mla replaces our forward."""
    if not takes_sparse_mla(q, kv, v_dim):
        return torch_ops.sparse_mla(q, kv, indices, scale=scale, v_dim=v_dim)
    return _SparseMLA.apply(q.contiguous(), kv.contiguous(), indices.to(torch.int32).contiguous(), scale, flash_mla)


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
    def backward(ctx, grad_out, _):
        q, kv, indices, out, lse = ctx.saved_tensors
        grad_q, grad_kv = sparse_mla_backward(q, kv, indices, out, lse, grad_out.contiguous(), ctx.scale)
        return grad_q, grad_kv.to(kv.dtype), None, None, None


def sparse_mla_forward(q: Tensor, kv: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Our forward: q [t, h, 576], kv [T, 576], indices [t, k] int32, all contiguous -> (out [t, h, 512] bf16, lse [t, h] float32)."""
    t, heads, _ = q.shape
    out = q.new_empty(t, heads, DV)
    lse = torch.empty(t, heads, dtype=torch.float32, device=q.device)
    with torch.cuda.device(q.device):
        cuda_build.call(_library("sparse_mla_fwd").sparse_mla_forward, q, kv, indices, out, lse, t, heads, indices.shape[1], float(scale))
    return out, lse


REDUCE, DROP, STAGE_FP32, STAGE_BF16 = range(4)
"""What the backward kernel does with a key's gradient: add it to memory, nothing (timing only), write it per (query, key)."""


def sparse_mla_backward(
    q: Tensor, kv: Tensor, indices: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """-> (grad_q [t, h, 576] bf16, grad_kv [T, 576] float32). lse in natural log; everything contiguous."""
    grad_q, grad_kv = torch.empty_like(q), torch.zeros(kv.shape, dtype=torch.float32, device=kv.device)
    with torch.cuda.device(q.device):
        permuted, delta = _prepare(kv, out, grad_out)
        if _deterministic:
            _staged_backward(q, permuted, indices, lse, delta, grad_out, scale, grad_q, grad_kv)
        else:
            _launch_backward(q, permuted, indices, lse, delta, grad_out, scale, grad_q, grad_kv, REDUCE)
    return grad_q, grad_kv


def _prepare(kv: Tensor, out: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """-> (kv with the column order that the kernel wants, delta [t, h] = sum of out * grad_out)."""
    library = _library("sparse_mla_bwd")
    permuted = torch.empty_like(kv)
    delta = torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)
    cuda_build.call(library.sparse_mla_permute_keys, kv, permuted, len(kv))
    cuda_build.call(library.sparse_mla_row_dot, out, grad_out, delta, delta.numel())
    return permuted, delta


def _launch_backward(q, permuted, indices, lse, delta, grad_out, scale, grad_q, grad_kv, store) -> None:
    t, heads, _ = q.shape
    if t:
        cuda_build.call(
            _library("sparse_mla_bwd").sparse_mla_backward,
            q, permuted, grad_out, indices, lse, delta, grad_q, grad_kv, t, heads, indices.shape[1], float(scale), store,
        )  # fmt: skip


def _staged_backward(q, permuted, indices, lse, delta, grad_out, scale, grad_q, grad_kv) -> None:
    k = indices.shape[1]
    rows_at_once = max(1, STAGING_BYTES // (k * DK * 4))
    for group in range(0, q.shape[1], 64):  # one block of heads at a time: two would write the same slots
        heads = slice(group, min(group + 64, q.shape[1]))
        parts = [x[:, heads].contiguous() for x in (q, grad_out, lse, delta)]
        grad_q_part = torch.empty_like(parts[0])
        for first in range(0, len(q), rows_at_once):
            rows = slice(first, first + rows_at_once)
            queries, d_out, lse_rows, delta_rows = (x[rows] for x in parts)
            listed = indices[rows].flatten().long()
            staged = torch.empty(len(listed), DK, dtype=torch.float32, device=q.device)
            _launch_backward(
                queries, permuted, indices[rows], lse_rows, delta_rows, d_out, scale, grad_q_part[rows], staged, STAGE_FP32
            )
            by_key, order = listed.sort(stable=True)
            begins = torch.searchsorted(by_key, torch.arange(len(grad_kv) + 1, device=q.device))
            cuda_build.call(_library("sparse_mla_bwd").sparse_mla_sum_by_key, staged, 32, order, begins, grad_kv, len(grad_kv))
        grad_q[:, heads] = grad_q_part


def index_topk(q: Tensor, k: Tensor, gates: Tensor, starts: Tensor, ends: Tensor, *, topk: int) -> Tensor:
    """torch_ops.index_topk with the products of bf16 operands accumulated in float32."""
    if not takes_index_topk(q, k) or q.dtype != torch.bfloat16:
        return torch_ops.index_topk(q, k, gates, starts, ends, topk=topk)
    return _index_topk(q, k, gates, None, starts, ends, topk)


def index_topk_fp8(q: Tensor, k: Tensor, gates: Tensor, starts: Tensor, ends: Tensor, *, topk: int) -> Tensor:
    """index_topk as SGLang's engine scores: q and k as e4m3 codes with one float32 scale per 128-vector.

    The scale of q is folded into its gate, that of k multiplies the summed score (a positive factor passes through relu).
    """
    q_codes, q_scale = quantize_vectors(q)
    k_codes, k_scale = quantize_vectors(k)
    return _index_topk(q_codes, k_codes, gates * q_scale, k_scale, starts, ends, topk)


def quantize_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes and one float32 scale per vector of the last dimension: scale = max(1e-4, amax) / 448, as SGLang's indexer."""
    wide = x.float()
    scale = wide.abs().amax(dim=-1).clamp_min(1e-4) / 448.0
    return (wide / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn), scale


@torch.no_grad()
def _index_topk(q, k, gates, key_scale, starts, ends, topk) -> Tensor:
    q, k, gates = q.contiguous(), k.contiguous(), gates.float().contiguous()
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
def find_flash_mla() -> tuple[FlashMLA | None, str]:
    """-> (a forward with the signature of sparse_mla_forward, or None; the reason). Natural-log lse, any number of heads.

    FlashMLA takes 64 or 128 heads and a multiple of 64 keys: other numbers are padded.
    """
    try:
        import sgl_kernel.flash_mla  # noqa: F401  (registers torch.ops.sgl_kernel.sparse_prefill_fwd)

        kernel = torch.ops.sgl_kernel.sparse_prefill_fwd
    except (ImportError, AttributeError, OSError) as error:
        return None, f"FlashMLA is not installed ({type(error).__name__}: {error})"

    def forward(q: Tensor, kv: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        t, heads, _ = q.shape
        padded_heads = 64 if heads <= 64 else -(-heads // 128) * 128
        padded_keys = -(-indices.shape[1] // 128) * 128
        queries = q if padded_heads == heads else torch.nn.functional.pad(q, (0, 0, 0, padded_heads - heads))
        keys = torch.nn.functional.pad(indices, (0, padded_keys - indices.shape[1]), value=-1)
        out, _, lse = kernel(queries, kv[:, None], keys[:, None].contiguous(), scale, DV, None, None)
        out, lse = out[:, :heads].contiguous(), lse[:, :heads] * 0.6931471805599453
        # A row without a valid key: FlashMLA reports +inf or -1e30 by version; ours is -inf and zeros.
        empty = (indices < 0).all(1)
        lse.masked_fill_(empty[:, None], float("-inf"))
        out.masked_fill_(empty[:, None, None], 0.0)
        return out, lse

    return forward, "FlashMLA is installed"


@functools.cache
def _library(name: str) -> ctypes.CDLL:
    return cuda_build.load(CSRC / f"{name}.cu")
