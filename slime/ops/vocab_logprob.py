"""Log-probability and entropy of target tokens over a vocabulary that is split over tensor-parallel ranks.

Both functions make exactly two all-reduces in the forward pass (one MAX, one SUM, each over [rows] vectors) whatever the chunk
size and also for 0 rows, and none in the backward pass, so ranks cannot disagree about the number of collectives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

VOCAB_TILE = 4096  # columns of the head computed at once by linear_log_prob
DEFAULT_ROWS = 16384  # rows at once where the caller leaves the chunk size to us: 16,384 x 4096 fp32 = 268 MB


@dataclass(frozen=True)
class Kept:
    """Words that rows are limited to: all others have probability 0, and those that are left are renormalised."""

    limited: Tensor
    """bool [t]; a row that is not limited keeps the whole vocabulary."""
    rows: Tensor
    """int64 [n], rising: of limited rows."""
    words: Tensor
    """int64 [n]: global id of one word that the row of the same index keeps."""

    def limit(self, logits: Tensor, rows: slice, first_word: int) -> Tensor:
        """logits [r, v] of `rows` and of words from `first_word` on, with -inf for words that are not kept; another tensor."""
        low, high = torch.searchsorted(self.rows, torch.tensor([rows.start, rows.stop], device=self.rows.device)).tolist()
        row, column = self.rows[low:high] - rows.start, self.words[low:high] - first_word
        here = (column >= 0) & (column < logits.shape[1])
        gone = self.limited[rows, None].expand(logits.shape).clone()
        gone[row[here], column[here]] = False
        return logits.masked_fill(gone, float("-inf"))


def vocab_parallel_log_prob(
    logits: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    temperature: float = 1.0,
    chunk_size: int = -1,
    with_entropy: bool = False,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature)[target] per row, and the entropy of the whole distribution (nats).

    logits [t, v_local]: this rank's columns, global ids vocab_start .. vocab_start + v_local. targets [t]: global ids; an id
    that no rank holds gives -logsumexp, so mask such rows. -> (log_prob [t] fp32, entropy [t] fp32 or None); float64 logits
    stay float64.
    Both outputs have gradients to logits, in the dtype of logits. Every rank of `group` must pass the same t; None means that
    v_local is the whole vocabulary. Extra memory is chunk_size x v_local fp32 (-1: all rows at once) plus a few [t] vectors.
    kept: rows whose distribution is over some words alone; their targets must be among them.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"want logits [t, v] and targets [t]; got {tuple(logits.shape)} and {tuple(targets.shape)}")
    log_prob, entropy = _VocabParallelLogProb.apply(
        logits, targets, group, vocab_start, temperature, chunk_size, with_entropy, kept
    )
    return log_prob, entropy if with_entropy else None


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    num_words: int | None = None,
    temperature: float = 1.0,
    chunk_size: int = -1,
    with_entropy: bool = False,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor | None]:
    """vocab_parallel_log_prob(hidden @ weight.T, targets) without ever holding [t, v_local] logits.

    hidden [t, h], weight [v_local, h] -> (log_prob [t] fp32, entropy [t] fp32 or None). Works through tiles of chunk_size rows
    (-1: 16,384) x 4096 columns: one product forward; one recomputation and two gradient products backward. The gradient of
    weight is accumulated in fp32 over the rows of a tile column and rounded once; that of hidden in an fp32 [t, h] buffer.
    The gradient of hidden is this rank's share: sum it over `group` (as a column-parallel linear does; reduce-scatter it under
    sequence parallelism). Temperature, targets, group, kept words and collectives as in vocab_parallel_log_prob.

    num_words: rows of weight that are words; the others pad the vocabulary, take no part and get gradient 0. None: all. A
    weight without gradient costs one product less in the backward pass.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"want hidden [t, h], weight [v, h], targets [t]; "
            f"got {tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}"
        )
    words = weight.shape[0] if num_words is None else num_words
    log_prob, entropy = _LinearLogProb.apply(
        hidden, weight, targets, group, vocab_start, words, temperature, chunk_size, with_entropy, kept
    )
    return log_prob, entropy if with_entropy else None


