"""Log-probability and entropy against torch's own softmax over the whole vocabulary, in float64."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from allocations import peak_bytes

from slime.ops import vocab_logprob
from slime.ops.vocab_logprob import Kept, linear_log_prob, vocab_parallel_log_prob


def dense(logits, targets, temperature):
    log_p = torch.log_softmax(logits.double() / temperature, dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("chunk_size", [-1, 1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_are_those_of_a_dense_softmax(chunk_size, temperature):
    logits = (torch.randn(7, 50) * 4).requires_grad_()
    targets = torch.randint(50, (7,))
    weights = torch.randn(2, 7)
    got = vocab_parallel_log_prob(logits, targets, temperature=temperature, chunk_size=chunk_size, with_entropy=True)
    (grad,) = torch.autograd.grad((weights[0] * got[0] + weights[1] * got[1]).sum(), logits)
    want = dense(logits, targets, temperature)
    (want_grad,) = torch.autograd.grad((weights[0] * want[0] + weights[1] * want[1]).sum(), logits)
    for g, w in zip((*got, grad), (*want, want_grad), strict=True):
        torch.testing.assert_close(g.double(), w.double(), rtol=1e-5, atol=1e-5)


def test_gradcheck_in_float64():
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(9, (4,))
    assert torch.autograd.gradcheck(
        lambda x: vocab_parallel_log_prob(x, targets, temperature=0.7, chunk_size=3, with_entropy=True), logits
    )
    hidden = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_log_prob(h, w, targets, temperature=0.7, chunk_size=3, with_entropy=True), (hidden, weight)
    )


def test_masked_columns_have_probability_zero_and_no_nan():
    logits = torch.randn(3, 6)
    logits[:, 4:] = float("-inf")
    logits.requires_grad_()
    targets = torch.tensor([0, 1, 3])
    log_prob, entropy = vocab_parallel_log_prob(logits, targets, with_entropy=True)
    (grad,) = torch.autograd.grad((log_prob + entropy).sum(), logits)
    want = dense(logits[:, :4].detach(), targets, 1.0)
    torch.testing.assert_close(log_prob.double(), want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), want[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(grad[:, 4:], torch.zeros(3, 2)) and grad.isfinite().all()


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_fused_head_equals_the_dense_head(monkeypatch, dtype, tolerance):
    monkeypatch.setattr(vocab_logprob, "VOCAB_TILE", 16)  # several tiles at test size
    hidden = torch.randn(11, 24).to(dtype).requires_grad_()
    weight = torch.randn(70, 24).to(dtype).requires_grad_()
    targets = torch.randint(70, (11,))
    weights = torch.randn(2, 11)
    got = linear_log_prob(hidden, weight, targets, temperature=1.3, chunk_size=4, with_entropy=True)
    grads = torch.autograd.grad((weights[0] * got[0] + weights[1] * got[1]).sum(), (hidden, weight))
    want = dense(hidden.double() @ weight.double().t(), targets, 1.3)
    want_grads = torch.autograd.grad((weights[0] * want[0] + weights[1] * want[1]).sum(), (hidden, weight))
    for g, w in zip((*got, *grads), (*want, *want_grads), strict=True):
        assert (g.double() - w.double()).norm() <= tolerance * w.double().norm()
    assert got[0].dtype == torch.float32


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match="want logits"):
        vocab_parallel_log_prob(torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="want hidden"):
        linear_log_prob(torch.zeros(3, 4), torch.zeros(9, 5), torch.zeros(3, dtype=torch.long))


def _rank_of_two(rank, port, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(6, 8), torch.randn(10, 8), torch.tensor([0, 9, 4, 5, 3, 7])
    loss_weights = torch.randn(2, 6)
    cut = [slice(0, 4), slice(4, 10)][rank]  # unequal shards
    out = {}
    shard = weight[cut].clone().requires_grad_()
    h = hidden.clone().requires_grad_()
    options = dict(group=dist.group.WORLD, vocab_start=cut.start, chunk_size=4, with_entropy=True)
    for name, (log_prob, entropy) in {
        "logits": vocab_parallel_log_prob(h @ shard.t(), targets, **options),
        "linear": linear_log_prob(h, shard, targets, **options),
    }.items():
        grad_h, grad_w = torch.autograd.grad((loss_weights[0] * log_prob + loss_weights[1] * entropy).sum(), (h, shard))
        dist.all_reduce(grad_h)
        out[name] = [log_prob.detach(), entropy.detach(), grad_h, grad_w]
    # Words of either rank, and of one alone.
    kept = Kept(torch.arange(6) > 0, torch.tensor([1, 1, 2, 3, 4, 4, 5, 5]), torch.tensor([9, 0, 4, 5, 3, 8, 7, 6]))
    limited, _ = linear_log_prob(h, shard, targets, **options, kept=kept)
    out["kept"] = [limited.detach()]
    # 0 rows: the collectives still run and gradients are zeros.
    none, _ = linear_log_prob(h[:0], shard, targets[:0], group=dist.group.WORLD, vocab_start=cut.start)
    out["empty"] = [torch.autograd.grad(none.sum(), shard)[0]]
    torch.save(out, f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_with_unequal_shards_give_the_whole_vocabularys_numbers(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_rank_of_two, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))

    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(6, 8), torch.randn(10, 8), torch.tensor([0, 9, 4, 5, 3, 7])
    hidden.requires_grad_(), weight.requires_grad_()
    loss_weights = torch.randn(2, 6)
    log_prob, entropy = dense(hidden.double() @ weight.double().t(), targets, 1.0)
    grad_h, grad_w = torch.autograd.grad((loss_weights[0] * log_prob + loss_weights[1] * entropy).sum(), (hidden, weight))
    for name in ("logits", "linear"):
        for mine, other in zip(first[name][:3], second[name][:3], strict=True):
            assert torch.equal(mine, other)
        got = [*first[name][:3], torch.cat([first[name][3], second[name][3]])]
        for g, w in zip(got, (log_prob, entropy, grad_h, grad_w), strict=True):
            torch.testing.assert_close(g.double(), w.double(), rtol=1e-4, atol=1e-5)
    assert torch.equal(first["empty"][0], torch.zeros(4, 8))
    logits = (hidden @ weight.t()).detach()
    sets = [range(10), (9, 0), (4,), (5,), (3, 8), (7, 6)]
    want = [logits[row, targets[row]] - torch.logsumexp(logits[row, list(words)], -1) for row, words in enumerate(sets)]
    for ranks in (first, second):
        torch.testing.assert_close(ranks["kept"][0], torch.stack(want), rtol=1e-5, atol=1e-5)


CHUNK = 64


def peak_of_both_passes(rows: int, words: int) -> tuple[int, int]:
    """(forward, forward and backward) bytes beyond the operands, whose rows are narrow."""
    hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(words, 8, requires_grad=True)
    targets = torch.randint(words, (rows,))

    def forward():
        return linear_log_prob(hidden, weight, targets, chunk_size=CHUNK, with_entropy=True)

    def both():
        log_prob, entropy = forward()
        return torch.autograd.grad((log_prob + entropy).sum(), (hidden, weight))

    with torch.no_grad():
        alone = peak_bytes(forward)
    return alone, peak_bytes(both)


def test_memory_is_a_few_tiles_whatever_the_number_of_tokens_and_words():
    tile = 4 * CHUNK * vocab_logprob.VOCAB_TILE
    for rows, words in ((256, 8192), (1024, 8192), (256, 32768), (1024, 32768)):
        forward, both = peak_of_both_passes(rows, words)
        gradients = 4 * 8 * (rows + words + vocab_logprob.VOCAB_TILE)
        # The tile, scaled; two results of elementwise operators. Backward: the slopes and the gradient of the tile as well.
        assert 2 * tile < forward < 4 * tile + 64 * rows
        assert 2 * tile < both < 6 * tile + gradients + 64 * rows
    assert 4 * rows * words > 10 * both, "whole logits would have been seen"


def kept_words(sets: list[list[int] | None]) -> Kept:
    pairs = [(row, word) for row, words in enumerate(sets) for word in words or ()]
    rows, words = torch.tensor(pairs).t()
    return Kept(torch.tensor([words is not None for words in sets]), rows, words)


@pytest.mark.parametrize("chunk_size", [-1, 2])
def test_a_row_that_keeps_some_words_is_a_softmax_over_them(monkeypatch, chunk_size):
    """By torch over the kept columns alone; words of several tiles, in any order, one row whole and one with a single word."""
    monkeypatch.setattr(vocab_logprob, "VOCAB_TILE", 128)
    torch.manual_seed(3)
    hidden = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(300, 8, dtype=torch.float64, requires_grad=True)
    sets = [[7, 2, 290], None, [131], [129, 0, 5, 200], [40, 41]]
    targets = torch.tensor([290, 17, 131, 0, 41])
    rows = []
    for row, words in enumerate(sets):
        columns = torch.tensor(words if words is not None else list(range(300)))
        log_p = torch.log_softmax(hidden[row] @ weight[columns].t() / 0.7, -1)
        rows.append(torch.stack([log_p[columns == targets[row]][0], -(log_p.exp() * log_p).sum()]))
    want, slopes = torch.stack(rows), torch.randn(5, 2, dtype=torch.float64)
    want_grads = torch.autograd.grad((want * slopes).sum(), (hidden, weight))
    options = dict(temperature=0.7, chunk_size=chunk_size, with_entropy=True, kept=kept_words(sets))
    for got in (
        linear_log_prob(hidden, weight, targets, **options),
        vocab_parallel_log_prob(hidden @ weight.t(), targets, **options),
    ):
        torch.testing.assert_close(torch.stack(got, 1), want)
        grads = torch.autograd.grad((torch.stack(got, 1) * slopes).sum(), (hidden, weight))
        for g, w in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(g, w)
