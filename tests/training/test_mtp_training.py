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
from safetensors.torch import save_file

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

LAYERS = 8
MTP = dict(mtp_num_layers=1, enable_mtp_training=True, loss_type="sft_loss", mtp_loss_scaling_factor=0.3)


def hf_model() -> torch.nn.Module:
    """Nine decoder layers, of which the trunk runs eight: the last one is the MTP layer's, so it has an indexer and experts."""
    import transformers

    kinds = ["full", "shared"] * (LAYERS // 2) + ["full"]
    config = transformers.GlmMoeDsaConfig(
        vocab_size=tiny.VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=LAYERS + 1, q_lora_rank=24,
        kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=20, num_attention_heads=4, num_key_value_heads=4,
        rms_norm_eps=1e-5, pad_token_id=None, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        moe_intermediate_size=32, n_group=1, topk_group=1, first_k_dense_replace=2, routed_scaling_factor=2.5,
        tie_word_embeddings=False, index_n_heads=16, index_head_dim=32, index_topk=6, index_topk_freq=2,
        index_skip_topk_offset=1, indexer_types=kinds, max_position_embeddings=512, rope_interleave=True,
        indexer_rope_interleave=True, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    return transformers.GlmMoeDsaForCausalLM(config).float()


@pytest.fixture(scope="module")
def glm_mtp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as released ones are: eight layers, and model.layers.8 with what joins it to the trunk."""
    folder = tmp_path_factory.mktemp("glm-mtp")
    tiny._random_model(hf_model(), folder, 3)
    generator = torch.Generator().manual_seed(4)
    norms = {
        f"{name}.weight": 1 + 0.1 * torch.randn(48, generator=generator) for name in ("enorm", "hnorm", "shared_head.norm")
    }
    joint = {"eh_proj.weight": 0.15 * torch.randn(48, 96, generator=generator)}
    extra = {f"model.layers.{LAYERS}.{name}": tensor for name, tensor in (norms | joint).items()}
    save_file(extra, folder / "model-mtp.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"], config["num_nextn_predict_layers"] = LAYERS, 1
    for name in ("indexer_types", "mlp_layer_types", "layer_types"):
        config[name] = config[name][:LAYERS]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


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
def alone(glm_mtp: Path) -> tuple[dict, dict]:
    """One rank, every sample in a stream of its own."""
    cut = dict(use_dynamic_batch_size=False, micro_batch_size=1)
    ((values, result),) = run_ranks(1, lambda rank: gradient_step(rank, 1, glm_mtp, samples(), MTP | cut))
    return values, whole_grads(read_hf_config(glm_mtp), [result])


def reference(folder: Path, batch: RolloutBatch) -> tuple[float, float, dict[str, torch.Tensor]]:
    """(sft loss, MTP loss, gradients by HF name) with transformers' modules and autograd, one unpacked sample at a time."""
    reader, model = SafetensorsReader(folder), load_reference(str(_nine_layers(folder)))
    prefix = f"model.layers.{LAYERS}."
    extra = {
        name: reader.raw(f"{prefix}{name}").requires_grad_()
        for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
    }
    model.config.num_hidden_layers = LAYERS  # the trunk's forward stops before the ninth layer

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
        out, _ = model.model.layers[LAYERS](
            x, attention_mask=causal, position_ids=places, position_embeddings=model.model.rotary_emb(x, position_ids=places)
        )
        logits = torch.nn.functional.linear(norm(out, "shared_head.norm.weight"), model.lm_head.weight.detach())[0]
        for place in range(response):
            position = length - response + place
            if position >= 2:
                draft = draft - weight[place] * logits[position - 2].log_softmax(-1)[tokens[position]]
    (policy + 0.3 * draft).backward()
    grads = dict(_gradients(model)) | {f"{prefix}{name}": tensor.grad for name, tensor in extra.items()}
    return policy.item(), draft.item(), grads


def _nine_layers(folder: Path) -> Path:
    """The same files for transformers, which knows no MTP layer: it is a ninth layer there."""
    beside = folder.parent / f"{folder.name}-nine"
    if not beside.exists():
        beside.mkdir()
        (beside / "model.safetensors").symlink_to(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        config["num_hidden_layers"] = LAYERS + 1
        for name, last in (("indexer_types", "full"), ("mlp_layer_types", "sparse"), ("layer_types", "indexed_attention")):
            config[name] = [*config[name], last]
        (beside / "config.json").write_text(json.dumps(config))
    return beside


def test_losses_and_every_gradient_are_those_of_a_forward_written_with_transformers(glm_mtp, alone):
    values, grads = alone
    policy, draft, expected = reference(glm_mtp, samples())
    assert values["loss"] == pytest.approx(policy, rel=2e-6)
    assert values["mtp_loss"] == pytest.approx(draft, rel=2e-6)
    table = NameTable.for_model(read_hf_config(glm_mtp))
    found = {}
    for name, whole in grads.items():
        found.update((tensor.name, piece) for tensor, piece in zip(table[name].hf, unmerge(table[name], whole), strict=True))
    assert set(found) == {name for name in expected if ".indexer." not in name}
    assert sum(name.startswith(f"model.layers.{LAYERS}.") for name in found) == 3 * 4 + 3 + 7 + 2 + 1 + 4
    worst, name = worst_difference({name: expected[name] for name in found}, found)
    assert worst < 5e-5, f"{name}: {worst:.1e}"


LAYOUTS = {
    "one stream": (1, dict(max_tokens_per_gpu=4096)),
    "recompute": (1, dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)),
    "TP2 SP": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "PP2 uneven": (2, dict(pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=2)),
    "PP2 VPP2": (2, dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
    "PP2, a layout": (2, dict(pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Et*6|t*2L")),
    "CP2": (2, dict(context_parallel_size=2)),
    "CP4": (4, dict(context_parallel_size=4)),
    "DP2 EP2": (2, dict(expert_model_parallel_size=2)),
    "TP2 CP2 EP2": (
        4,
        dict(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2, expert_model_parallel_size=2),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layer_is_the_same_under(name, glm_mtp, alone):
    world, changes = LAYOUTS[name]
    changes = MTP | dict(allgather_cp=True, expert_tensor_parallel_size=1) | changes
    results = run_ranks(world, lambda rank: gradient_step(rank, world, glm_mtp, samples(), changes))
    expected, grads = alone
    last = [values for values, _ in results if values]
    assert last
    for values in last:
        assert values == pytest.approx(expected, rel=3e-6)
    worst, where = worst_difference(grads, whole_grads(read_hf_config(glm_mtp), [result for _, result in results]))
    assert worst < 5e-5, f"{where}: {worst:.1e}"


def train(rank: int, folder: Path, changes: dict) -> tuple[list[dict], dict[str, torch.Tensor]]:
    trainer = tiny.start(tiny.config_for(folder, clip_grad=0.0, loss_type="sft_loss", **changes))
    batch = samples()
    reports = [trainer.train(batch, tiny.plans(batch, trainer.config, 1)).metrics for _ in range(4)]
    return reports, {name: weight.clone() for name, weight in trainer.named_weights()}


def test_the_draft_learns_and_the_policy_does_not_notice(glm_mtp):
    mtp = {name: value for name, value in MTP.items() if name != "loss_type"}
    ((reports, weights),) = run_ranks(1, train, glm_mtp, mtp)
    losses = [report["train/mtp_loss"] for report in reports]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0], losses
    ((_, alone),) = run_ranks(1, train, glm_mtp, {})
    assert {name for name in weights if name not in alone} == {name for name in weights if name.startswith("mtp.")}
    assert all(torch.equal(weights[name], weight) for name, weight in alone.items())