class _Stats:
    """Per row, over the columns seen so far: max of x, sum of e^(x-max), sum of x e^(x-max), x at the target (0 if unseen)."""

    def __init__(self, rows: int, device: torch.device, dtype: torch.dtype):
        self.max = torch.full((rows,), float("-inf"), dtype=dtype, device=device)
        self.sum_exp = torch.zeros(rows, dtype=dtype, device=device)
        self.sum_x_exp = torch.zeros_like(self.sum_exp)
        self.target = torch.zeros_like(self.sum_exp)

    def add(self, rows: slice, logits: Tensor, temperature: float, local_targets: Tensor) -> None:
        """logits [r, v] of some columns; local_targets [r], outside 0..v where the target is not in these columns."""
        if _fused(logits):
            from slime.ops import triton_kernels

            states = (self.max[rows], self.sum_exp[rows], self.sum_x_exp[rows], self.target[rows])
            triton_kernels.add_row_stats(logits, temperature, local_targets, *states)
            return
        x = logits.to(self.max.dtype, copy=True).div_(temperature)
        held = (local_targets >= 0) & (local_targets < x.shape[1])
        at_target = x.gather(1, local_targets.clamp(0, x.shape[1] - 1)[:, None])[:, 0]
        self.target[rows] += torch.where(held, at_target, 0.0)
        old_max = self.max[rows]
        new_max = torch.maximum(old_max, x.amax(dim=1))
        shift = _finite(new_max)
        rescale = torch.exp(old_max - shift)
        e = torch.exp(x - shift[:, None])
        self.sum_exp[rows] = self.sum_exp[rows] * rescale + e.sum(1)
        # A column of -inf has probability 0 and adds 0 to the entropy, not 0 * inf.
        self.sum_x_exp[rows] = self.sum_x_exp[rows] * rescale + e.mul_(x.clamp_min_(torch.finfo(x.dtype).min)).sum(1)
        self.max[rows] = new_max

    def reduce(self, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
        """-> (lse, log_prob, entropy), each [rows], over the columns of every rank."""
        top = self.max.clone()
        if group is not None:
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        shift = _finite(top)
        rescale = torch.exp(self.max - shift)
        sums = torch.stack([self.sum_exp * rescale, self.sum_x_exp * rescale, self.target])
        if group is not None:
            dist.all_reduce(sums, group=group)
        sum_exp, sum_x_exp, target = sums
        lse = shift + torch.log(sum_exp)
        return lse, target - lse, lse - sum_x_exp / sum_exp


class _VocabParallelLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, group, vocab_start, temperature, chunk_size, with_entropy, kept):
        dtype = _accumulation_dtype(logits)
        logits = logits.contiguous()
        local_targets = targets.to(torch.int64) - vocab_start
        stats = _Stats(logits.shape[0], logits.device, dtype)
        for rows in _chunks(logits.shape[0], chunk_size):
            stats.add(rows, _limited(logits[rows], kept, rows, vocab_start), temperature, local_targets[rows])
        lse, log_prob, entropy = stats.reduce(group)
        ctx.save_for_backward(logits, local_targets, lse, entropy)
        ctx.temperature, ctx.chunk_size, ctx.with_entropy = temperature, chunk_size, with_entropy
        ctx.vocab_start, ctx.kept = vocab_start, kept
        return log_prob, entropy

    @staticmethod
    def backward(ctx, grad_log_prob, grad_entropy):
        logits, local_targets, lse, entropy = ctx.saved_tensors
        grad_log_prob, grad_entropy = grad_log_prob.contiguous(), grad_entropy.contiguous()
        grad = torch.empty_like(logits)
        for rows in _chunks(logits.shape[0], ctx.chunk_size):
            slopes = (grad_log_prob[rows], grad_entropy[rows] if ctx.with_entropy else None)
            own = _limited(logits[rows], ctx.kept, rows, ctx.vocab_start)
            _grad_logits(own, grad[rows], local_targets[rows], lse[rows], entropy[rows], *slopes, ctx.temperature)
        return grad, None, None, None, None, None, None, None


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, group, vocab_start, words, temperature, chunk_size, with_entropy, kept):
        local_targets = targets.to(torch.int64) - vocab_start
        stats = _Stats(hidden.shape[0], hidden.device, _accumulation_dtype(hidden))
        for rows in _chunks(hidden.shape[0], chunk_size, DEFAULT_ROWS):
            for cols in _vocab_tiles(words):
                logits = _limited(_product(hidden[rows], weight[cols]), kept, rows, vocab_start + cols.start)
                stats.add(rows, logits, temperature, local_targets[rows] - cols.start)
        lse, log_prob, entropy = stats.reduce(group)
        ctx.save_for_backward(hidden, weight, local_targets, lse, entropy)
        ctx.words, ctx.temperature, ctx.chunk_size, ctx.with_entropy = words, temperature, chunk_size, with_entropy
        ctx.vocab_start, ctx.kept = vocab_start, kept
        return log_prob, entropy

    @staticmethod
    def backward(ctx, grad_log_prob, grad_entropy):
        hidden, weight, local_targets, lse, entropy = ctx.saved_tensors
        grad_log_prob, grad_entropy = grad_log_prob.contiguous(), grad_entropy.contiguous()
        grad_hidden = torch.zeros(hidden.shape, dtype=lse.dtype, device=hidden.device)
        trains_weight = ctx.needs_input_grad[1]
        grad_weight = torch.empty_like(weight) if trains_weight else None
        row_chunks = _chunks(hidden.shape[0], ctx.chunk_size, DEFAULT_ROWS)
        for cols in _vocab_tiles(ctx.words):
            one_chunk = len(row_chunks) == 1  # its product is the whole sum: no fp32 buffer
            if trains_weight:
                grad_tile = grad_weight[cols] if one_chunk else torch.zeros_like(weight[cols], dtype=lse.dtype)
            for rows in row_chunks:
                logits = _limited(_product(hidden[rows], weight[cols]), ctx.kept, rows, ctx.vocab_start + cols.start)
                grad_logits = torch.empty(logits.shape, dtype=hidden.dtype, device=hidden.device)
                targets = local_targets[rows] - cols.start
                slopes = (grad_log_prob[rows], grad_entropy[rows] if ctx.with_entropy else None)
                _grad_logits(logits, grad_logits, targets, lse[rows], entropy[rows], *slopes, ctx.temperature)
                del logits
                _add_product(grad_hidden[rows], grad_logits, weight[cols])
                if not trains_weight:
                    continue
                if one_chunk:
                    torch.mm(grad_logits.t(), hidden, out=grad_tile)
                else:
                    _add_product(grad_tile, grad_logits.t(), hidden[rows])
            if trains_weight and not one_chunk:
                grad_weight[cols] = grad_tile
        if trains_weight:
            grad_weight[ctx.words :] = 0
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None, None, None, None, None


