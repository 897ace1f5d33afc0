"""DSA operators in plain torch: the reference for every kernel, and the answer on a CPU.

Every dimension comes from the tensors. 16-bit inputs are computed in float32, float64 stays float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 24  # floats of the largest temporary: bounds memory whatever t and T are (64 MB in float32)


def sparse_mla(q: Tensor, kv: Tensor, indices: Tensor, *, scale: float, v_dim: int) -> tuple[Tensor, Tensor]:
    """Attention of each query row over its own list of keys; all heads share one latent KV row per token.

    q [t, h, dk], kv [T, dk] (the value is its first v_dim columns), indices [t, k] int32 rows of kv, -1 = no key, in any place
    and order; a key listed twice counts twice. -> (out [t, h, v_dim] in q's dtype, lse [t, h] float32, natural log).
    Gradients to q and kv; lse has none. A row without a valid key gives out 0, lse -inf and zero gradients. Keys that no row
    lists do not matter (they may hold NaN). Memory beyond the outputs is bounded by CHUNK_ELEMENTS. An index of T or more is
    the caller's mistake: IndexError on a CPU, undefined on CUDA. Raises ValueError when the shapes disagree.
    """
    check_sparse_mla(q, kv, indices)
    return _SparseMLA.apply(q, kv, indices, scale, v_dim)


def check_sparse_mla(q: Tensor, kv: Tensor, indices: Tensor) -> None:
    """ValueError unless the shapes are those of sparse_mla: kernels take addresses from them."""
    if q.dim() != 3 or kv.dim() != 2 or indices.dim() != 2 or q.shape[2] != kv.shape[1] or len(q) != len(indices):
        raise ValueError(
            f"want q [t, h, dk], kv [T, dk], indices [t, k]; got {tuple(q.shape)}, {tuple(kv.shape)}, {tuple(indices.shape)}"
        )


class _SparseMLA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, indices, scale, v_dim):
        dtype = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty(*q.shape[:2], v_dim)
        lse = torch.empty(q.shape[:2], dtype=dtype, device=q.device)
        for rows in _row_chunks(q, indices):
            keys, _ = _gather(kv, indices[rows], dtype)
            scores = _scores(q[rows].to(dtype), keys, indices[rows], scale)
            lse[rows] = torch.logsumexp(scores, dim=-1)
            out[rows] = (_probabilities(scores, lse[rows]) @ keys[..., :v_dim]).to(q.dtype)
        ctx.save_for_backward(q, kv, indices, out, lse)
        ctx.scale, ctx.v_dim = scale, v_dim
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _):
        q, kv, indices, out, lse = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        grad_kv = torch.zeros(kv.shape, dtype=lse.dtype, device=kv.device)
        for rows in _row_chunks(q, indices):
            keys, addresses = _gather(kv, indices[rows], lse.dtype)
            queries, d_out = q[rows].to(lse.dtype), grad_out[rows].to(lse.dtype)
            p = _probabilities(_scores(queries, keys, indices[rows], ctx.scale), lse[rows])
            delta = (d_out * out[rows]).sum(-1, keepdim=True)
            d_scores = p * (d_out @ keys[..., : ctx.v_dim].transpose(1, 2) - delta) * ctx.scale
            grad_q[rows] = (d_scores @ keys).to(q.dtype)
            d_keys = d_scores.transpose(1, 2) @ queries
            d_keys[..., : ctx.v_dim] += p.transpose(1, 2) @ d_out
            # p is exactly 0 for an absent key, so what is added to the stand-in address is 0.
            grad_kv.index_add_(0, addresses.flatten(), d_keys.flatten(0, 1))
        return grad_q, grad_kv.to(kv.dtype), None, None, None


def _row_chunks(q: Tensor, indices: Tensor) -> list[slice]:
    per_row = max(1, indices.shape[1] * (q.shape[2] + q.shape[1]))
    step = max(1, CHUNK_ELEMENTS // per_row)
    return [slice(start, min(start + step, len(q))) for start in range(0, len(q), step)]


def _gather(kv: Tensor, indices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """-> (keys [t, k, dk], zeros for -1; addresses [t, k], any valid row for -1)."""
    valid = indices >= 0
    addresses = torch.where(valid, indices, 0).long()
    return torch.where(valid[..., None], kv[addresses].to(dtype), 0.0), addresses


def _scores(q: Tensor, keys: Tensor, indices: Tensor, scale: float) -> Tensor:
    return (q @ keys.transpose(1, 2) * scale).masked_fill(indices[:, None, :] < 0, float("-inf"))


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """e^(scores - lse); 0 throughout a row whose every score is -inf."""
    return torch.exp(scores - torch.where(torch.isneginf(lse), 0.0, lse)[..., None])


@torch.no_grad()
def index_topk(q: Tensor, k: Tensor, gates: Tensor, starts: Tensor, ends: Tensor, *, topk: int) -> Tensor:
    """The topk keys with the largest indexer score for each query row, as int32 [t, topk].

    q [t, H, D], k [T, D], gates [t, H] float32 (all constant factors folded in), starts and ends [t]: the keys of row i are
    starts[i] <= j < ends[i] (its packed sample, up to itself). score = sum_h gate_h * relu(q_h . k_j) in float32.
    Of equal scores the lowest position wins. Positions ascend; a row with fewer than topk keys is padded with -1 at its end.
    Streamed over rows: memory is bounded by CHUNK_ELEMENTS, keys outside a row's range may hold NaN. No gradient.
    0 <= starts and ends <= T is the caller's promise. Raises ValueError when the shapes disagree.
    """
    check_index_topk(q, k, gates, starts, ends)
    return _index_topk(q, k, gates, None, starts, ends, topk)


def check_index_topk(q: Tensor, k: Tensor, gates: Tensor, starts: Tensor, ends: Tensor) -> None:
    """ValueError unless the shapes are those of index_topk: kernels take addresses from them."""
    shapes = [tuple(x.shape) for x in (q, k, gates, starts, ends)]
    t, heads, width = shapes[0] if q.dim() == 3 else (-1, -1, -1)
    if q.dim() != 3 or k.dim() != 2 or shapes[1][1] != width or shapes[2:] != [(t, heads), (t,), (t,)]:
        raise ValueError(f"want q [t, H, D], k [T, D], gates [t, H], starts [t], ends [t]; got {shapes}")


def _index_topk(q, k, gates, key_scale, starts, ends, topk) -> Tensor:
    """index_topk; key_scale [T] multiplies the sums over heads (None: 1)."""
    t, heads, _ = q.shape
    picked = torch.full((t, topk), -1, dtype=torch.int32, device=q.device)
    step = max(1, CHUNK_ELEMENTS // max(1, heads * k.shape[0]))
    for first in range(0, t, step):
        rows = slice(first, min(first + step, t))
        low, high = int(starts[rows].min()), int(ends[rows].max())
        if high <= low:
            continue
        per_head = torch.relu(torch.einsum("thd,sd->ths", q[rows].float(), k[low:high].float()))
        scores = torch.einsum("ths,th->ts", per_head, gates[rows].float())
        if key_scale is not None:
            scores = scores * key_scale[low:high]
        position = torch.arange(low, high, device=q.device)
        own = (position >= starts[rows, None]) & (position < ends[rows, None])
        picked[rows] = select_topk(scores.masked_fill(~own, float("-inf")), own, topk, low)
    return picked


@torch.no_grad()
def index_topk_fp8(q: Tensor, k: Tensor, gates: Tensor, starts: Tensor, ends: Tensor, *, topk: int) -> Tensor:
    """index_topk as SGLang's engine scores: q and k as e4m3 codes with one float32 scale per 128-vector.

    score = scale_j * sum_h (gate_h * scale_h) * relu(q_codes_h . k_codes_j), in float32 and in this order; shapes and result as
    index_topk. The engine's own top-k leaves open which of equal scores it takes.
    """
    check_index_topk(q, k, gates, starts, ends)
    q_codes, q_scale = quantize_vectors(q)
    k_codes, k_scale = quantize_vectors(k)
    return _index_topk(q_codes, k_codes, gates * q_scale, k_scale, starts, ends, topk)


def quantize_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes [..., d] and one float32 scale [...] per vector, bit for bit as the fused indexer kernels of SGLang's engine.

    scale = max(1e-4, amax) / 448, codes = e4m3(x * (1 / scale)), every step rounded to float32. The product with the rounded
    reciprocal differs from x / scale in one code of 2,000, enough to change a selection.
    """
    wide = x.float()
    amax = wide.abs().amax(dim=-1).clamp_min(1e-4)
    # A tensor, not a number: CUDA divides by a number through its reciprocal, which rounds differently.
    scale = amax / torch.full_like(amax, 448.0)
    return (wide * scale.reciprocal()[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def index_scores(q: Tensor, k: Tensor, gates: Tensor, indices: Tensor) -> Tensor:
    """The indexer's scores of selected keys, differentiable: for a loss that trains the indexer. float32 [t, n].

    q [t, H, D], k [T, D], gates [t, H], indices [t, n] int32 with -1 = no key (score -inf, no gradient). Gradients to q, k and
    gates; keys that no row lists do not matter. Memory beyond inputs and outputs is bounded by CHUNK_ELEMENTS.
    """
    return _IndexScores.apply(q, k, gates, indices)


class _IndexScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, gates, indices):
        dtype = torch.promote_types(q.dtype, torch.float32)
        scores = torch.empty(indices.shape, dtype=dtype, device=q.device)
        for rows in _row_chunks(q, indices):
            keys, _ = _gather(k, indices[rows], dtype)
            per_head = torch.relu(q[rows].to(dtype) @ keys.transpose(1, 2))
            scores[rows] = (gates[rows].to(dtype)[:, None] @ per_head)[:, 0].masked_fill(indices[rows] < 0, float("-inf"))
        ctx.save_for_backward(q, k, gates, indices)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, gates, indices = ctx.saved_tensors
        grad_q, grad_gates = torch.empty_like(q), torch.empty_like(gates)
        grad_k = torch.zeros(k.shape, dtype=grad.dtype, device=k.device)
        for rows in _row_chunks(q, indices):
            keys, addresses = _gather(k, indices[rows], grad.dtype)
            queries, slope = q[rows].to(grad.dtype), grad[rows].masked_fill(indices[rows] < 0, 0.0)
            products = queries @ keys.transpose(1, 2)
            grad_gates[rows] = (torch.relu(products) @ slope[..., None])[..., 0].to(gates.dtype)
            d_products = torch.where(products > 0, gates[rows].to(grad.dtype)[..., None] * slope[:, None], 0.0)
            grad_q[rows] = (d_products @ keys).to(q.dtype)
            grad_k.index_add_(0, addresses.flatten(), (d_products.transpose(1, 2) @ queries).flatten(0, 1))
        return grad_q, grad_k.to(k.dtype), grad_gates, None


def select_topk(scores: Tensor, own: Tensor, topk: int, first_position: int) -> Tensor:
    """int32 [t, topk]: ascending positions (column + first_position) of the best own columns, -1 last; ties by key order."""
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :topk]
    outside = torch.iinfo(torch.int32).max
    positions = torch.where(own.gather(1, best), best + first_position, outside).sort(dim=1).values
    positions = torch.where(positions == outside, -1, positions).to(torch.int32)
    return torch.nn.functional.pad(positions, (0, topk - positions.shape[1]), value=-1)
