"""What every implementation of the DSA operators promises. One body for two sides: torch_ops on the CPU with narrow rows,
and the Hopper kernels on a GPU with GLM-5.2's widths. What they are compared with is written out here, dense and in float64.

Inputs are fresh at every run. Bounds are on |got - want| / |want| (Frobenius): float32 sums of float32 operands on the CPU,
of bf16 operands on the GPU.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch

from slime_plugins.models.glm5.ops import torch_ops


@dataclass(frozen=True)
class Side:
    ops: ModuleType
    device: str
    dtype: torch.dtype
    dk: int
    dv: int
    heads: tuple[int, ...]
    index_heads: int
    index_dim: int
    out_bound: float
    grad_bound: float
    selection_bound: float
    """How far below the k-th best score a selected one may lie, over the largest: sums in another order."""
    fp8_bound: float

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def side(request) -> Side:
    if request.param == "cpu":
        return Side(torch_ops, "cpu", torch.float32, 12, 10, (3,), 3, 16, 1e-5, 1e-5, 1e-6, 1e-6)
    from slime.ops import cuda_build

    obstacle = cuda_build.why_not()
    if obstacle is not None:
        pytest.skip(obstacle)
    from slime_plugins.models.glm5.ops import hopper_ops

    # Hopper's FP8 products keep about 14 bits while they sum.
    return Side(hopper_ops, "cuda", torch.bfloat16, 576, 512, (16, 40, 64, 128), 32, 128, 4e-3, 6e-3, 1e-6, 1e-3)


@pytest.fixture
def poisoned(monkeypatch):
    """Every tensor that is made without values starts as NaN, or as an integer that is no address."""

    def filled(make):
        def made(*arguments, **options):
            tensor = make(*arguments, **options)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30)

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def packed(side: Side, lengths: list[int], t: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (starts, ends) of the last t positions of packed samples; of three or more the second has no key."""
    position = torch.arange(sum(lengths) - t, sum(lengths), device=side.device)
    cuts = torch.tensor([0, *lengths], device=side.device).cumsum(0)
    starts, ends = cuts[torch.searchsorted(cuts, position, right=True) - 1], position + 1
    if t > 2:
        ends[1] = starts[1]
    return starts, ends


def listed(starts: torch.Tensor, ends: torch.Tensor, k: int) -> torch.Tensor:
    """[t, k] int32: for each row up to k of its keys in random order and places, some twice, -1 elsewhere."""
    width = (ends - starts)[:, None]
    picks = (torch.rand(len(starts), k, device=starts.device) * width).long() + starts[:, None]
    holes = torch.rand(len(starts), k, device=starts.device) < torch.rand(len(starts), 1, device=starts.device)
    return torch.where(holes | (width == 0), -1, picks).int()


def dense_attention(q, kv, indices, grad, scale, dv):
    """-> (out, lse, grad_q, grad_kv) in float64 from scores of every row with every key, weighted by how often it is listed."""
    q, kv, grad = q.double(), kv.double(), grad.double()
    counts = torch.zeros(len(q), len(kv) + 1, dtype=torch.float64, device=q.device)
    counts.scatter_add_(1, torch.where(indices < 0, len(kv), indices).long(), torch.ones_like(indices, dtype=torch.float64))
    counts = counts[:, None, :-1]
    scores = torch.einsum("thd,sd->ths", q, kv) * scale
    top = torch.where(counts > 0, scores, -torch.inf).amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    weight = counts * torch.exp((scores - top).clamp_max(0.0))
    total = weight.sum(-1, keepdim=True)
    p = weight / total.where(total > 0, 1.0)
    out = p @ kv[:, :dv]
    d_scores = p * (grad @ kv[:, :dv].T - (out * grad).sum(-1, keepdim=True)) * scale
    grad_kv = torch.einsum("ths,thd->sd", d_scores, q)
    grad_kv[:, :dv] += torch.einsum("ths,thd->sd", p, grad)
    return out, (top + torch.log(total))[..., 0], d_scores @ kv, grad_kv


LENGTHS = [([1], 1, 64), ([5, 1, 70, 30], 106, 64), ([3000, 1, 500], 40, 192), ([1 << 20], 3, 128)]


