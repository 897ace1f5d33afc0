"""Hopper DSA kernels against torch_ops in float32 on the same device: fresh random inputs at every run, poisoned memory.

Bounds are on |got - want| / |want| (Frobenius). bf16 operands with float32 sums give 2e-3 to 3e-3.
"""

import pytest
import torch

from slime_plugins.models.glm5.ops import flash_mla, get_ops, torch_ops

pytestmark = pytest.mark.gpu

SCALE = 256**-0.5


@pytest.fixture(scope="module")
def hopper():
    from slime.ops import cuda_build

    obstacle = cuda_build.why_not()
    if obstacle is not None:
        pytest.skip(obstacle)
    from slime_plugins.models.glm5.ops import hopper_ops

    return hopper_ops


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def poison():
    """Fills memory that the next allocations will reuse with NaN."""
    blocks = [torch.full((1 << n,), float("nan"), device="cuda") for n in (8, 12, 16, 20, 24, 28)]
    del blocks


def attention_inputs(t, heads, keys, k, holes):
    """Causal random keys near the end of a stream; `holes` of the list is -1. Row 1 lists nothing, row 2 its first 64 places.

    Keys that nobody lists are NaN in kv and 0 in the reference's copy.
    """
    q = torch.randn(t, heads, 576, device="cuda").bfloat16()
    kv = torch.randn(keys, 576, device="cuda").bfloat16()
    grad = torch.randn(t, heads, 512, device="cuda").bfloat16()
    positions = torch.arange(keys - t, keys, device="cuda")
    indices = (torch.rand(t, k, device="cuda") * (positions[:, None] + 1)).int()
    indices = torch.where(torch.rand(t, k, device="cuda") < holes, -1, indices)
    indices[1] = -1
    indices[2, 64:] = -1
    listed = torch.zeros(keys, dtype=torch.bool, device="cuda")
    listed[indices[indices >= 0].long()] = True
    reference_kv = torch.where(listed[:, None], kv.float(), 0.0)
    kv[~listed] = float("nan")
    return q, kv, reference_kv, indices, grad, listed


ATTENTION_SHAPES = [
    (5, 64, 300, 64, 0.0), (33, 16, 1000, 192, 0.3), (20, 128, 3000, 512, 0.1), (17, 40, 2000, 100, 0.5),
    (3, 64, 70, 2048, 0.0),
]  # fmt: skip


@pytest.mark.parametrize("t,heads,keys,k,holes", ATTENTION_SHAPES)
@pytest.mark.parametrize("store", ["STAGE", "REDUCE"])
def test_sparse_mla_forward_and_backward(hopper, t, heads, keys, k, holes, store):
    q, kv, reference_kv, indices, grad, listed = attention_inputs(t, heads, keys, k, holes)
    q_ref, kv_ref = q.float().requires_grad_(), reference_kv.requires_grad_()
    want, want_lse = torch_ops.sparse_mla(q_ref, kv_ref, indices, scale=SCALE, v_dim=512)
    want.backward(grad.float())

    poison()
    out, lse = hopper.sparse_mla_forward(q, kv, indices, SCALE)
    assert error(out, want) < 4e-3
    assert torch.equal(lse.isneginf(), want_lse.isneginf())
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-4)
    assert torch.equal(out[1], torch.zeros_like(out[1])) and lse[1].isneginf().all()

    poison()
    grad_q, grad_kv = hopper.sparse_mla_backward(q, kv, indices, out, lse, grad, SCALE, store=getattr(hopper, store))
    assert error(grad_q, q_ref.grad) < 6e-3
    assert error(grad_kv, kv_ref.grad) < 6e-3
    assert torch.equal(grad_q[1], torch.zeros_like(grad_q[1]))
    assert torch.equal(grad_kv[~listed], torch.zeros_like(grad_kv[~listed]))


@pytest.mark.parametrize("heads,k", [(64, 640), (16, 330), (100, 128)])
def test_forward_of_more_rows_than_multiprocessors_whose_lists_end_anywhere(hopper, heads, k):
    """A block takes one row after the other; the next row's keys, Q and length arrive while it works on this one."""
    rows = 700
    q, kv, reference_kv, indices, _, _ = attention_inputs(rows, heads, 3000, k, 0.2)
    lengths = torch.randint(0, k + 1, (rows, 1), device="cuda")
    indices[torch.arange(k, device="cuda") >= lengths] = -1
    want, want_lse = torch_ops.sparse_mla(q.float(), reference_kv, indices, scale=SCALE, v_dim=512)
    for _ in range(3):
        poison()
        out, lse = hopper.sparse_mla_forward(q, kv, indices, SCALE)
        assert error(out, want) < 4e-3
        torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-4)
        empty = (indices < 0).all(1)
        assert empty.any() and torch.equal(out[empty], torch.zeros_like(out[empty]))


