"""What an HF config means in megatron-core's words; used to check MODEL_ARGS against a checkpoint, and by small models in
tests."""

from __future__ import annotations

from collections.abc import Mapping

from slime.model.hf_config import HfConfig


def megatron_values(hf: HfConfig) -> dict[str, object]:
    """TransformerConfig / MLATransformerConfig fields that the HF config decides."""
    values: dict[str, object] = {
        "num_layers": hf.num_layers,
        "hidden_size": hf["hidden_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "ffn_hidden_size": hf["intermediate_size"],
        "layernorm_epsilon": hf["rms_norm_eps"],
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": True,
    }
    values.update(_mla(hf) if hf.is_mla else _gqa(hf))
    if hf.num_experts:
        values.update(_moe(hf))
    return values


def _mla(hf: HfConfig) -> dict[str, object]:
    return {
        "multi_latent_attention": True,
        "q_lora_rank": hf.get("q_lora_rank"),
        "kv_lora_rank": hf["kv_lora_rank"],
        "qk_head_dim": hf["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": hf["qk_rope_head_dim"],
        "v_head_dim": hf["v_head_dim"],
        "qk_layernorm": True,
    }


def _gqa(hf: HfConfig) -> dict[str, object]:
    return {
        "num_query_groups": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "kv_channels": hf.head_dim,
        "qk_layernorm": hf.model_type in ("qwen3", "qwen3_moe"),
        "add_qkv_bias": bool(hf.get("attention_bias", False)),
    }


def _moe(hf: HfConfig) -> dict[str, object]:
    values: dict[str, object] = {
        "num_moe_experts": hf.num_experts,
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_layer_freq": [int(hf.is_moe_layer(layer)) for layer in range(hf.num_layers)],
    }
    if hf.model_type == "qwen3_moe":
        if not hf.get("norm_topk_prob", False):
            raise ValueError(f"{hf.source}: Qwen3-MoE without norm_topk_prob is not supported")
        return values
    values.update(
        moe_router_score_function="sigmoid",
        moe_router_pre_softmax=True,
        moe_router_enable_expert_bias=True,
        moe_router_topk_scaling_factor=hf["routed_scaling_factor"],
    )
    if shared := hf.get("n_shared_experts", 0):
        values["moe_shared_expert_intermediate_size"] = shared * hf["moe_intermediate_size"]
    if hf.get("n_group", 1) > 1:
        if hf["num_experts_per_tok"] != 2 * hf["topk_group"]:
            # megatron-core ranks groups by their best topk // topk_group experts, DeepSeek by their best two.
            raise ValueError(
                f"{hf.source}: group-limited routing with {hf['num_experts_per_tok']} experts of "
                f"{hf['topk_group']} groups differs "
                f"between megatron-core and the released models; only two experts per chosen group are supported"
            )
        values.update(moe_router_num_groups=hf["n_group"], moe_router_group_topk=hf["topk_group"])
    return values


_FLAGS = {
    "num_moe_experts": "--num-experts",
    "layernorm_epsilon": "--norm-epsilon",
    "gated_linear_unit": "--swiglu",
    "add_bias_linear": "--disable-bias-linear",
}


def differences(given: Mapping[str, object], model: object, hf: HfConfig) -> list[str]:
    """One line per value in which MODEL_ARGS and the checkpoint's config.json disagree; empty when they describe one model.

    given: the fields of the TransformerConfig that the flags produced, defaults included. model: the config's model section
    (rotary_base, vocab_size, tying).
    """
    lines = []
    for name, wanted in megatron_values(hf).items():
        found = given.get(name)
        if name == "moe_layer_freq":
            found = _as_pattern(found, hf.num_layers)
        if name == "ffn_hidden_size" and hf.num_experts and all(megatron_values(hf)["moe_layer_freq"]):
            continue
        if found != wanted:
            flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
            lines.append(f"{flag}: MODEL_ARGS say {found!r}, {hf.source} says {wanted!r}")
    if float(model.rotary_base) != hf.rope_theta:
        lines.append(f"--rotary-base: MODEL_ARGS say {model.rotary_base:g}, {hf.source} says {hf.rope_theta:g} (rope_theta)")
    if model.vocab_size is not None and model.vocab_size < hf["vocab_size"]:
        lines.append(f"--vocab-size: MODEL_ARGS say {model.vocab_size}, {hf.source} says {hf['vocab_size']}")
    tied = bool(hf.get("tie_word_embeddings", False))
    if tied == model.untie_embeddings_and_output_weights:
        want = "leave it out" if tied else "pass it"
        lines.append(f"--untie-embeddings-and-output-weights: {hf.source} has tie_word_embeddings {tied}; {want}")
    return lines


def _as_pattern(value: object, num_layers: int) -> list[int] | None:
    """--moe-layer-freq N means every N-th layer, the first one included; absent means every layer."""
    if value is None:
        value = 1
    if isinstance(value, int):
        return [int(layer % value == 0) for layer in range(num_layers)]
    return list(value)
