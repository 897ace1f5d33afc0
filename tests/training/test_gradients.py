"""The same rollout gives the same loss, gradients and step, however it is cut; and they are those of an independent program."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import config_for, gradients, plans, rollout, start

from slime.model.hf_config import read_hf_config
from slime.model.layout import merge, unshard
from slime.model.local import local_tensors
from slime.model.names import NameTable

pytestmark = pytest.mark.slow

# Seven digits: the metrics of a step, its gradient norm, and every weight after it. Adam divides a gradient by its own size,
# which would turn the rounding of a nearly zero one into a step of full length; an epsilon far above rounding keeps it smooth.
DIGITS = 5e-7
STEP = dict(lr=1e-4, adam_eps=1e-2)

QWEN_CUTS = {
    1: {
        "whole": dict(),
        "one sample per micro-batch": dict(use_dynamic_batch_size=False, micro_batch_size=1),
        "everything in one stream": dict(max_tokens_per_gpu=4096),
        "three samples per micro-batch, balanced": dict(use_dynamic_batch_size=False, micro_batch_size=3, balance_data=True),
    },
    2: {
        "DP2": dict(),
        "DP2 balanced by FLOPs": dict(balance_data=True, balance_by_flops=True),
        "PP2": dict(pipeline_model_parallel_size=2),
        "PP2, 1 + 3 layers": dict(pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=1),
        "PP2 VPP2": dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        "TP2": dict(tensor_model_parallel_size=2),
        "TP2, a rank without words": dict(tensor_model_parallel_size=2, make_vocab_size_divisible_by=96),
        "CP2 zigzag": dict(context_parallel_size=2),
        "CP2": dict(context_parallel_size=2, allgather_cp=True),
    },
    3: {"DP3, ranks without work": dict(max_tokens_per_gpu=4096)},
    4: {
        "TP2 CP2 zigzag": dict(tensor_model_parallel_size=2, context_parallel_size=2),
        "PP2 CP2": dict(pipeline_model_parallel_size=2, context_parallel_size=2, allgather_cp=True),
        "TP2 PP2, one sample per micro-batch": dict(
            tensor_model_parallel_size=2, pipeline_model_parallel_size=2, use_dynamic_batch_size=False, micro_batch_size=1
        ),
    },
}
TIED_CUTS = {
    1: {"whole": dict()},
    2: {
        "PP2, a copy on the last stage": dict(pipeline_model_parallel_size=2),
        "TP2, padded words": dict(tensor_model_parallel_size=2, make_vocab_size_divisible_by=50),
    },
}
FOUR_STAGES = dict(pipeline_model_parallel_layout="Et|t|tttt|ttL")
GLM_CUTS = {
    1: {"whole": dict(), "one sample per micro-batch": dict(use_dynamic_batch_size=False, micro_batch_size=1)},
    2: {
        "DP2": dict(),
        "EP2": dict(expert_model_parallel_size=2),
        "PP2, 6 + 2 layers": dict(pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=6),
        "PP2 VPP2": dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, **FOUR_STAGES),
        "TP2 EP2": dict(tensor_model_parallel_size=2, expert_model_parallel_size=2),
        "CP2": dict(context_parallel_size=2, allgather_cp=True),
        "CP2 EP2": dict(context_parallel_size=2, allgather_cp=True, expert_model_parallel_size=2),
    },
    4: {
        "PP4": dict(pipeline_model_parallel_size=4, **FOUR_STAGES),
        "CP4 EP4": dict(context_parallel_size=4, allgather_cp=True, expert_model_parallel_size=4),
        "TP2 PP2 EP2": dict(
            tensor_model_parallel_size=2, pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=2,
            expert_model_parallel_size=2,
        ),
        "TP2 CP2 EP4": dict(
            tensor_model_parallel_size=2, context_parallel_size=2, allgather_cp=True, expert_model_parallel_size=4
        ),
    },
    8: {
        "TP2 PP2 CP2 EP4": dict(
            tensor_model_parallel_size=2, pipeline_model_parallel_size=2, context_parallel_size=2, allgather_cp=True,
            expert_model_parallel_size=4, decoder_first_pipeline_num_layers=6,
        ),
    },
}  # fmt: skip


def one_step(rank: int, folder, changes, world: int, batch) -> tuple:
    sequence_parallel = changes.get("tensor_model_parallel_size", 1) > 1
    config = config_for(folder, sequence_parallel=sequence_parallel, expert_tensor_parallel_size=1, **{**STEP, **changes})
    if config.model.multi_latent_attention:
        config.model.megatron["moe_router_bias_update_rate"] = 0.0  # as the recipe has it: padding rows are counted too
    trainer = start(config)
    report = trainer.train(batch, plans(batch, config, world))
    weights = {local.name: local.tensor.clone() for local in local_tensors(trainer.model, trainer.ranks)}
    return report.per_step, weights, (trainer.ranks.tp_rank, trainer.ranks.etp_rank)


def all_cuts(rank: int, folder, cuts: dict, world: int) -> dict:
    """One step per cut and kind of mean, one after the other on the same ranks."""
    results = {}
    for per_token in (False, True):
        for cut, changes in cuts.items():
            changes = {**changes, "calculate_per_token_loss": per_token}
            results[cut, per_token] = one_step(rank, folder, changes, world, rollout())
    return results


_CUT: dict = {}


def cut_results(folder, world: int, cuts: dict) -> list[dict]:
    if (folder, world) not in _CUT:
        _CUT[folder, world] = run_ranks(world, all_cuts, folder, cuts, world, timeout=600)
    return _CUT[folder, world]


def whole_weights(folder, results: list[tuple]) -> dict[str, torch.Tensor]:
    table, parts = NameTable.for_model(read_hf_config(folder), with_mtp=False), {}
    for _, weights, (tp_rank, etp_rank) in results:
        for name, weight in weights.items():
            entry = table[name]
            place = 0 if entry.split == "none" else etp_rank if entry.expert is not None else tp_rank
            parts.setdefault(entry.name, {})[place] = weight
    return {name: unshard(table[name], [shards[place] for place in sorted(shards)]) for name, shards in parts.items()}


def check_cut(folder, world: int, cut: str, cuts: dict, per_token: bool) -> None:
    (whole,) = cut_results(folder, 1, cuts[1])
    results = [result[cut, per_token] for result in cut_results(folder, world, cuts[world])]
    expected, *_ = whole["whole", per_token]
    for steps, *_ in results:
        assert [sorted(step) for step in steps] == [sorted(step) for step in expected]
        for step, other in zip(steps, expected, strict=True):
            for name, value in other.items():
                assert step[name] == pytest.approx(value, rel=DIGITS, abs=DIGITS), (cut, name)
    ours, theirs = whole_weights(folder, results), whole_weights(folder, [whole["whole", per_token]])
    words = read_hf_config(folder)["vocab_size"]
    assert set(ours) == set(theirs)
    for name, weight in theirs.items():
        if "embedding" in name or "output_layer" in name:
            assert torch.allclose(ours[name][:words], weight[:words], rtol=0, atol=DIGITS), name
        else:
            worst = (ours[name] - weight).abs().max()
            assert worst <= DIGITS * weight.abs().max(), f"{name}: {worst:.2e}"


def _cases(cuts: dict) -> list:
    return [pytest.param(world, cut, id=f"{world} ranks: {cut}") for world in cuts for cut in cuts[world] if cut != "whole"]


@pytest.mark.parametrize("per_token", [False, True], ids=["per trajectory", "per token"])
@pytest.mark.parametrize(("world", "cut"), _cases(QWEN_CUTS))
def test_a_dense_model_takes_the_same_step_however_it_is_cut(qwen3, world, cut, per_token):
    check_cut(qwen3, world, cut, QWEN_CUTS, per_token)


@pytest.mark.parametrize("per_token", [False, True], ids=["per trajectory", "per token"])
@pytest.mark.parametrize(("world", "cut"), _cases(GLM_CUTS))
def test_a_sparse_mixture_of_experts_takes_the_same_step_however_it_is_cut(glm_tiny, world, cut, per_token):
    check_cut(glm_tiny, world, cut, GLM_CUTS, per_token)


@pytest.mark.parametrize(("world", "cut"), _cases(TIED_CUTS))
def test_a_model_that_ties_embedding_and_output_layer_takes_the_same_step_however_it_is_cut(qwen3_tied, world, cut):
    check_cut(qwen3_tied, world, cut, TIED_CUTS, False)


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


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_tied"])
def test_gradients_are_those_of_a_program_written_with_transformers_alone(kind, request):
    folder = request.getfixturevalue(kind)
    bounds = {"tis_clip": 2.0, "tis_clip_low": 0.5, "tis_upper_bound": 2.0, "tis_lower_bound": 0.5}
    config = config_for(folder, use_tis=True, clip_grad=0.0, **bounds)
    batch = rollout(seed=5)

    def ours(rank: int):
        trainer = start(config)
        report = trainer.train(batch, plans(batch, config, 1))
        return report.per_step[0], gradients(trainer)

    step, grads = run_ranks(1, ours)[0]
    loss, expected = reference(folder, batch, config)
    assert step["train/loss"] == pytest.approx(loss, rel=1e-5)
    table = NameTable.for_model(read_hf_config(folder), with_mtp=False)
    for name, gradient in grads.items():
        theirs = merge(table[name], [expected[tensor.name] for tensor in table[name].hf])
        torch.testing.assert_close(
            gradient[: len(theirs)], theirs, rtol=1e-4, atol=2e-6 * float(theirs.abs().max()) + 1e-8, msg=name
        )
    norm = np.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
    assert step["train/grad_norm"] == pytest.approx(norm, rel=3e-6)
    assert len(grads) == len(table.entries) - sum(entry.name.endswith("expert_bias") for entry in table.entries)


def test_the_indexer_is_not_trained(glm_tiny):
    before = run_ranks(1, lambda rank: {n: w.clone() for n, w in start(config_for(glm_tiny)).named_weights()})[0]
    after = cut_results(glm_tiny, 1, GLM_CUTS[1])[0]["whole", False][1]
    indexer = [name for name in after if any(part in name for part in (".wq_b.", ".wk.", ".k_norm.", ".weights_proj."))]
    assert len(indexer) == 5 * 4, "four computing layers, each with two matrices, gates and a norm with a bias"
    assert all(torch.equal(before[name], after[name]) for name in indexer)
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    assert len(moved) > 0.9 * (len(after) - len(indexer) - 5), "everything but the indexer and the expert biases moves"