def test_forward_whose_later_keys_score_higher_and_higher(hopper):
    """The running maximum is raised again and again, by both warpgroups."""
    q, kv, _, indices, _, _ = attention_inputs(200, 64, 4000, 1024, 0.0)
    kv = (torch.randn(4000, 576, device="cuda") * torch.linspace(0, 4, 4000, device="cuda")[:, None]).bfloat16()
    indices = indices.sort(dim=1).values
    want, want_lse = torch_ops.sparse_mla(q.float(), kv.float(), indices, scale=SCALE, v_dim=512)
    assert want_lse[5:].mean() > 12  # in nats: the slack of 8 in log2 is passed
    out, lse = hopper.sparse_mla_forward(q, kv, indices, SCALE)
    assert error(out, want) < 6e-3
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("whose", ["ours", "flashmla"])
def test_sparse_mla_through_autograd_with_the_chosen_operators(whose):
    device = torch.device("cuda", torch.cuda.current_device())
    if whose == "flashmla" and flash_mla.find(device)[1] is None:
        with pytest.raises(RuntimeError, match="--dsa-attention-forward flashmla: no FlashMLA: flash_mla: "):
            get_ops("cuda", whose)
        return
    q, kv, reference_kv, indices, grad, _ = attention_inputs(40, 64, 900, 256, 0.2)
    q.requires_grad_(), kv.requires_grad_()
    out, _ = get_ops("cuda", whose).sparse_mla(q, kv, indices, scale=SCALE, v_dim=512)
    out.backward(grad)
    q_ref, kv_ref = q.detach().float().requires_grad_(), reference_kv.requires_grad_()
    torch_ops.sparse_mla(q_ref, kv_ref, indices, scale=SCALE, v_dim=512)[0].backward(grad.float())
    assert error(q.grad, q_ref.grad) < 6e-3 and error(kv.grad, kv_ref.grad) < 6e-3


def test_sparse_mla_of_a_tiny_model_goes_to_plain_torch():
    q = torch.randn(6, 4, 32, device="cuda").bfloat16()
    kv = torch.randn(9, 32, device="cuda").bfloat16()
    indices = torch.randint(-1, 9, (6, 5), device="cuda", dtype=torch.int32)
    got, _ = get_ops("cuda").sparse_mla(q, kv, indices, scale=0.2, v_dim=16)
    want, _ = torch_ops.sparse_mla(q.float(), kv.float(), indices, scale=0.2, v_dim=16)
    assert error(got, want) < 4e-3


def test_deterministic_backward_gives_the_same_bits_twice_with_a_crowded_key(hopper, monkeypatch):
    monkeypatch.setattr(hopper, "STAGING_BYTES", 4 * 512 * 576 * 2 * 40)  # several parts
    q, kv, reference_kv, indices, grad, _ = attention_inputs(130, 64, 2000, 512, 0.1)
    indices[3:, 0] = 0  # one key that nearly every row lists
    kv[0], reference_kv[0] = 0.5, 0.5
    out, lse = hopper.sparse_mla_forward(q, kv, indices, SCALE)
    with hopper.deterministic():
        first = hopper.sparse_mla_backward(q, kv, indices, out, lse, grad, SCALE)
        second = hopper.sparse_mla_backward(q, kv, indices, out, lse, grad, SCALE)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    kv_ref = reference_kv.requires_grad_()
    torch_ops.sparse_mla(q.float(), kv_ref, indices, scale=SCALE, v_dim=512)[0].backward(grad.float())
    assert error(first[1], kv_ref.grad) < 6e-3


def test_flash_mla_gives_the_same_forward(hopper):
    _, forward, finding = flash_mla.find(torch.device("cuda", torch.cuda.current_device()))
    if forward is None:
        pytest.skip(finding)
    q, kv, reference_kv, indices, _, _ = attention_inputs(30, 40, 2000, 192, 0.2)
    poison()
    out, lse = forward(q, kv, indices, SCALE)
    want, want_lse = torch_ops.sparse_mla(q.float(), reference_kv, indices, scale=SCALE, v_dim=512)
    assert error(out, want) < 4e-3
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-4)


def index_inputs(t, keys, lengths):
    q = torch.randn(t, 32, 128, device="cuda").bfloat16()
    k = torch.randn(keys, 128, device="cuda").bfloat16()
    gates = torch.randn(t, 32, device="cuda")
    ends = torch.randint(1, keys + 1, (t,), device="cuda").sort().values
    cuts = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    starts = cuts[torch.searchsorted(cuts, ends - 1, right=True) - 1]
    ends[2] = starts[2]  # a row without any key
    return q, k, gates, starts, ends


