"""The same rollout gives the same loss, gradients and step, however it is cut; and they are those of an independent program."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import config_for, gradients, plans, rollout, start

from slime.model.hf_config import read_hf_config
from slime.model.layout import merge
from slime.model.names import NameTable

pytestmark = pytest.mark.slow

CUTS = {
    "one sample per micro-batch": (1, dict(use_dynamic_batch_size=False, micro_batch_size=1)),
    "everything in one stream": (1, dict(max_tokens_per_gpu=4096)),
    "DP2": (2, dict()),
    "DP3, ranks without work": (3, dict(max_tokens_per_gpu=4096)),
    "PP2": (2, dict(pipeline_model_parallel_size=2)),
    "PP2 uneven": (2, dict(pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=1)),
    "PP2 VPP2": (2, dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
    "TP2 SP": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "CP2 zigzag": (2, dict(context_parallel_size=2)),
    "CP2 contiguous": (2, dict(context_parallel_size=2, allgather_cp=True)),
}


def one_step(rank: int, folder, changes, world: int, batch) -> tuple:
    config = config_for(folder, lr=1e-3, **changes)
    trainer = start(config)
    report = trainer.train(batch, plans(batch, config, world))
    weights = {name: weight.clone() for name, weight in trainer.named_weights()}
    return report.per_step, weights


@pytest.fixture(scope="module")
def whole(qwen3):
    return {
        per_token: run_ranks(1, one_step, qwen3, dict(calculate_per_token_loss=per_token), 1, rollout())[0]
        for per_token in (False, True)
    }


@pytest.mark.parametrize("per_token", [False, True], ids=["per trajectory", "per token"])
@pytest.mark.parametrize("cut", CUTS)
def test_loss_and_gradient_norm_do_not_depend_on_the_cut(qwen3, whole, cut, per_token):
    world, changes = CUTS[cut]
    results = run_ranks(world, one_step, qwen3, {**changes, "calculate_per_token_loss": per_token}, world, rollout())
    expected = whole[per_token][0]
    for steps, _ in results:
        assert [sorted(step) for step in steps] == [sorted(step) for step in expected]
        for step, other in zip(steps, expected, strict=True):
            for name, value in other.items():
                assert step[name] == pytest.approx(value, rel=3e-6, abs=3e-7), (cut, name)


def reference(folder, batch, config) -> tuple[float, dict[str, torch.Tensor]]:
    """GRPO's loss on one unpacked sample after the other, with transformers and autograd alone."""
    import transformers

    model = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    rules = config.algorithm
    loss = 0.0
    for row in range(len(batch)):
        tokens = torch.from_numpy(batch.tokens[row])
        logits = model(tokens[None]).logits[0] / config.rollout.rollout_temperature
        response = int(batch.response_lengths[row])
        log_probs = torch.log_softmax(logits[:-1], -1).gather(1, tokens[1:, None])[-response:, 0]
        ratio = (log_probs - log_probs.detach()).exp()
        advantage = float(batch.rewards[row])
        token_loss = torch.maximum(-ratio * advantage, -ratio.clamp(1 - rules.eps_clip, 1 + rules.eps_clip_high) * advantage)
        weight = (
            (log_probs.detach() - torch.from_numpy(batch.rollout_log_probs[row]))
            .exp()
            .clamp(rules.tis_clip_low, rules.tis_clip)
        )
        mask = torch.from_numpy(batch.loss_masks[row])
        loss = loss + (token_loss * weight * mask).sum() / mask.sum().clamp(min=1) / len(batch)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradients_are_those_of_a_program_written_with_transformers_alone(qwen3):
    config = config_for(qwen3, use_tis=True, tis_clip=2.0, tis_clip_low=0.5, clip_grad=0.0)
    batch = rollout(seed=5)

    def ours(rank: int):
        trainer = start(config)
        report = trainer.train(batch, plans(batch, config, 1))
        return report.per_step[0], gradients(trainer)

    step, grads = run_ranks(1, ours)[0]
    loss, expected = reference(qwen3, batch, config)
    assert step["train/loss"] == pytest.approx(loss, rel=1e-5)
    table = NameTable.for_model(read_hf_config(qwen3), with_mtp=False)
    for name, gradient in grads.items():
        theirs = merge(table[name], [expected[tensor.name] for tensor in table[name].hf])
        torch.testing.assert_close(
            gradient[: len(theirs)], theirs, rtol=1e-4, atol=2e-6 * float(theirs.abs().max()) + 1e-8, msg=name
        )
    norm = np.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
    assert step["train/grad_norm"] == pytest.approx(norm, rel=3e-6)
    assert len(grads) == len(table.entries) - sum(entry.name.endswith("expert_bias") for entry in table.entries)


def test_padding_of_the_vocabulary_takes_no_probability(qwen3, whole):
    """96 words padded to 128: to 192 on two ranks, of which the second holds no word at all."""
    for world, changes in ((1, dict()), (2, dict(tensor_model_parallel_size=2, sequence_parallel=True))):
        changes = changes | dict(make_vocab_size_divisible_by=96 if world == 2 else 128)
        for steps, _ in run_ranks(world, one_step, qwen3, changes, world, rollout()):
            for name, value in whole[False][0][0].items():
                assert steps[0][name] == pytest.approx(value, rel=3e-6, abs=3e-7), (world, name)


GLM_CUTS = {
    "DP2": dict(),
    "EP2": dict(expert_model_parallel_size=2),
    "PP2, 6 + 2": dict(pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=6),
    "TP2 SP EP2": dict(
        tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2, expert_tensor_parallel_size=1
    ),
    "CP2 contiguous": dict(context_parallel_size=2, allgather_cp=True),
}


@pytest.fixture(scope="module")
def whole_glm(glm):
    return run_ranks(1, one_step, glm, dict(), 1, rollout())[0]


@pytest.mark.parametrize("cut", GLM_CUTS)
def test_a_sparse_mixture_of_experts_takes_the_same_step_however_it_is_cut(glm, whole_glm, cut):
    changes = dict(expert_tensor_parallel_size=1) | GLM_CUTS[cut]
    expected, whole_weights = whole_glm
    for steps, weights in run_ranks(2, one_step, glm, changes, 2, rollout()):
        for name, value in expected[0].items():
            assert steps[0][name] == pytest.approx(value, rel=2e-5, abs=2e-6), (cut, name)
        for name, weight in weights.items():
            if weight.shape == whole_weights[name].shape:
                torch.testing.assert_close(weight, whole_weights[name], rtol=1e-4, atol=1e-4, msg=name)


def test_the_indexer_is_not_trained(glm, whole_glm):
    before = run_ranks(1, lambda rank: {n: w.clone() for n, w in start(config_for(glm)).named_weights()})[0]
    after = whole_glm[1]
    indexer = [name for name in after if any(part in name for part in (".wq_b.", ".wk.", ".k_norm.", ".weights_proj."))]
    assert len(indexer) == 5 * 4, "four computing layers, each with two matrices, gates and a norm with a bias"
    assert all(torch.equal(before[name], after[name]) for name in indexer)
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    assert len(moved) > 0.9 * (len(after) - len(indexer) - 5), "everything but the indexer and the expert biases moves"
