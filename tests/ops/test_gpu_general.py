"""The CUDA paths of slime.ops against plain torch in float64; fresh random inputs at every run."""

import pytest
import torch

from slime.model.layers import rms_norm
from slime.ops import experts, fp8
from slime.ops.rope import rotate
from slime.ops.rows import Order
from slime.ops.vocab_logprob import linear_log_prob, vocab_parallel_log_prob

pytestmark = pytest.mark.gpu


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("shape", [(1, 1), (576, 200), (130, 257), (4096, 6144)])
def test_quantiser_writes_the_bytes_of_the_cpu_into_a_flat_bucket(shape):
    weight = (torch.randn(shape) * torch.logspace(-4, 3, shape[1])).bfloat16()
    if shape[0] > 300:
        weight[128:256] = 0
    want_codes, want_scales = fp8.quantize_reference(weight)
    bucket = torch.full((weight.numel() + 4 * want_scales.numel() + 16,), 0x7F, dtype=torch.uint8, device="cuda")
    scale_at = -(-weight.numel() // 16) * 16
    codes = bucket[: weight.numel()].view(torch.float8_e4m3fn).view(shape)
    scales = bucket[scale_at : scale_at + 4 * want_scales.numel()].view(torch.float32).view(want_scales.shape)
    fp8.quantize_blockwise_into(weight.cuda(), codes, scales)
    assert torch.equal(codes.view(torch.uint8).cpu(), want_codes.view(torch.uint8))
    assert torch.equal(scales.cpu(), want_scales)
    assert (bucket[scale_at + 4 * want_scales.numel() :] == 0x7F).all()


def test_many_matrices_are_quantised_at_once_to_the_bytes_of_each_alone():
    """Partial tiles, rows of another matrix, addresses that no vector load can take, and both dtypes of weights."""
    wide = torch.randn(300, 1024, device="cuda").bfloat16()
    weights = [wide[:, 128:640], wide[:, 3:100]]
    assert [weight.stride(0) for weight in weights] == [1024, 1024] and weights[1].data_ptr() % 16
    weights += [tensor.cuda() for tensor in (torch.zeros(128, 256).bfloat16(), torch.randn(5, 640), torch.randn(0, 16))]
    for shape in ((1, 1), (130, 257), (2048, 6144)):
        weights.append((torch.randn(shape) * torch.logspace(-4, 3, shape[1])).bfloat16().cuda())
    rooms = [
        (torch.empty(weight.shape, dtype=fp8.FP8, device="cuda"), torch.empty(fp8.scale_shape(weight.shape), device="cuda"))
        for weight in weights
    ]
    fp8.quantize_many([(weight, *room) for weight, room in zip(weights, rooms, strict=True)])
    for weight, (codes, scales) in zip(weights, rooms, strict=True):
        want_codes, want_scales = fp8.quantize_reference(weight.cpu())
        assert torch.equal(codes.view(torch.uint8).cpu(), want_codes.view(torch.uint8)), weight.shape
        assert torch.equal(scales.cpu(), want_scales), weight.shape


def test_log_prob_with_targets_of_another_rank_and_a_broadcast_gradient():
    logits = torch.randn(300, 1000, device="cuda").bfloat16().requires_grad_()
    targets = torch.randint(0, 2000, (300,), device="cuda")  # this rank holds 500 .. 1500
    options = dict(vocab_start=500, temperature=0.7, chunk_size=128, with_entropy=True)
    log_prob, entropy = vocab_parallel_log_prob(logits, targets, **options)
    (grad,) = torch.autograd.grad(log_prob.sum() + entropy.sum(), logits)
    wide = logits.detach().double().requires_grad_()
    x, local = wide / 0.7, targets - 500
    held = (local >= 0) & (local < 1000)
    want = torch.where(held, x.gather(1, local.clamp(0, 999)[:, None])[:, 0], 0.0) - torch.logsumexp(x, -1)
    log_p = torch.log_softmax(x, -1)
    want_entropy = -(log_p.exp() * log_p).sum(-1)
    (want_grad,) = torch.autograd.grad(want.sum() + want_entropy.sum(), wide)
    assert error(log_prob, want) < 1e-6 and error(entropy, want_entropy) < 1e-6 and error(grad, want_grad) < 4e-3


@pytest.mark.parametrize("chunk_size", [-1, 128])
def test_fused_head(chunk_size):
    hidden = torch.randn(300, 256, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(9000, 256, device="cuda") / 16).bfloat16().requires_grad_()
    targets, slopes = torch.randint(0, 9000, (300,), device="cuda"), torch.randn(2, 300, device="cuda")
    log_prob, entropy = linear_log_prob(hidden, weight, targets, temperature=0.7, chunk_size=chunk_size, with_entropy=True)
    grads = torch.autograd.grad((slopes[0] * log_prob + slopes[1] * entropy).sum(), (hidden, weight))
    wide = [v.detach().double().requires_grad_() for v in (hidden, weight)]
    log_p = torch.log_softmax(wide[0] @ wide[1].T / 0.7, -1)
    want, want_entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    want_grads = torch.autograd.grad((slopes[0] * want + slopes[1] * want_entropy).sum(), wide)
    assert error(log_prob, want) < 1e-6 and error(entropy, want_entropy) < 1e-6
    for got, right in zip(grads, want_grads, strict=True):
        assert error(got, right) < 4e-3


@pytest.mark.parametrize("counts", [[3, 0, 200, 17], [0, 0, 0, 64], [1, 1, 1, 1], [0, 0, 0, 0]])
def test_experts(counts):
    """Relative errors over 16 draws together: those of four numbers alone scatter too much to be bounded tightly."""
    off, size = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for _ in range(16):
        found, wanted = experts_and_gradients(counts)
        off += torch.stack([(got.double().cpu() - want).square().sum() for got, want in zip(found, wanted, strict=True)])
        size += torch.stack([want.square().sum() for want in wanted])
    if sum(counts) == 0:
        assert not off.any() and not size.any()
        return
    assert (off < 6e-3**2 * size).all()


def experts_and_gradients(counts, device="cuda"):
    """(output, gradients of x, both weights, probabilities) of fresh random inputs: in bf16, and in float64 on the CPU."""
    n = sum(counts)
    x, grad = torch.randn(n, 128, device=device).bfloat16(), torch.randn(n, 128, device=device).bfloat16()
    w1 = (torch.randn(4, 256, 128, device=device) / 11).bfloat16()
    w2 = (torch.randn(4, 128, 128, device=device) / 11).bfloat16()
    leaves = [v.requires_grad_() for v in (x, w1, w2, torch.rand(n, device=device))]
    wide = [v.detach().double().cpu().requires_grad_() for v in leaves]
    results = []
    for inputs, slopes in ((leaves, grad), (wide, grad.double().cpu())):
        out = experts.grouped_swiglu(inputs[0], torch.tensor(counts), *inputs[1:])
        results.append((out.detach(), *torch.autograd.grad(out, inputs, slopes)))
    return results


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("width", "first", "pairs"), [(256, 192, 32), (64, 0, 32), (576, 512, 32), (128, 0, 24), (80, 7, 20)])
def test_rotation_of_a_view_with_its_gradient(interleaved, width, first, pairs):
    angle = torch.rand(300, pairs, device="cuda") * 6
    x = torch.randn(300, 5, width + 8, device="cuda").bfloat16()[..., 8:].requires_grad_()
    grad = torch.randn(300, 5, width, device="cuda").bfloat16()
    out = rotate(x, angle.cos(), angle.sin(), interleaved=interleaved, first=first)
    got = (out, *torch.autograd.grad(out, x, grad))
    wide = x.detach().double().requires_grad_()
    right = rotate(wide, angle.double().cos(), angle.double().sin(), interleaved=interleaved, first=first)
    want = (right, *torch.autograd.grad(right, wide, grad.double()))
    for mine, theirs in zip(got, want, strict=True):
        assert error(mine, theirs) < 3e-3
        assert torch.equal(mine[..., :first].double(), theirs[..., :first])
        assert torch.equal(mine[..., first + 2 * pairs :].double(), theirs[..., first + 2 * pairs :])


