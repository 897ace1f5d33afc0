"""Random small models of every family by `transformers`, the independent reference: their files, logits and gradients."""

from __future__ import annotations

import math
from pathlib import Path

import torch

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "pad_token_id": None,
}
GQA = {**COMMON, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
MLA = {
    **COMMON,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-5,
    "num_nextn_predict_layers": 0,
}
GLM4_MOE = {
    **GQA,
    "attention_bias": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

FAMILIES: dict[str, tuple[str, dict]] = {
    "qwen3": ("Qwen3", {**GQA, **ROPE, "tie_word_embeddings": False}),
    "qwen3-tied": ("Qwen3", {**GQA, **ROPE, "tie_word_embeddings": True, "num_hidden_layers": 4}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **GQA,
            **ROPE,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "glm4": (
        "Glm4",
        {**GQA, "attention_bias": True, "rope_parameters": {**ROPE["rope_parameters"], "partial_rotary_factor": 0.5}},
    ),
    "qwen2": ("Qwen2", {**GQA, **ROPE, "head_dim": 16, "tie_word_embeddings": False}),
    "qwen2-tied": ("Qwen2", {**GQA, **ROPE, "head_dim": 16, "tie_word_embeddings": True}),
    "glm4_moe": ("Glm4Moe", {**GLM4_MOE, "use_qk_norm": False}),
    "glm4_moe-norm": ("Glm4Moe", {**GLM4_MOE, "use_qk_norm": True, "first_k_dense_replace": 2}),
    "glm4_moe_lite": (
        "Glm4MoeLite",
        {
            **MLA,
            **ROPE,
            "n_group": 1,
            "topk_group": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "rope_interleave": True,
        },
    ),
    # As Moonlight: queries without a latent, two shared experts, no groups of experts.
    "deepseek_v3-b": (
        "DeepseekV3",
        {**MLA, **ROPE, "q_lora_rank": None, "n_shared_experts": 2, "n_group": 1, "topk_group": 1, "rope_interleave": True},
    ),
    "llama": ("Llama", {**GQA, "rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **MLA,
            "n_group": 4,
            "topk_group": 2,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "rope_parameters": YARN,
            "rope_interleave": True,
        },
    ),
    "glm_moe_dsa": (
        "GlmMoeDsa",
        {
            **MLA,
            **ROPE,
            "num_hidden_layers": 7,
            "first_k_dense_replace": 3,
            "n_group": 1,
            "topk_group": 1,
            "index_n_heads": 16,
            "index_head_dim": 32,
            "index_topk": 12,
            "index_topk_freq": 4,
            "index_skip_topk_offset": 3,
            "rope_interleave": True,
            "indexer_rope_interleave": True,
        },
    ),
    # Other numbers: the indexer wider than the head, five layers, no group of four complete, topk beyond most samples.
    "glm_moe_dsa-b": (
        "GlmMoeDsa",
        {
            **MLA,
            **ROPE,
            "num_hidden_layers": 5,
            "first_k_dense_replace": 2,
            "n_group": 1,
            "topk_group": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "v_head_dim": 12,
            "kv_lora_rank": 40,
            "index_n_heads": 32,
            "index_head_dim": 64,
            "index_topk": 40,
            "index_topk_freq": 2,
            "index_skip_topk_offset": 1,
            "rope_interleave": True,
            "indexer_rope_interleave": True,
        },
    ),
}


def make_reference(family: str, folder: Path, seed: int = 0) -> torch.nn.Module:
    """A random model of `family`, written to `folder` in float32; its norms, biases and router biases are random too."""
    import transformers

    name, values = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**values)
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) / math.sqrt(parameter.shape[-1]))
        for buffer_name, buffer in model.named_buffers():
            if "e_score_correction_bias" in buffer_name:
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    model.save_pretrained(folder)
    return as_engines_compute(model)


def as_engines_compute(model: torch.nn.Module) -> torch.nn.Module:
    """transformers builds the two latent norms with eps 1e-6; every engine, and we, use the config's. Nor is a padding token
    special."""
    model.get_input_embeddings().padding_idx = None
    for module_name, module in model.named_modules():
        if module_name.endswith(("q_a_layernorm", "kv_a_layernorm")):
            module.variance_epsilon = model.config.rms_norm_eps
    return model.train()


def load_reference(folder: str) -> torch.nn.Module:
    """An existing checkpoint in float32."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return as_engines_compute(model)


def reference_step(
    model: torch.nn.Module, micro_batches: list[list[torch.Tensor]]
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """(log-probabilities per micro-batch, gradient by HF name, fused experts apart) of parity.step's loss, sample by sample,
    unpacked."""
    log_probs = []
    for samples in micro_batches:
        total = sum(len(sample) for sample in samples)
        weights = 1.0 + (torch.arange(total) % 3).float()
        pieces = []
        for sample in samples:
            logits = model(input_ids=sample[None], use_cache=False).logits[0]
            targets = torch.cat([sample[1:], sample[:1]])
            pieces.append(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0])
        values = torch.cat(pieces)
        (weights * values).sum().backward()
        log_probs.append(values.detach())
    return log_probs, dict(_gradients(model))


def _gradients(model: torch.nn.Module):
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        if name.endswith("experts.gate_up_proj"):
            for number, both in enumerate(parameter.grad):
                gate, up = both.chunk(2)
                yield name.replace("gate_up_proj", f"{number}.gate_proj.weight"), gate
                yield name.replace("gate_up_proj", f"{number}.up_proj.weight"), up
        elif name.endswith("experts.down_proj"):
            for number, grad in enumerate(parameter.grad):
                yield name.replace("down_proj", f"{number}.down_proj.weight"), grad
        else:
            yield name, parameter.grad