def check_selection(picked, q, k, gates, starts, ends, topk, tolerance, key_scale=None):
    """Every row: the right number of ascending own keys, then -1; the worst taken score is the k-th best up to `tolerance`."""
    for i, row in enumerate(picked):
        start, end = int(starts[i]), int(ends[i])
        count = max(0, min(topk, end - start))
        assert (row[count:] == -1).all()
        own = row[:count].long()
        if count == 0:
            continue
        assert own[0] >= start and own[-1] < end and (own[1:] > own[:-1]).all()
        scores = gates[i].double() @ torch.relu(q[i].double() @ k[start:end].double().T)
        if key_scale is not None:
            scores = scores * key_scale[start:end]
        worst_taken = scores[own - start].min()
        assert scores.topk(count).values[-1] - worst_taken <= tolerance * scores.abs().max()


@pytest.mark.parametrize(
    "t,keys,topk,lengths",
    [(50, 3000, 256, [1000, 2000]), (9, 70, 64, [70]), (13, 20001, 2048, [1, 20000]), (64, 9000, 2048, [9000])],
)
def test_index_topk_bf16_and_fp8(hopper, t, keys, topk, lengths):
    q, k, gates, starts, ends = index_inputs(t, keys, lengths)
    poison()
    check_selection(hopper.index_topk(q, k, gates, starts, ends, topk=topk), q, k, gates, starts, ends, topk, 1e-6)
    poison()
    picked = hopper.index_topk_fp8(q, k, gates, starts, ends, topk=topk)
    q_codes, q_scale = torch_ops.quantize_vectors(q)
    k_codes, k_scale = torch_ops.quantize_vectors(k)
    # Hopper's FP8 products keep about 14 bits while they sum.
    check_selection(picked, q_codes.float(), k_codes.float(), gates * q_scale, starts, ends, topk, 1e-3, k_scale)


@pytest.mark.parametrize("repeated", ["some", "nearly all"])
def test_index_topk_breaks_ties_by_key_order(hopper, repeated):
    # Small integers: every sum is exact, so the reference's selection is the only right one.
    q = torch.randint(-2, 3, (40, 32, 128), device="cuda").bfloat16()
    k = torch.randint(-2, 3, (9000, 128), device="cuda").bfloat16()
    gates = torch.randint(-1, 3, (40, 32), device="cuda").float()
    if repeated == "some":
        k[100:400] = k[100]
    else:
        k[:] = k[0]
        k[::7] *= 2
    starts = torch.randint(0, 50, (40,), device="cuda")
    ends = torch.randint(7000, 9001, (40,), device="cuda")
    want = torch_ops.index_topk(q, k, gates, starts, ends, topk=512)
    assert torch.equal(hopper.index_topk(q, k, gates, starts, ends, topk=512), want)


def test_index_topk_of_scores_that_differ_in_their_last_bits(hopper):
    q, _, gates, _, _ = index_inputs(10, 100, [100])
    base = torch.randn(128, device="cuda")
    k = (base + 1e-3 * torch.randn(20000, 128, device="cuda")).bfloat16()
    starts, ends = torch.zeros(10, device="cuda", dtype=torch.int64), torch.full((10,), 20000, device="cuda")
    check_selection(hopper.index_topk(q, k, gates.abs(), starts, ends, topk=2048), q, k, gates.abs(), starts, ends, 2048, 1e-6)


def test_index_topk_ignores_nan_outside_a_rows_keys(hopper):
    q, k, gates, _, _ = index_inputs(16, 5000, [5000])
    starts, ends = torch.full((16,), 1003, device="cuda"), torch.full((16,), 4001, device="cuda")
    want = hopper.index_topk(q, k, gates, starts, ends, topk=512)
    k[:1003], k[4001:] = float("nan"), float("nan")
    assert torch.equal(hopper.index_topk(q, k, gates, starts, ends, topk=512), want)


def test_index_topk_at_a_million_keys_needs_linear_memory(hopper):
    keys = 1 << 20
    q, k, gates, starts, ends = index_inputs(300, keys, [keys])
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    picked = hopper.index_topk(q, k, gates, starts, ends, topk=2048)
    extra = torch.cuda.max_memory_allocated() - base
    assert extra < hopper.WORKSPACE_BYTES + 16e6  # all scores at once would be 1.26 GB
    few = torch.arange(0, 300, 60, device="cuda")
    check_selection(picked[few], q[few], k, gates[few], starts[few], ends[few], 2048, 1e-6)