def _grad_logits(logits, grad, local_targets, lse, entropy, grad_log_prob, grad_entropy, temperature) -> None:
    """grad [r, v] = d loss / d logits. With x = logits / temperature:

    d log p_target / dx_j = [j = target] - p_j;   d H / dx_j = -p_j (log p_j + H).
    """
    if _fused(logits):
        from slime.ops import triton_kernels

        triton_kernels.grad_logits(logits, grad, temperature, local_targets, lse, entropy, grad_log_prob, grad_entropy)
        return
    x = logits.to(lse.dtype, copy=True).div_(temperature)
    log_p = x.sub_(lse[:, None])
    p = torch.exp(log_p)
    slope = -grad_log_prob[:, None]
    if grad_entropy is not None:
        # log p = -inf only where p = 0, and any finite number in its place makes the product 0.
        slope = slope - grad_entropy[:, None] * (torch.where(p > 0, log_p, 0.0) + entropy[:, None])
    slopes = p.mul_(slope)
    held = (local_targets >= 0) & (local_targets < x.shape[1])
    slopes.scatter_add_(1, local_targets.clamp(0, x.shape[1] - 1)[:, None], torch.where(held, grad_log_prob, 0.0)[:, None])
    grad.copy_(slopes.div_(temperature))


def _limited(logits: Tensor, kept: Kept | None, rows: slice, first_word: int) -> Tensor:
    return logits if kept is None else kept.limit(logits, rows, first_word)


def _fused(logits: Tensor) -> bool:
    """Whether the Triton kernels take these logits: one pass over memory instead of several."""
    return logits.is_cuda and logits.dtype != torch.float64


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b [n, k].T; for 16-bit operands the fp32 accumulator itself, not rounded to 16 bits."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b.t(), out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float().t()
    return a @ b.t()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [m, n] += a [m, k] @ b [k, n], accumulated in the dtype of total (fp32 for 16-bit operands)."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += _product(a, b.t())


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _finite(x: Tensor) -> Tensor:
    """Replaces -inf (a row without a finite logit) so that x - shift is not inf - inf."""
    return torch.where(torch.isneginf(x), torch.zeros_like(x), x)


def _vocab_tiles(v_local: int) -> list[slice]:
    """Equal tiles of at most VOCAB_TILE columns, but for rounding up to 128: a narrow last tile would waste its products."""
    tiles = -(-v_local // VOCAB_TILE)
    return _chunks(v_local, min(VOCAB_TILE, -(-v_local // max(tiles, 1) // 128) * 128))


def _chunks(length: int, chunk_size: int, default: int | None = None) -> list[slice]:
    step = chunk_size if chunk_size > 0 else (default or max(length, 1))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
