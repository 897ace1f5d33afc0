"""Model flags against the HF config: every difference at once, because one at a time costs a launch each."""

from __future__ import annotations

from collections.abc import Mapping

from slime.config.errors import ConfigError

PAIRS: tuple[tuple[str, str, str], ...] = (
    ("num_hidden_layers", "num_layers", "--num-layers"),
    ("hidden_size", "hidden_size", "--hidden-size"),
    ("num_attention_heads", "num_attention_heads", "--num-attention-heads"),
    ("intermediate_size", "ffn_hidden_size", "--ffn-hidden-size"),
    ("rms_norm_eps", "layernorm_epsilon", "--norm-epsilon"),
)
MOE_PAIRS: tuple[tuple[str, str, str], ...] = (
    ("moe_intermediate_size", "moe_ffn_hidden_size", "--moe-ffn-hidden-size"),
    ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "--moe-shared-expert-intermediate-size"),
    ("n_routed_experts", "num_moe_experts", "--num-experts"),
    ("num_experts", "num_moe_experts", "--num-experts"),
    ("num_experts_per_tok", "moe_router_topk", "--moe-router-topk"),
    ("routed_scaling_factor", "moe_router_topk_scaling_factor", "--moe-router-topk-scaling-factor"),
)
MLA_PAIRS: tuple[tuple[str, str, str], ...] = (
    ("q_lora_rank", "q_lora_rank", "--q-lora-rank"),
    ("kv_lora_rank", "kv_lora_rank", "--kv-lora-rank"),
    ("qk_nope_head_dim", "qk_head_dim", "--qk-head-dim"),
    ("qk_rope_head_dim", "qk_pos_emb_head_dim", "--qk-pos-emb-head-dim"),
    ("v_head_dim", "v_head_dim", "--v-head-dim"),
)
GQA_PAIRS: tuple[tuple[str, str, str], ...] = (
    ("num_key_value_heads", "num_query_groups", "--num-query-groups"),
    # GLM-5.2's own head_dim (192) describes nothing, hence only here.
    ("head_dim", "kv_channels", "--kv-channels"),
)
DEFAULTS = {"layernorm_epsilon": 1e-5, "moe_router_topk": 2, "moe_router_topk_scaling_factor": 1.0}
"""What an ungiven flag means, where megatron-core's field default is meant."""

ALLGATHER_CP_ARCHITECTURES = ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")


def text_config(hf: Mapping[str, object]) -> Mapping[str, object]:
    """The language model's part of a multimodal config."""
    inner = hf.get("text_config")
    return inner if isinstance(inner, dict) else hf


def rope_theta(hf: Mapping[str, object]) -> object:
    """RoPE's base; newer configs nest it, and reading only the flat key would silently give a default."""
    nested = hf.get("rope_parameters")
    if isinstance(nested, dict) and "rope_theta" in nested:
        return nested["rope_theta"]
    return hf.get("rope_theta")


