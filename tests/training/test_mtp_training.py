"""The multi-token-prediction layer against a forward written with transformers' decoder layer, and under every layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from model.parity import StepResult, whole_grads, worst_difference
from model.reference import _gradients, load_reference
from ranks import run_ranks

from slime.batch.pack import pack
from slime.device import get_device
from slime.model.build import build_model, padded_vocab_size, trained_table
from slime.model.hf_config import read_hf_config
from slime.model.hf_io import SafetensorsReader, load_hf
from slime.model.layout import unmerge
from slime.model.local import local_tensors, split_of
from slime.model.names import NameTable
from slime.parallel import init_ranks
from slime.training.forward import Pipeline
from slime.training.loss import Objective
from slime.training.trainer import _prepare_schedules
from slime.types import RolloutBatch

MTP = dict(mtp_num_layers=1, enable_mtp_training=True, loss_type="sft_loss", mtp_loss_scaling_factor=0.3)


LENGTHS = ((5, 19), (1, 1), (1, 2), (40, 31), (2, 2), (1, 7), (3, 11), (9, 1))
"""(prompt, response): the smallest sample there is, and one longer than all others together."""


def samples() -> RolloutBatch:
    rng = np.random.default_rng(11)
    masks = [(rng.random(response) > 0.2).astype(np.float32) for _, response in LENGTHS]
    masks[1][:] = masks[2][:] = 1  # their first token has no row that guesses it
    return RolloutBatch(
        rollout_id=0,
        tokens=tuple(rng.integers(1, tiny.VOCAB, sum(lengths)) for lengths in LENGTHS),
        response_lengths=np.array([response for _, response in LENGTHS]),
        loss_masks=tuple(masks),
        rewards=np.ones(8, np.float32),
        raw_rewards=np.ones(8, np.float32),
        groups=np.arange(8) // 4,
        trajectories=np.arange(8),
        sample_ids=np.arange(8),
        truncated=np.zeros(8, bool),
        rollout_log_probs=None,
    )


def gradient_step(rank: int, world: int, folder: Path, batch: RolloutBatch, changes: dict) -> tuple[dict, StepResult]:
    """One step's forward and backward as the trainer runs them, with gradients left whole (no distributed optimizer)."""
    recompute = {name: changes.pop(name) for name in list(changes) if name.startswith("recompute_")}
    config = tiny.config_for(folder, **changes)
    config.model.megatron.update(recompute)
    device = get_device()
    ranks = init_ranks(config.parallel, rank=rank, world_size=world, device=device)
    hf = read_hf_config(folder)
    chunks = build_model(config, hf, ranks, device)
    reader = SafetensorsReader(folder)
    load_hf(chunks, NameTable.for_model(hf), reader, ranks, padded_vocab=padded_vocab_size(config, hf))
    _prepare_schedules(chunks, ranks)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=False)
    wrapped = [DistributedDataParallel(config=chunk.config, ddp_config=ddp, module=chunk) for chunk in chunks]
    pipeline = Pipeline(wrapped, ranks, device)
    pipeline.config.finalize_model_grads_func = lambda models, tokens, **rest: finalize_model_grads(models, None, **rest)
    (plan,) = tiny.plans(batch, config, world)
    micro_batches = [
        pack(
            batch, positions, loss_weight=plan.loss_weight, contiguous=config.parallel.allgather_cp, cp_rank=ranks.cp_rank,
            cp_size=ranks.cp_size, multiple=ranks.tp_size * config.batch.data_pad_size_multiplier,
        )
        for positions in plan.micro_batches[ranks.dp_rank]
    ]  # fmt: skip
    values = pipeline.train(micro_batches, Objective.from_config(config, ranks))
    sums = {name: sum(value[name] for value in values) for name in (values[0] if values else ())}
    for value in sums.values():
        dist.all_reduce(value, group=ranks.dp_group)
    table = trained_table(config.model, hf)
    grads = {}
    for local in local_tensors(wrapped, ranks, of=lambda p: p.main_grad if p.requires_grad else p.data):
        if local.parameter is not None and local.parameter.requires_grad:
            grads[local.name] = (local.tensor.clone(), split_of(table[local.name], ranks)[0])
    return {name: value.item() for name, value in sums.items()}, StepResult((), [], grads, {}, 0.0)


@pytest.fixture(scope="module")
def deepseek_mtp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.deepseek_mtp(tmp_path_factory.mktemp("deepseek-mtp"))