@pytest.mark.parametrize("lengths,t,k", LENGTHS)
def test_sparse_attention_and_its_gradients_are_those_of_dense_attention(side, poisoned, lengths, t, k):
    for heads in side.heads if t < 50 and side.device == "cuda" else side.heads[:1]:
        starts, ends = packed(side, lengths, t)
        indices = listed(starts, ends, k)
        q, kv = side.random(t, heads, side.dk), side.random(sum(lengths) + 7, side.dk)
        grad = side.random(t, heads, side.dv)
        own = torch.zeros(len(kv), dtype=torch.bool, device=side.device)
        own[indices[indices >= 0].long()] = True
        known = torch.where(own[:, None], kv, 0.0)
        kv = torch.where(own[:, None], kv, torch.nan)  # a key that nobody lists may hold anything
        want = dense_attention(q, known, indices, grad, 0.3 / side.dk**0.5, side.dv)

        q.requires_grad_(), kv.requires_grad_()
        out, lse = side.ops.sparse_mla(q, kv, indices, scale=0.3 / side.dk**0.5, v_dim=side.dv)
        grads = torch.autograd.grad(out, (q, kv), grad)
        empty = (indices < 0).all(1)
        assert torch.equal(lse.isneginf(), empty[:, None].expand_as(lse)) and not out[empty].any() and not grads[0][empty].any()
        assert not grads[1][~own].any()
        if own.any():
            assert error(out, want[0]) < side.out_bound
            torch.testing.assert_close(lse[~empty].double(), want[1][~empty], rtol=0, atol=1e-4)
            # One key a row: the softmax is constant and the gradient to q a difference of equal numbers.
            assert lengths == [1] or error(grads[0], want[2]) < side.grad_bound
            assert error(grads[1], want[3]) < side.grad_bound


def best_by_hand(scores: np.ndarray, start: int, end: int, topk: int) -> list[int]:
    """The topk columns start <= j < end with the largest scores, of equal ones the first, ascending, -1 behind them."""
    order = np.argsort(-scores[start:end], kind="stable")[:topk]
    return sorted(int(j) + start for j in order) + [-1] * (topk - len(order))


INDEX_LENGTHS = [([1], 1, 64), ([5, 1, 70, 30], 106, 16), ([70], 9, 256), ([20, 9000], 20, 512), ([1 << 20], 3, 2048)]


@pytest.mark.parametrize("lengths,t,topk", INDEX_LENGTHS)
@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
def test_selection_with_exact_scores_is_the_reference_to_the_last_tie(side, poisoned, lengths, t, topk, fp8):
    starts, ends = packed(side, lengths, t)
    heads, dim, keys = side.index_heads, side.index_dim, sum(lengths) + 7
    gates = torch.randint(-2, 4, (t, heads), device=side.device).float()
    q = torch.zeros(t, heads, dim, device=side.device)
    q.scatter_(2, torch.randint(0, dim, (t, heads, 2), device=side.device), 1.0)
    k = torch.randint(-1, 2, (keys, dim), device=side.device).float()
    k[:, 0] = 1.0  # no vector of zeros: its scale would be the smallest one
    k *= 2.0 ** torch.randint(-2, 3, (keys, 1), device=side.device)
    if fp8:
        q, k = 448 * q, 448 * k  # scales of q are 1 and those of k powers of two: nothing is rounded
    scores = torch.einsum("th,ths->ts", gates.double(), torch.relu(torch.einsum("thd,sd->ths", q.double(), k.double())))
    k[: int(starts.min())], k[sum(lengths) :] = torch.nan, torch.nan
    select = side.ops.index_topk_fp8 if fp8 else side.ops.index_topk
    picked = select(q.to(side.dtype), k.to(side.dtype), gates, starts, ends, topk=topk)
    assert picked.dtype == torch.int32 and picked.shape == (t, topk)
    for row, own, start, end in zip(scores.cpu().numpy(), picked.tolist(), starts.tolist(), ends.tolist(), strict=True):
        assert own == best_by_hand(row, start, end, topk)


