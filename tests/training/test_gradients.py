"""The same rollout gives the same loss, gradients and step, however it is cut; and they are those of an independent program."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import config_for, gradients, plans, rollout, start

from slime.model.geometry import megatron_values
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


def test_the_model_values_of_the_tests_are_the_checkpoints(qwen3):
    assert megatron_values(read_hf_config(qwen3))["num_layers"] == 4
