"""The plain-torch DSA operators against dense formulas in float64."""

import pytest
import torch

from slime_plugins.models.glm5.ops import get_ops, torch_ops


def packed_indices(lengths, k):
    """[t, k] int32: for each row of packed samples random positions of its own sample up to itself, shuffled, -1 elsewhere."""
    rows, start = [], 0
    for length in lengths:
        for i in range(length):
            some = torch.randperm(i + 1)[: k - 1] + start
            row = torch.full((k,), -1)
            row[torch.randperm(k)[: len(some)]] = some
            rows.append(row)
        start += length
    return torch.stack(rows).to(torch.int32)


def dense_attention(q, kv, indices, scale, v_dim):
    """Attention over all T keys with a mask counting how often each key is listed; float64, [t, h, T] in full."""
    q, kv = q.double(), kv.double()
    counts = torch.zeros(len(q), len(kv), dtype=torch.float64)
    for row, listed in zip(counts, indices, strict=True):
        for j in listed[listed >= 0]:
            row[j] += 1
    scores = torch.einsum("thd,sd->ths", q, kv) * scale + torch.log(counts)[:, None, :]
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - torch.where(lse.isneginf(), 0.0, lse)[..., None])
    return torch.einsum("ths,sd->thd", p, kv[:, :v_dim]), lse


@pytest.mark.parametrize("chunk_elements", [1 << 24, 1])  # all rows at once; one row at a time
def test_sparse_mla_is_masked_dense_attention(monkeypatch, chunk_elements):
    monkeypatch.setattr(torch_ops, "CHUNK_ELEMENTS", chunk_elements)
    indices = packed_indices([9, 1, 14], k=8)
    indices[5] = -1
    indices[7, :2] = indices[7].max()  # a key listed several times
    q = torch.randn(24, 3, 12, requires_grad=True)
    kv = torch.randn(24, 12, requires_grad=True)
    direction = torch.randn(24, 3, 10)
    out, lse = torch_ops.sparse_mla(q, kv, indices, scale=0.3, v_dim=10)
    grads = torch.autograd.grad((out * direction).sum(), (q, kv))
    want, want_lse = dense_attention(q, kv, indices, 0.3, 10)
    others = [i for i in range(24) if i != 5]  # autograd through logsumexp of a row of -inf gives NaN
    want_others, _ = dense_attention(q[others], kv, indices[others], 0.3, 10)
    want_grads = torch.autograd.grad((want_others * direction[others]).sum(), (q, kv))
    for g, w in zip((out, lse, *grads), (want, want_lse, *want_grads), strict=True):
        torch.testing.assert_close(g.double(), w.double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(out[5], torch.zeros(3, 10)) and torch.equal(grads[0][5], torch.zeros(3, 12)) and lse[5].isneginf().all()


def test_sparse_mla_gradcheck():
    indices = packed_indices([3, 2], k=3)
    q = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)
    kv = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, kv: torch_ops.sparse_mla(q, kv, indices, scale=0.5, v_dim=3)[0], (q, kv))


def test_sparse_mla_never_reads_what_no_row_lists():
    indices = packed_indices([12], k=6)
    indices[indices == 0] = -1
    q, kv = torch.randn(12, 2, 8, requires_grad=True), torch.randn(12, 8)
    kv[0] = float("nan")
    kv.requires_grad_()
    out, _ = torch_ops.sparse_mla(q, kv, indices, scale=1.0, v_dim=8)
    out.sum().backward()
    assert out.isfinite().all() and q.grad.isfinite().all() and kv.grad.isfinite().all()
    assert torch.equal(kv.grad[0], torch.zeros(8))


def test_a_second_derivative_is_refused_not_guessed():
    q, kv = torch.randn(3, 2, 4, requires_grad=True), torch.randn(5, 4)
    indices = torch.randint(0, 5, (3, 4), dtype=torch.int32)
    out, _ = torch_ops.sparse_mla(q, kv, indices, scale=1.0, v_dim=3)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_sparse_mla_refuses_shapes_that_disagree():
    with pytest.raises(ValueError, match="want q"):
        torch_ops.sparse_mla(torch.zeros(2, 1, 8), torch.zeros(4, 9), torch.zeros(2, 3, dtype=torch.int32), scale=1.0, v_dim=8)