@pytest.mark.parametrize("lengths,t,topk", INDEX_LENGTHS)
@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
def test_selection_of_random_vectors_has_no_key_that_the_formula_would_not_choose(side, poisoned, lengths, t, topk, fp8):
    starts, ends = packed(side, lengths, t)
    q, k = side.random(t, side.index_heads, side.index_dim), side.random(sum(lengths) + 7, side.index_dim)
    gates = torch.randn(t, side.index_heads, device=side.device)

    def as_scored(x: torch.Tensor) -> torch.Tensor:
        if not fp8:
            return x.double()
        wide = x.cpu().float()  # where a division by a number is one
        scale = wide.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448
        codes = (wide * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
        return (codes.double() * scale.double()).to(x.device)

    scores = torch.einsum("th,ths->ts", gates.double(), torch.relu(torch.einsum("thd,sd->ths", as_scored(q), as_scored(k))))
    k[: int(starts.min())], k[sum(lengths) :] = torch.nan, torch.nan
    select = side.ops.index_topk_fp8 if fp8 else side.ops.index_topk
    picked = select(q, k, gates, starts, ends, topk=topk)
    bound = side.fp8_bound if fp8 else side.selection_bound
    for row, own, start, end in zip(scores, picked.long(), starts.tolist(), ends.tolist(), strict=True):
        count = min(topk, end - start)
        own, rest = own[:count], own[count:]
        assert (rest == -1).all() and (own >= start).all() and (own < end).all() and (own.diff() > 0).all()
        if count:
            assert row[start:end].topk(count).values[-1] - row[own].min() <= bound * row[start:end].abs().max()


def test_no_rows_give_empty_results_and_zero_gradients(side, poisoned):
    q = side.random(0, 16, side.dk).requires_grad_()
    kv = side.random(9, side.dk).requires_grad_()
    out, lse = side.ops.sparse_mla(q, kv, torch.zeros(0, 64, dtype=torch.int32, device=side.device), scale=0.1, v_dim=side.dv)
    grads = torch.autograd.grad(out.sum(), (q, kv))
    assert out.shape == (0, 16, side.dv) and lse.shape == (0, 16) and grads[0].shape == q.shape and not grads[1].any()
    none = torch.zeros(0, dtype=torch.int64, device=side.device)
    for select in (side.ops.index_topk, side.ops.index_topk_fp8):
        for keys in (9, 0):
            k = side.random(keys, side.index_dim)
            picked = select(
                side.random(0, side.index_heads, side.index_dim),
                k,
                none.float()[:, None].expand(0, side.index_heads),
                none,
                none,
                topk=8,
            )
            assert picked.shape == (0, 8)


def test_views_give_the_bits_of_their_copies(side):
    """Strided, broadcast, and at an address that is no multiple of 16 bytes."""

    def view(*shape: int) -> torch.Tensor:
        return side.random(shape[0], *[n + 1 for n in shape[1:]])[(slice(None), *[slice(1, None)] * (len(shape) - 1))]

    def shifted(*shape: int) -> torch.Tensor:
        flat = side.random(1 + int(np.prod(shape)))
        return flat[1:].view(shape)

    indices = torch.randint(-1, 90, (12, 130), dtype=torch.int32, device=side.device)[:, ::2]
    for made in (view, shifted):
        q, kv, grad = made(12, 16, side.dk), made(90, side.dk), side.random(16, side.dv)
        results = []
        for q_, kv_, indices_, grad_ in (
            (q, kv, indices, grad.expand(12, -1, -1)),
            (q.clone(), kv.clone(), indices.clone(), grad.repeat(12, 1, 1)),
        ):
            q_, kv_ = q_.detach().requires_grad_(), kv_.detach().requires_grad_()
            with getattr(side.ops, "deterministic", contextlib.nullcontext)():
                out, lse = side.ops.sparse_mla(q_, kv_, indices_, scale=0.1, v_dim=side.dv)
                results.append((out, lse, *torch.autograd.grad(out, (q_, kv_), grad_)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        q, k = made(12, side.index_heads, side.index_dim), made(90, side.index_dim)
        gates, bounds = (
            made(12, side.index_heads),
            torch.stack([torch.zeros(12), torch.full((12,), 90)], 1).long().to(side.device),
        )
        for select in (side.ops.index_topk, side.ops.index_topk_fp8):
            copies = [x.clone() for x in (q, k, gates, bounds[:, 0], bounds[:, 1])]
            assert torch.equal(select(q, k, gates, bounds[:, 0], bounds[:, 1], topk=20), select(*copies, topk=20))


def test_shapes_that_disagree_are_refused_before_anything_is_read(side):
    q, kv, indices = (
        side.random(4, 16, side.dk),
        side.random(9, side.dk),
        torch.zeros(4, 8, dtype=torch.int32, device=side.device),
    )
    for wrong in ((q, kv[:, :-1], indices), (q, kv, indices[:3]), (q, kv[None], indices), (q, kv, indices[0])):
        with pytest.raises(ValueError, match="want q"):
            side.ops.sparse_mla(*wrong, scale=0.1, v_dim=side.dv)
    q, k = side.random(4, side.index_heads, side.index_dim), side.random(9, side.index_dim)
    gates, ends = torch.ones(4, side.index_heads, device=side.device), torch.ones(4, dtype=torch.int64, device=side.device)
    right = (q, k, gates, ends, ends)
    for place, part in ((1, k[:, :-1]), (2, gates[:3]), (3, ends[:3]), (4, ends[:3])):
        wrong = [part if i == place else x for i, x in enumerate(right)]
        for select in (side.ops.index_topk, side.ops.index_topk_fp8):
            with pytest.raises(ValueError, match="want q"):
                select(*wrong, topk=4)
