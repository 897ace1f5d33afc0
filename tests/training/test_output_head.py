"""The output layer inside the loss: the numbers of whole logits, without their memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from allocations import peak_bytes
from ranks import run_ranks
from tiny import config_for, gradients, plans, rollout, start

from slime.model.hf_io import SafetensorsReader
from slime.ops import vocab_logprob
from slime.training import forward
from slime.training.loss import Objective
from slime.types import RolloutBatch

pytestmark = pytest.mark.slow

WORDS, WIDTH = 4000, 16
TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)


def wide(folder: Path, *, tied: bool) -> Path:
    """Two narrow layers under a vocabulary that is larger than everything else."""
    import transformers

    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=8, rope_theta=10000.0)
    sizes = dict(vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, max_position_embeddings=512)
    config = transformers.Qwen3Config(**sizes, **heads, tie_word_embeddings=tied)
    return tiny._random_model(transformers.Qwen3ForCausalLM(config), folder, 0)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide(tmp_path_factory.mktemp("tied"), tied=True)


ROWS, TEMPERATURE = 22, 0.7


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, targets, and the slopes of a loss with respect to log-probs and entropies; equal on every rank."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(ROWS, WIDTH, generator=generator)
    return rows, torch.randint(WORDS, (ROWS,), generator=generator), torch.randn(2, ROWS, generator=generator)


def head_in_loss(rank: int, folder: Path, changes: dict, chunk_size: int) -> tuple[torch.Tensor, ...]:
    """(log-probs, entropies, gradient of this rank's rows, gradient of this rank's weight) as the trainer has them."""
    trainer = start(config_for(folder, num_rollout=0, make_vocab_size_divisible_by=1024, **changes))
    (chunk,), ranks, (rows, targets, slopes) = trainer.model, trainer.ranks, problem()
    share = ROWS // ranks.tp_size
    own = rows[ranks.tp_rank * share :][:share, None].clone().requires_grad_()
    log_probs, entropy = forward._log_probs(
        chunk.head_input(own), targets, ranks, trainer.objective.vocabulary,
        temperature=TEMPERATURE, chunk_size=chunk_size, with_entropy=True,
    )  # fmt: skip
    (slopes[0] * log_probs + slopes[1] * entropy).sum().backward()
    weight = chunk.embedding.word_embeddings.weight if chunk.share_embeddings_and_output_weights else chunk.output_layer.weight
    return log_probs.detach(), entropy.detach(), own.grad[:, 0], weight.grad


@pytest.mark.parametrize("world", [1, 2], ids=["TP1", "TP2 with sequence parallelism"])
@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_log_probs_entropy_and_both_gradients_are_those_of_whole_logits_for_any_chunk_size(kind, world, request, monkeypatch):
    folder = request.getfixturevalue(kind)
    monkeypatch.setattr(vocab_logprob, "VOCAB_TILE", 640)
    rows, targets, slopes = problem()
    name = "model.embed_tokens.weight" if kind == "tied" else "lm_head.weight"
    weight = SafetensorsReader(folder).raw(name).requires_grad_()
    log_p = torch.log_softmax(rows.requires_grad_() @ weight.t() / TEMPERATURE, dim=-1)
    expected, entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (slopes[0] * expected + slopes[1] * entropy).sum().backward()

    def all_chunk_sizes(rank: int) -> list[tuple[torch.Tensor, ...]]:
        return [head_in_loss(rank, folder, TP2 if world == 2 else {}, chunk_size) for chunk_size in (-1, 1, 5, 22)]

    for results in zip(*run_ranks(world, all_chunk_sizes), strict=True):
        for log_probs, entropies, *_ in results:
            torch.testing.assert_close(log_probs, expected.detach(), rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(entropies, entropy.detach(), rtol=2e-6, atol=2e-6)
        hidden_grad, weight_grad = (torch.cat([result[place] for result in results]) for place in (2, 3))
        assert (hidden_grad - rows.grad).abs().max() < 2e-6 * rows.grad.abs().max()
        assert (weight_grad[:WORDS] - weight.grad).abs().max() < 2e-6 * weight.grad.abs().max()
        assert len(weight_grad) == 4096 and not weight_grad[WORDS:].any(), "rows that pad the vocabulary learn nothing"


def as_long_as(tokens: int) -> RolloutBatch:
    """Samples of 256 tokens, so many that they are `tokens` together."""
    rng, n, response = np.random.default_rng(0), tokens // 256, 250
    sizes = dict(response_lengths=np.full(n, response), truncated=np.zeros(n, bool), groups=np.arange(n) // 4)
    return dataclasses.replace(
        rollout(n=n),
        tokens=tuple(rng.integers(1, WORDS, 256) for _ in range(n)),
        loss_masks=tuple(np.ones(response, np.float32) for _ in range(n)),
        rollout_log_probs=tuple(np.full(response, -8.0, np.float32) for _ in range(n)),
        **sizes,
    )


def peaks(rank: int, folder: Path) -> dict[str, list[int]]:
    """Of one micro-batch of 1,024 and of 3,072 rows, in the passes of a trainer; plain: with whole logits."""
    found: dict[str, list[int]] = {"log-probs": [], "train": [], "log-probs, plain": [], "train, plain": []}
    for way, last_chunk in (("", forward.LastChunk), (", plain", ())):
        forward.LastChunk = last_chunk  # no chunk is an instance of nothing, so none is asked to stop before its output layer
        for tokens in (1024, 3072):
            sizes = dict(max_tokens_per_gpu=tokens, global_batch_size=tokens // 256, log_probs_chunk_size=64, entropy_coef=0.01)
            trainer, batch = start(config_for(folder, **sizes)), as_long_as(tokens)
            steps = plans(batch, trainer.config, 1)
            assert len(steps) == 1 and len(steps[0].micro_batches[0]) == 1
            trainer.train(batch, steps)  # the optimizer makes its moments
            found["log-probs" + way].append(peak_bytes(lambda t=trainer, b=batch, s=steps: t.log_probs(b, s)))
            found["train" + way].append(peak_bytes(lambda t=trainer, b=batch, s=steps: t.train(b, s)))
    return found


def test_memory_of_a_pass_does_not_grow_with_tokens_times_words(untied):
    (found,) = run_ranks(1, peaks, untied)
    growth = {name: (large - small) / 2048 for name, (small, large) in found.items()}
    print({name: f"{value:,.0f} bytes a token" for name, value in growth.items()})
    logits = 4 * WORDS
    # A row of whole logits stays for the pass, and its gradient beside it in training: the record sees them.
    assert growth["log-probs, plain"] >= logits and growth["train, plain"] >= 2 * logits
    # What is left: rows of width 16, activations of two layers, a few numbers per token.
    assert growth["log-probs"] < logits / 8 and growth["train"] < logits / 4


PASSES = {
    1: {"one rank": dict()},
    2: {
        "PP2 VPP2": dict(
            pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2,
            pipeline_model_parallel_layout="Et|t|tttt|ttL",
        ),
        "PP2": dict(pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=6),
        "TP2 EP2": dict(expert_model_parallel_size=2, **TP2),
        "CP2": dict(context_parallel_size=2, allgather_cp=True),
    },
}  # fmt: skip


def pass_without_gradient(rank: int, folder: Path, world: int) -> dict[str, dict[int, torch.Tensor]]:
    found, batch = {}, rollout()
    for name, changes in PASSES[world].items():
        trainer = start(config_for(folder, expert_tensor_parallel_size=1, num_rollout=0, **changes))
        found[name] = trainer.log_probs(batch, plans(batch, trainer.config, world))
    return found


def test_a_log_prob_pass_of_a_mixture_of_experts_is_the_same_under_every_layout(glm_tiny):
    """Nothing is differentiated, so the schedules handle the last chunk's own output."""
    expected = run_ranks(1, pass_without_gradient, glm_tiny, 1)[0]["one rank"]
    results = run_ranks(2, pass_without_gradient, glm_tiny, 2)
    assert len(expected) == 8
    for name in PASSES[2]:
        last = [result[name] for result in results if result[name]]
        assert len(last) == (1 if name.startswith("PP2") else 2)
        for log_probs in last:
            assert set(log_probs) == set(expected)
            for row, values in expected.items():
                torch.testing.assert_close(log_probs[row], values, rtol=1e-6, atol=3e-6, msg=name)


