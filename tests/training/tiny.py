"""Tiny models and rollouts for the training tests: a Hugging Face folder, the config that fits it, a trainer on it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ranks import end_grid
from safetensors.torch import save_file

from slime.compat.megatron import prepare

prepare()

import megatron.core.models.gpt.gpt_model  # noqa: E402, F401  (imported before ranks fork, which then share it)

from slime.batch.plan import plan_steps  # noqa: E402
from slime.config.cluster import ClusterConfig  # noqa: E402
from slime.config.hf_check import megatron_values  # noqa: E402
from slime.config.model import ModelConfig, ParallelConfig  # noqa: E402
from slime.config.rollout import DataConfig, RolloutConfig  # noqa: E402
from slime.config.run import DebugConfig  # noqa: E402
from slime.config.training import AlgorithmConfig, BatchConfig, CheckpointConfig, OptimizerConfig  # noqa: E402
from slime.device import get_device  # noqa: E402
from slime.model.build import build_model, padded_vocab_size  # noqa: E402
from slime.model.hf_config import read_hf_config  # noqa: E402
from slime.model.hf_io import SafetensorsReader, load_hf  # noqa: E402
from slime.model.names import NameTable  # noqa: E402
from slime.parallel import init_ranks  # noqa: E402
from slime.training.trainer import Trainer  # noqa: E402
from slime.types import RolloutBatch, StepPlan  # noqa: E402

VOCAB = 96
PER_LAYER = {"indexer_types", "mlp_layer_types", "layer_types"}
"""Fields of config.json that say something of each layer."""


def qwen3(folder: Path, *, seed: int = 0, tied: bool = False) -> Path:
    """A tiny dense Qwen3 as transformers saves it, float32, with weights large enough to matter."""
    import transformers

    values = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4, max_position_embeddings=512)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope_theta=10000.0, tie_word_embeddings=tied)
    return _random_model(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**values, **heads)), folder, seed)


def glm(folder: Path, *, seed: int = 0, num_layers: int = 8) -> Path:
    """A tiny GLM-5.2: MLA, sparse attention with shared indices (layers 1-3, 7, 11 ... compute them), 3 dense, MoE layers."""
    import transformers

    size = dict(hidden_size=48, intermediate_size=64, max_position_embeddings=512)
    values = dict(vocab_size=VOCAB, num_hidden_layers=num_layers, **size)
    latent = dict(q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=20)
    heads = dict(num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5, pad_token_id=None)
    experts = dict(
        n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=1, moe_intermediate_size=32, n_group=1, topk_group=1
    )
    rest = dict(first_k_dense_replace=3, routed_scaling_factor=2.5, num_nextn_predict_layers=0, tie_word_embeddings=False)
    indexer = dict(index_n_heads=16, index_head_dim=32, index_topk=6, index_topk_freq=4, index_skip_topk_offset=3)
    rope = dict(
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rope_interleave=True, indexer_rope_interleave=True
    )
    config = transformers.GlmMoeDsaConfig(**values, **latent, **heads, **experts, **rest, **indexer, **rope)
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    return _random_model(transformers.GlmMoeDsaForCausalLM(config), folder, seed)


def glm_mtp(folder: Path) -> Path:
    """A tiny GLM-5.2 of eight layers (1, 3, 5 and 7 compute indices, 2 are dense) with its MTP layer, as released ones are."""
    import transformers

    config = transformers.GlmMoeDsaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=9, q_lora_rank=24, kv_lora_rank=16,
        qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=20, num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5,
        pad_token_id=None, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=32, n_group=1,
        topk_group=1, first_k_dense_replace=2, routed_scaling_factor=2.5, tie_word_embeddings=False, index_n_heads=16,
        index_head_dim=32, index_topk=6, index_topk_freq=2, index_skip_topk_offset=1,
        indexer_types=["full", "shared"] * 4 + ["full"], max_position_embeddings=512, rope_interleave=True,
        indexer_rope_interleave=True, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    return _last_layer_drafts(transformers.GlmMoeDsaForCausalLM(config), folder)


def deepseek_mtp(folder: Path) -> Path:
    """A tiny DeepSeek-V3 of three layers, the first dense, with its MTP layer."""
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=4, q_lora_rank=24, kv_lora_rank=16,
        qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=20, num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5,
        pad_token_id=None, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=32, n_group=1,
        topk_group=1, first_k_dense_replace=1, routed_scaling_factor=2.5, tie_word_embeddings=False, rope_interleave=True,
        max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    return _last_layer_drafts(transformers.DeepseekV3ForCausalLM(config), folder)


def _last_layer_drafts(model: torch.nn.Module, folder: Path) -> Path:
    """Written so that the last decoder layer is the MTP layer's: with what joins it to the trunk, and one layer fewer told."""
    _random_model(model.float(), folder, 3)
    layers, hidden = model.config.num_hidden_layers - 1, model.config.hidden_size
    generator = torch.Generator().manual_seed(4)
    extra = {
        f"{name}.weight": 1 + 0.1 * torch.randn(hidden, generator=generator) for name in ("enorm", "hnorm", "shared_head.norm")
    }
    extra["eh_proj.weight"] = 0.15 * torch.randn(hidden, 2 * hidden, generator=generator)
    save_file({f"model.layers.{layers}.{name}": tensor for name, tensor in extra.items()}, folder / "model-mtp.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"], config["num_nextn_predict_layers"] = layers, 1
    for name in PER_LAYER & config.keys():
        config[name] = config[name][:layers]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _random_model(model: torch.nn.Module, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = model.float()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            torch.nn.init.normal_(buffer, std=0.1)
    model.save_pretrained(folder)
    return folder


def config_for(folder: Path, **changes: Any) -> SimpleNamespace:
    """The Config of a tiny run on the model in `folder`. `changes`: any field of any section, by slime's name."""
    hf = read_hf_config(folder)
    model: dict[str, Any] = {
        "vocab_size": hf["vocab_size"], "make_vocab_size_divisible_by": 4, "swiglu": True, "params_dtype": "fp32",
        "untie_embeddings_and_output_weights": not hf.get("tie_word_embeddings", False),
        "rotary_base": hf.rope_theta, "rotary_percent": 1.0 if hf.is_mla else hf.partial_rotary_factor,
        "position_embedding_type": "rope", "group_query_attention": not hf.is_mla,
        "multi_latent_attention": hf.is_mla,
        "megatron": {"moe_token_dispatcher_type": "alltoall", **megatron_values(hf)},
    }  # fmt: skip
    if hf.has_indexer:
        model["spec"] = ("slime_plugins.models.glm5.glm5", "get_glm5_spec")
    given: dict[type, dict[str, Any]] = {
        ModelConfig: model,
        ClusterConfig: {},
        ParallelConfig: {},
        OptimizerConfig: {"lr": 1e-2, "lr_decay_style": "constant", "adam_beta2": 0.98, "weight_decay": 0.1},
        CheckpointConfig: {"hf_checkpoint": str(folder)},
        BatchConfig: {
            "global_batch_size": 8,
            "use_dynamic_batch_size": True,
            "max_tokens_per_gpu": 64,
            "data_pad_size_multiplier": 4,
        },
        AlgorithmConfig: {"eps_clip": 0.2, "eps_clip_high": 0.28},
        DataConfig: {"num_rollout": 10, "rollout_batch_size": 2, "n_samples_per_prompt": 4},
        RolloutConfig: {"rollout_temperature": 0.8},
        DebugConfig: {},
    }
    for name, value in changes.items():
        owner = next(section for section in given if name in section.__dataclass_fields__)
        given[owner][name] = value
    sections = {section: section(**values) for section, values in given.items()}
    flat = SimpleNamespace(**{name: value for section in sections.values() for name, value in vars(section).items()})
    names = {
        "model": ModelConfig, "cluster": ClusterConfig, "parallel": ParallelConfig,
        "optimizer": OptimizerConfig, "checkpoint": CheckpointConfig,
        "batch": BatchConfig, "algorithm": AlgorithmConfig, "data": DataConfig, "rollout": RolloutConfig, "debug": DebugConfig,
    }  # fmt: skip
    return SimpleNamespace(**{name: sections[section] for name, section in names.items()}, args=flat)


def start(config: SimpleNamespace, *, load: bool = True) -> Trainer:
    """A trainer on this rank of an initialised world, on a fresh grid, with the weights of the HF folder."""
    end_grid()
    device = get_device()
    device.init_process(dist.get_rank())
    ranks = init_ranks(config.parallel, rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(config.model.seed)
    hf = read_hf_config(config.checkpoint.hf_checkpoint)
    chunks = build_model(config, hf, ranks, device)
    trainer = Trainer(config, device, ranks, chunks)
    if load:
        reader = SafetensorsReader(config.checkpoint.hf_checkpoint)
        table = NameTable.for_model(hf)
        load_hf(chunks, table, reader, ranks, padded_vocab=padded_vocab_size(config, hf))
        if trainer.optimizer is not None:
            trainer.optimizer.reload_model_params()
    return trainer


def rollout(rollout_id: int = 0, *, n: int = 8, seed: int = 0, longest: int = 24, log_probs: bool = True) -> RolloutBatch:
    """Random samples of very unequal lengths with rewards, masks with holes and the engine's made-up log-probs."""
    rng = np.random.default_rng([seed, rollout_id])
    responses = np.where(np.arange(n) == 0, longest, rng.integers(1, longest // 2, n))
    prompts = rng.integers(1, 9, n)
    masks = [np.ones(r, np.float32) for r in responses]
    for mask in masks:
        mask[rng.random(len(mask)) < 0.2] = 0
    rewards = rng.normal(size=n).astype(np.float32)
    return RolloutBatch(
        rollout_id=rollout_id,
        tokens=tuple(rng.integers(1, VOCAB, p + r) for p, r in zip(prompts, responses, strict=True)),
        response_lengths=responses.astype(np.int64),
        loss_masks=tuple(masks),
        rewards=rewards,
        raw_rewards=rewards + 1,
        groups=np.arange(n) // 4,
        trajectories=np.arange(n),
        sample_ids=np.arange(n) + 100 * rollout_id,
        truncated=np.zeros(n, bool),
        rollout_log_probs=tuple(-4 - rng.random(r).astype(np.float32) for r in responses) if log_probs else None,
    )


def plans(batch: RolloutBatch, config: SimpleNamespace, world: int) -> list[StepPlan]:
    parallel = config.parallel
    used = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    return plan_steps(
        batch.total_lengths,
        batch.trajectories,
        batch.mask_sums,
        dp_size=world // used,
        cp_size=parallel.context_parallel_size,
        vpp_group=parallel.pipeline_model_parallel_size if parallel.virtual_pipeline_model_parallel_size else 1,
        batch=config.batch,
        per_token=config.algorithm.calculate_per_token_loss,
    )


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """This rank's summed gradients by global parameter name, before clipping. World sizes with one data-parallel rank only."""
    from slime.model.local import local_tensors

    return {
        local.name: local.parameter.main_grad.clone()
        for local in local_tensors(trainer.model, trainer.ranks, experts=False)
        if local.parameter is not None and hasattr(local.parameter, "main_grad")
    }


def start_ppo(config: SimpleNamespace) -> Trainer:
    """A trainer with its critic, as a trainer actor builds them; to be loaded."""
    from slime.config.roles import critic_sections
    from slime.training.critic import Critic

    trainer = start(config, load=False)
    role = SimpleNamespace(**vars(config) | critic_sections(config))
    hf = read_hf_config(config.checkpoint.hf_checkpoint)
    trainer.critic = Critic(
        role, trainer.device, trainer.ranks, build_model(role, hf, trainer.ranks, trainer.device, value_head=True)
    )
    return trainer