@pytest.mark.parametrize("width", [100, 512, 6144])
def test_rms_norm_with_gradients_that_repeat(width):
    x = torch.randn(1001, width, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(width, device="cuda").bfloat16().requires_grad_()
    grad = torch.randn(1001, width, device="cuda").bfloat16()
    runs = [torch.autograd.grad(rms_norm(x, weight, 1e-5), (x, weight), grad) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    wide = [v.detach().double().requires_grad_() for v in (x, weight)]
    want = wide[0] / (wide[0].square().mean(-1, keepdim=True) + 1e-5).sqrt() * wide[1]
    for mine, right in zip(
        (rms_norm(x, weight, 1e-5), *runs[0]), (want, *torch.autograd.grad(want, wide, grad.double())), strict=True
    ):
        assert error(mine, right) < 3e-3


@pytest.mark.parametrize(("t", "targets", "k", "width"), [(301, 16, 8, 6144), (64, 256, 8, 100), (1, 2, 1, 2049)])
def test_rows_of_tokens_are_those_of_the_cpu_to_the_bit(t, targets, k, width):
    chosen = torch.zeros(t, targets, dtype=torch.bool).scatter_(1, torch.rand(t, targets).topk(k).indices, True)
    here, there = Order.of(chosen, k), Order.of(chosen.cuda(), k)
    for name in ("token", "places", "chosen"):
        assert torch.equal(getattr(here, name), getattr(there, name).cpu())
    rows = torch.randn(t * k, width).bfloat16()
    assert torch.equal(here.collect(rows), there.collect(rows.cuda()).cpu())
    tokens = torch.randn(t, width).bfloat16().cuda().requires_grad_()
    (back,) = torch.autograd.grad(there.spread(tokens), tokens, rows.cuda())
    assert torch.equal(back.cpu(), here.collect(rows))