_ALONE: dict[Path, tuple[dict, dict]] = {}


def alone(folder: Path) -> tuple[dict, dict]:
    """(values, gradients) of one rank, every sample in a stream of its own; once per checkpoint."""
    if folder not in _ALONE:
        cut = dict(use_dynamic_batch_size=False, micro_batch_size=1)
        ((values, result),) = run_ranks(1, lambda rank: gradient_step(rank, 1, folder, samples(), MTP | cut))
        _ALONE[folder] = values, whole_grads(read_hf_config(folder), [result])
    return _ALONE[folder]


def reference(folder: Path, batch: RolloutBatch) -> tuple[float, float, dict[str, torch.Tensor]]:
    """(sft loss, MTP loss, gradients by HF name) with transformers' modules and autograd, one unpacked sample at a time."""
    layers = read_hf_config(folder).num_layers
    reader, model = SafetensorsReader(folder), load_reference(str(_one_layer_more(folder)))
    prefix = f"model.layers.{layers}."
    extra = {
        name: reader.raw(f"{prefix}{name}").requires_grad_()
        for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
    }
    model.config.num_hidden_layers = layers  # the trunk's forward stops before the last layer

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * extra[name]

    policy = draft = torch.zeros(())
    for row in range(len(batch)):
        tokens = torch.from_numpy(batch.tokens[row])
        length, response = len(tokens), int(batch.response_lengths[row])
        mask = torch.from_numpy(batch.loss_masks[row])
        weight = mask / mask.sum().clamp(min=1) / len(batch)
        hidden = model.model(tokens[None]).last_hidden_state
        log_probs = model.lm_head(hidden)[0].log_softmax(-1)
        for place in range(response):
            position = length - response + place
            policy = policy - weight[place] * log_probs[position - 1, tokens[position]]
        # Row i of the MTP layer knows tokens up to i + 1; the last row has no next token and is not needed.
        if length < 3:
            continue
        following = model.model.embed_tokens(tokens[1:]).detach()[None]
        both = torch.cat([norm(following, "enorm.weight"), norm(hidden.detach()[:, :-1], "hnorm.weight")], -1)
        x = both @ extra["eh_proj.weight"].t()
        places = torch.arange(length - 1)[None]
        causal = torch.full((length - 1, length - 1), float("-inf")).triu(1)[None, None]
        out = model.model.layers[layers](
            x, attention_mask=causal, position_ids=places, position_embeddings=model.model.rotary_emb(x, position_ids=places)
        )
        out = out[0] if isinstance(out, tuple) else out
        logits = torch.nn.functional.linear(norm(out, "shared_head.norm.weight"), model.lm_head.weight.detach())[0]
        for place in range(response):
            position = length - response + place
            if position >= 2:
                draft = draft - weight[place] * logits[position - 2].log_softmax(-1)[tokens[position]]
    (policy + 0.3 * draft).backward()
    grads = dict(_gradients(model)) | {f"{prefix}{name}": tensor.grad for name, tensor in extra.items()}
    return policy.item(), draft.item(), grads