def from_logits(args, micro, logits, total):
    """The sft loss, as a user would write it."""
    assert logits.shape == (1, micro.tokens.shape[1], 96 // args.tensor_model_parallel_size)
    how = dict(vocabulary=OBJECTIVE[0].vocabulary, temperature=1.0, chunk_size=-1)
    log_probs, _ = forward.response_log_probs(micro, logits, OBJECTIVE[0].ranks, **how)
    return total(-log_probs), {}


OBJECTIVE: list[Objective] = []


@pytest.mark.parametrize("world", [1, 2], ids=["TP1", "TP2"])
def test_a_custom_loss_gets_whole_logits(qwen3, world):
    custom = dict(loss_type="custom_loss", custom_loss_function_path="test_output_head.from_logits")

    def both(rank: int) -> list[tuple]:
        results = []
        for kind in (dict(loss_type="sft_loss"), custom):
            trainer = start(config_for(qwen3, clip_grad=0.0, **kind, **(TP2 if world == 2 else {})))
            OBJECTIVE[:] = [trainer.objective]
            batch = rollout()
            report = trainer.train(batch, plans(batch, trainer.config, world))
            results.append((report.per_step[0]["train/loss"], gradients(trainer)))
        return results

    for (loss, expected), (custom_loss, found) in run_ranks(world, both):
        assert custom_loss == pytest.approx(loss, rel=1e-6)
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() <= 2e-6 * gradient.abs().max() + 1e-9, name