def differences(hf_config: Mapping[str, object], v: Mapping[str, object], megatron: Mapping[str, object]) -> list[str]:
    """One line per disagreement of the HF config with the flags. `v`: attributes; `megatron`: TransformerConfig fields."""
    hf = text_config(hf_config)
    lines: list[str] = []

    def compare(key: str, hf_value: object, flag: str, own: object) -> None:
        same = hf_value == own
        if isinstance(hf_value, float) and isinstance(own, int | float):
            same = abs(hf_value - own) <= 1e-9 * max(abs(hf_value), abs(own))
        if not same:
            lines.append(f"{key} is {hf_value} there, {flag} is {'not given' if own is None else own} here")

    pairs = list(PAIRS)
    freq = megatron.get("moe_layer_freq")
    if megatron.get("num_moe_experts") is not None:
        pairs += MOE_PAIRS
        if freq is None or freq == 1 or (isinstance(freq, list) and all(freq)):
            pairs = [pair for pair in pairs if pair[0] != "intermediate_size"]  # no dense layer uses it
    elif hf.get("n_routed_experts") or hf.get("num_experts"):
        lines.append(
            f"the checkpoint has {hf.get('n_routed_experts') or hf.get('num_experts')} experts, --num-experts is not given here"
        )
    pairs += MLA_PAIRS if v["multi_latent_attention"] else GQA_PAIRS if v["group_query_attention"] else ()
    if not v["multi_latent_attention"] and hf.get("kv_lora_rank"):
        lines.append("the checkpoint has multi-latent attention, --multi-latent-attention is not given here")
    for key, name, flag in pairs:
        if hf.get(key) is not None and (key != "num_experts" or "n_routed_experts" not in hf):
            compare(key, hf[key], flag, megatron.get(name, _default(name, megatron)))
    if hf_config.get("tie_word_embeddings", hf.get("tie_word_embeddings")) is not None:
        tied = hf_config.get("tie_word_embeddings", hf.get("tie_word_embeddings"))
        if tied == v["untie_embeddings_and_output_weights"]:
            lines.append(f"tie_word_embeddings is {tied} there, --untie-embeddings-and-output-weights is "
                         f"{'given' if v['untie_embeddings_and_output_weights'] else 'not given'} here")  # fmt: skip
    if rope_theta(hf) is not None:
        compare("rope_theta", float(rope_theta(hf)), "--rotary-base", v["rotary_base"])  # type: ignore[arg-type]
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters")
    if v["multi_latent_attention"] and isinstance(scaling, dict) and "factor" in scaling:
        compare(
            "rope_scaling.factor", float(scaling["factor"]), "--rotary-scaling-factor", megatron.get("rotary_scaling_factor")
        )
    if hf.get("vocab_size") is not None and v["vocab_size"] is not None:
        compare("vocab_size", hf["vocab_size"], "--vocab-size", v["vocab_size"])
    lines += _layer_kinds(hf, megatron)
    if not v["multi_latent_attention"]:
        if hf.get("attention_bias") is not None:
            compare("attention_bias", hf["attention_bias"], "--add-qkv-bias", megatron.get("add_qkv_bias", False))
        if rope_theta(hf) is not None:
            compare("partial_rotary_factor", _rotary_share(hf), "--rotary-percent", v["rotary_percent"])  # type: ignore[arg-type]
    if hf.get("model_type") is not None:
        for name in ("post_self_attn_layernorm", "post_mlp_layernorm"):
            if v[name] != (hf["model_type"] == "glm4"):
                flag = "--" + name.replace("_", "-")
                lines.append(f"model_type is {hf['model_type']} there, {flag} is {'given' if v[name] else 'not given'} here")
    return lines


def _default(name: str, megatron: Mapping[str, object]) -> object:
    """What megatron-core takes when a flag is not given."""
    if name == "kv_channels":
        return int(megatron["hidden_size"]) // int(megatron["num_attention_heads"])  # type: ignore[call-overload]
    return DEFAULTS.get(name)


def _rotary_share(hf: Mapping[str, object]) -> float:
    nested = hf.get("rope_parameters")
    nested = nested if isinstance(nested, dict) else {}
    fallback = 0.5 if hf.get("model_type") == "glm4" else 1.0  # transformers' own default of that family
    return float(nested.get("partial_rotary_factor", hf.get("partial_rotary_factor", fallback)))  # type: ignore[arg-type]


def _layer_kinds(hf: Mapping[str, object], megatron: Mapping[str, object]) -> list[str]:
    """Dense and expert layers, where the HF config says which is which."""
    dense, freq, layers = hf.get("first_k_dense_replace"), megatron.get("moe_layer_freq", 1), megatron.get("num_layers")
    if dense is None or megatron.get("num_moe_experts") is None or not isinstance(layers, int):
        return []
    own = freq if isinstance(freq, list) else [int(i % freq == 0) for i in range(layers)]  # type: ignore[operator, arg-type]
    wanted = [int(i >= dense) for i in range(layers)]  # type: ignore[operator]
    if own == wanted:
        return []
    return [f"first_k_dense_replace is {dense} there, --moe-layer-freq has {own.count(0)} dense layers of {len(own)} here"]


def check(hf_config: Mapping[str, object], v: Mapping[str, object], megatron: Mapping[str, object], *, folder: str) -> None:
    """Raises ConfigError with the list of differences."""
    lines = differences(hf_config, v, megatron)
    if lines:
        raise ConfigError(f"the model flags disagree with {folder}/config.json:\n  " + "\n  ".join(lines))
