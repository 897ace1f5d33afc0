"""Grouped experts against one token at a time in float64."""

import pytest
import torch

from slime.ops.experts import grouped_swiglu


def one_token_at_a_time(x, counts, w1, w2, probs):
    expert_of = torch.repeat_interleave(torch.arange(len(counts)), counts)
    rows = []
    for i, e in enumerate(expert_of):
        gate, up = (w1[e] @ x[i]).chunk(2)
        rows.append(w2[e] @ (gate * torch.sigmoid(gate) * up) * (1 if probs is None else probs[i]))
    return torch.stack(rows) if rows else x @ w2[0].t() @ w2[0] * 0


@pytest.mark.parametrize("counts", [[3, 0, 2], [0, 0, 5], [1, 1, 1]])
@pytest.mark.parametrize("with_probs", [True, False])
def test_values_and_gradients(counts, with_probs):
    counts = torch.tensor(counts)
    n = int(counts.sum())
    x, w1, w2, probs = torch.randn(n, 6), torch.randn(3, 8, 6), torch.randn(3, 6, 4), torch.rand(n)
    leaves = [t.requires_grad_() for t in ((x, w1, w2, probs) if with_probs else (x, w1, w2))]
    direction = torch.randn(x.shape)
    got = grouped_swiglu(x, counts, w1, w2, probs if with_probs else None)
    grads = torch.autograd.grad((got * direction).sum(), leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = one_token_at_a_time(wide[0], counts, wide[1], wide[2], wide[3] if with_probs else None)
    want_grads = torch.autograd.grad((want * direction).sum(), wide)
    for g, w in zip((got, *grads), (want, *want_grads), strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-5)


def test_no_tokens_at_all_gives_zero_gradients_not_none():
    w1, w2 = torch.randn(2, 8, 6, requires_grad=True), torch.randn(2, 6, 4, requires_grad=True)
    out = grouped_swiglu(torch.zeros(0, 6), torch.tensor([0, 0]), w1, w2, torch.zeros(0))
    assert out.shape == (0, 6)
    out.sum().backward()
    assert torch.equal(w1.grad, torch.zeros_like(w1)) and torch.equal(w2.grad, torch.zeros_like(w2))


def test_counts_that_do_not_sum_to_the_rows_are_refused():
    with pytest.raises(ValueError, match="sums to 3"):
        grouped_swiglu(torch.zeros(4, 6), torch.tensor([1, 2]), torch.zeros(2, 8, 6), torch.zeros(2, 6, 4))
    with pytest.raises(ValueError, match="w1 \\[E, 2f, h\\]"):
        grouped_swiglu(torch.zeros(3, 6), torch.tensor([1, 2]), torch.zeros(2, 9, 6), torch.zeros(2, 6, 4))


def test_counts_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="sums to 5, x has 6 rows"):
        grouped_swiglu(torch.zeros(6, 4), torch.tensor([2, 3]), torch.zeros(2, 8, 4), torch.zeros(2, 4, 4))