def topk_by_hand(q, k, gates, starts, ends, topk):
    """One row at a time in float64, Python's stable sort by descending score."""
    picked = []
    for i in range(len(q)):
        scores = {
            j: sum(g * max(0.0, float(head @ k[j])) for g, head in zip(gates[i].tolist(), q[i], strict=True))
            for j in range(int(starts[i]), int(ends[i]))
        }
        best = sorted(sorted(scores, key=lambda j: -scores[j])[:topk])
        picked.append(best + [-1] * (topk - len(best)))
    return torch.tensor(picked, dtype=torch.int32)


@pytest.mark.parametrize("topk", [4, 7, 40])
@pytest.mark.parametrize("chunk_elements", [1 << 24, 1])
def test_index_topk_on_packed_samples_with_ties(monkeypatch, topk, chunk_elements):
    monkeypatch.setattr(torch_ops, "CHUNK_ELEMENTS", chunk_elements)
    lengths = [5, 1, 20]
    starts = torch.repeat_interleave(torch.tensor([0, 5, 6]), torch.tensor(lengths))
    ends = torch.arange(26) + 1
    ends[8] = starts[8]  # a row without any key
    # Small integers: sums are exact in any precision, and equal scores are frequent (relu gives many zeros).
    q, k = torch.randint(-2, 3, (26, 3, 4)).double(), torch.randint(-2, 3, (26, 4)).double()
    gates = torch.randint(-1, 3, (26, 3)).double()
    got = torch_ops.index_topk(q.float(), k.float(), gates.float(), starts, ends, topk=topk)
    assert torch.equal(got, topk_by_hand(q, k, gates, starts, ends, topk))


def test_index_scores_are_those_that_select_and_have_their_gradients():
    q, k, gates = torch.randn(6, 3, 4).double(), torch.randn(9, 4).double(), torch.randn(6, 3).double()
    indices = packed_indices([4, 2], k=5)
    indices[4] = -1
    got = torch_ops.index_scores(q, k, gates, indices)
    every = torch.einsum("th,ths->ts", gates, torch.einsum("thd,sd->ths", q, k).clamp_min(0))
    assert got[indices < 0].isneginf().all()
    torch.testing.assert_close(got[indices >= 0], every.gather(1, indices.clamp_min(0).long())[indices >= 0])
    leaves = [x.requires_grad_() for x in (q, k, gates)]
    assert torch.autograd.gradcheck(lambda *x: torch_ops.index_scores(*x, indices).masked_fill(indices < 0, 0.0), leaves)


def test_index_topk_fp8_selects_by_the_dequantised_vectors():
    q, k, gates = torch.randn(6, 2, 16), torch.randn(40, 16) * torch.logspace(-2, 1, 40)[:, None], torch.randn(6, 2)
    k[3] = 1e-6  # below the smallest scale
    starts, ends = torch.zeros(6, dtype=torch.int64), torch.arange(35, 41)

    def through_fp8(x):
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448
        return (x / scale).to(torch.float8_e4m3fn).double() * scale.double()

    want = topk_by_hand(through_fp8(q), through_fp8(k), gates.double(), starts, ends, 9)
    assert torch.equal(torch_ops.index_topk_fp8(q, k, gates, starts, ends, topk=9), want)


def test_index_topk_does_not_see_keys_outside_a_rows_range():
    q, k, gates = torch.randn(6, 2, 4), torch.randn(6, 4), torch.rand(6, 2)
    starts, ends = torch.zeros(6, dtype=torch.int64), torch.arange(6) + 1
    k[5] = float("nan")
    got = torch_ops.index_topk(q[:5], k, gates[:5], starts[:5], ends[:5], topk=3)
    assert torch.equal(got, torch_ops.index_topk(q[:5], k[:5], gates[:5], starts[:5], ends[:5], topk=3))


def test_the_choice_on_a_cpu_is_plain_torch_made_once_and_says_why(caplog):
    get_ops.cache_clear()
    with caplog.at_level("DEBUG", logger="slime_plugins.models.glm5.ops"):
        ops = get_ops("cpu")
        assert get_ops("cpu") is ops
    assert ops.sparse_mla is torch_ops.sparse_mla and ops.index_topk is torch_ops.index_topk
    assert [r.message for r in caplog.records] == ["DSA operators: plain torch (device cpu)"]