def _one_layer_more(folder: Path) -> Path:
    """The same files for transformers, which knows no MTP layer: it is one more decoder layer there."""
    beside = folder.parent / f"{folder.name}-more"
    if not beside.exists():
        beside.mkdir()
        (beside / "model.safetensors").symlink_to(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        config["num_hidden_layers"] += 1
        for name, last in (("indexer_types", "full"), ("mlp_layer_types", "sparse"), ("layer_types", "indexed_attention")):
            if name in config:
                config[name] = [*config[name], last]
        (beside / "config.json").write_text(json.dumps(config))
    return beside


# Tensors of the MTP layer that train: 4 experts of 3 matrices, 3 of the shared one, 7 of attention (5 matrices, 2 norms),
# 2 norms, the router, and the 4 that join the layer to the trunk.
TRAINED = 3 * 4 + 3 + 7 + 2 + 1 + 4


@pytest.mark.parametrize("model", ["glm_mtp", "deepseek_mtp"])
def test_losses_and_every_gradient_are_those_of_a_forward_written_with_transformers(model, request):
    folder = request.getfixturevalue(model)
    values, grads = alone(folder)
    policy, draft, expected = reference(folder, samples())
    assert values["loss"] == pytest.approx(policy, rel=2e-6)
    assert values["mtp_loss"] == pytest.approx(draft, rel=2e-6)
    hf = read_hf_config(folder)
    table = NameTable.for_model(hf)
    found = {}
    for name, whole in grads.items():
        found.update((tensor.name, piece) for tensor, piece in zip(table[name].hf, unmerge(table[name], whole), strict=True))
    assert set(found) == {name for name in expected if ".indexer." not in name}
    assert sum(name.startswith(f"model.layers.{hf.num_layers}.") for name in found) == TRAINED
    worst, name = worst_difference({name: expected[name] for name in found}, found)
    assert worst < 5e-5, f"{name}: {worst:.1e}"


MTP_LAYOUTS = {
    1: {
        "one stream": dict(max_tokens_per_gpu=4096),
        "recompute": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    },
    2: {
        "TP2": dict(tensor_model_parallel_size=2),
        "PP2 uneven": dict(pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=2),
        "PP2, indices sent": dict(
            pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=3, dsa_send_indices=True
        ),
        "PP2 VPP2": dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        "PP2, a layout": dict(pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Et*6|t*2L"),
        "CP2": dict(context_parallel_size=2, allgather_cp=True),
        "DP2 EP2": dict(expert_model_parallel_size=2),
    },
    4: {
        "CP4": dict(context_parallel_size=4, allgather_cp=True),
        "TP2 CP2 EP2": dict(
            tensor_model_parallel_size=2, context_parallel_size=2, expert_model_parallel_size=2, allgather_cp=True
        ),
        "TP2 PP2, indices sent": dict(
            tensor_model_parallel_size=2, pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=5,
            dsa_send_indices=True,
        ),
    },
}  # fmt: skip
DEEPSEEK_MTP_LAYOUTS = {
    2: {"CP2 zigzag": dict(context_parallel_size=2)},
    4: {"TP2 CP2 zigzag": dict(tensor_model_parallel_size=2, context_parallel_size=2)},
}


def _cases(layouts: dict[int, dict[str, dict]]) -> list:
    return [pytest.param(world, name, id=f"{world} ranks: {name}") for world in layouts for name in layouts[world]]


def check_layout(folder: Path, world: int, changes: dict) -> None:
    grid = dict(sequence_parallel=changes.get("tensor_model_parallel_size", 1) > 1, expert_tensor_parallel_size=1)
    results = run_ranks(world, lambda rank: gradient_step(rank, world, folder, samples(), MTP | grid | changes))
    expected, grads = alone(folder)
    last = [values for values, _ in results if values]
    assert last
    for values in last:
        assert values == pytest.approx(expected, rel=3e-6)
    worst, where = worst_difference(grads, whole_grads(read_hf_config(folder), [result for _, result in results]))
    assert worst < 5e-5, f"{where}: {worst:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize(("world", "name"), _cases(MTP_LAYOUTS))
def test_the_layer_is_the_same_under(world, name, glm_mtp):
    check_layout(glm_mtp, world, MTP_LAYOUTS[world][name])


@pytest.mark.slow
@pytest.mark.parametrize(("world", "name"), _cases(DEEPSEEK_MTP_LAYOUTS))
def test_the_layer_of_a_dense_attention_model_is_the_same_under(world, name, deepseek_mtp):
    check_layout(deepseek_mtp, world, DEEPSEEK_MTP_LAYOUTS[world][name])


def train(rank: int, folder: Path, changes: dict) -> tuple[list[dict], dict[str, torch.Tensor], dict[int, torch.Tensor]]:
    trainer = tiny.start(tiny.config_for(folder, clip_grad=0.0, loss_type="sft_loss", **changes))
    batch = samples()
    reports = [step for _ in range(4) for step in trainer.train(batch, tiny.plans(batch, trainer.config, 1)).per_step]
    weights = {name: weight.clone() for name, weight in trainer.named_weights()}
    return reports, weights, trainer.log_probs(batch, tiny.plans(batch, trainer.config, 1))


def test_the_draft_learns_and_the_policy_does_not_notice(glm_mtp):
    mtp = {name: value for name, value in MTP.items() if name != "loss_type"}
    ((reports, weights, log_probs),) = run_ranks(1, train, glm_mtp, mtp)
    losses = [report["train/mtp_loss"] for report in reports]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0], losses
    ((_, alone, expected),) = run_ranks(1, train, glm_mtp, {})
    assert {name for name in weights if name not in alone} == {name for name in weights if name.startswith("mtp.")}
    assert all(torch.equal(weights[name], weight) for name, weight in alone.items())
    assert len(expected) == 8 and all(torch.equal(log_probs[row], values) for row, values in expected.items())
