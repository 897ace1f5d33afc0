"""Model flags against the HF config, in both directions and all differences at once, because one at a time costs a launch each.

`megatron_values` is what config.json means in megatron-core's words. A flag of a field that is not among them must leave the
model as it is (`NEUTRAL`): otherwise it would be accepted, and another model would be trained than it describes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from slime.config.hf_config import HfConfig
from slime.config.megatron_flags import default_of

ALLGATHER_CP_ARCHITECTURES = ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")

# megatron-core field -> (flag, key of config.json that says it)
_NAMES: dict[str, tuple[str, str]] = {
    "num_layers": ("--num-layers", "num_hidden_layers"),
    "ffn_hidden_size": ("--ffn-hidden-size", "intermediate_size"),
    "layernorm_epsilon": ("--norm-epsilon", "rms_norm_eps"),
    "gated_linear_unit": ("--swiglu", "a gated feed-forward"),
    "add_bias_linear": ("--disable-bias-linear", "mlp_bias"),
    "num_query_groups": ("--num-query-groups", "num_key_value_heads"),
    "kv_channels": ("--kv-channels", "head_dim"),
    "add_qkv_bias": ("--add-qkv-bias", "attention_bias"),
    "qk_head_dim": ("--qk-head-dim", "qk_nope_head_dim"),
    "qk_pos_emb_head_dim": ("--qk-pos-emb-head-dim", "qk_rope_head_dim"),
    "num_moe_experts": ("--num-experts", "n_routed_experts"),
    "moe_ffn_hidden_size": ("--moe-ffn-hidden-size", "moe_intermediate_size"),
    "moe_router_topk": ("--moe-router-topk", "num_experts_per_tok"),
    "moe_router_topk_scaling_factor": ("--moe-router-topk-scaling-factor", "routed_scaling_factor"),
    "moe_shared_expert_intermediate_size": ("--moe-shared-expert-intermediate-size", "the shared experts' width"),
    "moe_router_num_groups": ("--moe-router-num-groups", "n_group"),
    "moe_router_group_topk": ("--moe-router-group-topk", "topk_group"),
    "layernorm_zero_centered_gamma": ("--apply-layernorm-1p", "layernorm_zero_centered_gamma"),
    "rotary_scaling_factor": ("--rotary-scaling-factor", "rope_scaling.factor"),
}

NEUTRAL: dict[str, tuple[object, ...]] = {
    "softmax_scale": (None,),
    "softmax_type": ("vanilla",),
    "window_size": (None,),
    "window_attn_skip_freq": (None,),
    "qk_clip": (False,),
    "qk_clip_alpha": (0.5,),
    "qk_clip_threshold": (100,),
    "qk_l2_norm": (False,),
    "no_rope_freq": (None,),
    "attention_output_gate": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0.0,),
    "use_te_activation_func": (False,),
    "moe_shared_expert_gate": (False,),
    "moe_latent_size": (None,),
    "moe_router_force_load_balancing": (False,),
    "moe_expert_capacity_factor": (None,),
    "moe_pad_expert_input_to_capacity": (False,),
    "moe_input_jitter_eps": (None, 0.0),
    "moe_apply_probs_on_input": (False,),
    "mrope_section": (None,),
}
"""Fields that would make another model -> the values that leave it as config.json describes it."""


def text_config(hf: Mapping[str, object]) -> Mapping[str, object]:
    """The language model's part of a multimodal config."""
    inner = hf.get("text_config")
    return inner if isinstance(inner, dict) else hf


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
        "qk_layernorm": hf.has_qk_norm,
        "add_qkv_bias": hf.has_qkv_bias,
    }


def _moe(hf: HfConfig) -> dict[str, object]:
    values: dict[str, object] = {
        "num_moe_experts": hf.num_experts,
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_layer_freq": [int(hf.is_moe_layer(layer)) for layer in range(hf.num_layers)],
    }
    if hf.has_softmax_router:
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
        values.update(moe_router_num_groups=hf["n_group"], moe_router_group_topk=hf["topk_group"])
    return values


def differences(hf_config: Mapping[str, object], v: Mapping[str, object], megatron: Mapping[str, object]) -> list[str]:
    """One line per disagreement of the HF config with the flags, the way out after its last semicolon; none for one model.

    v: attributes of the model section. megatron: the TransformerConfig fields that flags gave or rules derived.
    """
    hf = hf_config if isinstance(hf_config, HfConfig) else HfConfig(hf_config)
    given = {"multi_latent_attention": v["multi_latent_attention"], "gated_linear_unit": v["swiglu"]}
    megatron = {**megatron, **{name: bool(value or megatron.get(name)) for name, value in given.items()}}
    return [*_fields(hf, megatron), *_positions(hf, v, megatron), *_rest(hf, v)]


def _fields(hf: HfConfig, megatron: Mapping[str, object]) -> Iterator[str]:
    wanted = megatron_values(hf)
    if bool(megatron.get("multi_latent_attention")) != hf.is_mla:
        given, other = ("given", "grouped-query") if not hf.is_mla else ("not given", "multi-latent")
        yield f"the checkpoint has {other} attention, --multi-latent-attention is {given} here"
        wanted = {name: value for name, value in wanted.items() if name not in {*_NEITHER, "multi_latent_attention"}}
    if not hf.num_experts and megatron.get("num_moe_experts") is not None:
        yield f"the checkpoint has no experts, --num-experts is {megatron['num_moe_experts']} here; leave it out"
    if hf.num_experts and megatron.get("num_moe_experts") is None:
        yield f"the checkpoint has {hf.num_experts} experts, --num-experts is not given here"
        wanted = {name: value for name, value in wanted.items() if "moe" not in name}
    if hf.num_experts and all(wanted.get("moe_layer_freq", [0])):
        wanted.pop("ffn_hidden_size", None)  # no dense layer uses it
    for name, value in wanted.items():
        own = _own(name, hf, megatron)
        if not _same(value, own):
            yield _difference(name, value, own, hf)
    for name in sorted(set(megatron) - set(wanted) - {"multi_latent_attention"}):
        yield from _ungrounded(name, hf, megatron[name])


# Without --q-lora-rank there is no query latent, as in Megatron's own parser; megatron-core's dataclass would take 512.
_LATENT_DEFAULTS = {"q_lora_rank": None, "normalization": "RMSNorm"}
_NEITHER = tuple(
    """q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim num_query_groups kv_channels add_qkv_bias
    qk_layernorm""".split()
)
"""What only one kind of attention has."""


def _own(name: str, hf: HfConfig, megatron: Mapping[str, object]) -> object:
    """The field's value as megatron-core completes the flags."""
    if name == "moe_layer_freq":
        value = megatron.get(name, 1)
        return [int(layer % value == 0) for layer in range(hf.num_layers)] if isinstance(value, int) else list(value)  # type: ignore[call-overload]
    if megatron.get(name) is None and name == "num_query_groups":
        return megatron.get("num_attention_heads")
    if megatron.get(name) is None and name == "kv_channels":
        heads = megatron.get("num_attention_heads")
        return int(megatron["hidden_size"]) // int(heads) if heads else None  # type: ignore[call-overload]
    if name not in megatron and megatron.get("multi_latent_attention") and name in _LATENT_DEFAULTS:
        return _LATENT_DEFAULTS[name]
    return megatron.get(name, default_of(name))


def _same(wanted: object, own: object) -> bool:
    if isinstance(wanted, float | int) and isinstance(own, float | int) and not isinstance(wanted, bool):
        return abs(wanted - own) <= 1e-9 * max(abs(wanted), abs(own))
    return wanted == own


def _difference(name: str, wanted: object, own: object, hf: HfConfig) -> str:
    flag, key = _NAMES.get(name, (f"--{name.replace('_', '-')}", name))
    if name == "num_moe_experts":
        key = next(key for key in ("n_routed_experts", "num_experts", "num_local_experts") if hf.get(key))
    if isinstance(wanted, list) and isinstance(own, list):
        dense = next((key for key in ("first_k_dense_replace", "decoder_sparse_step") if key in hf), "mlp_layer_types")
        told = f"{dense} is {hf.get(dense)} there, {flag} has {own.count(0)} dense layers of {len(own)} here"
        return f"{told}; pass {flag} {str(wanted).replace(' ', '')!r}"
    if isinstance(wanted, bool):
        asked = wanted if name != "add_bias_linear" else not wanted
        given = own if name != "add_bias_linear" else not own
        return (
            f"{key} is {wanted} there, {flag} is {'given' if given else 'not given'} here; "
            f"{f'pass {flag}' if asked else f'leave {flag} out'}"
        )
    remedy = f"leave {flag} out" if wanted is None else f"pass {flag} {wanted}"
    return f"{key} is {wanted} there, {flag} is {'not given' if own is None else own} here; {remedy}"


def _ungrounded(name: str, hf: HfConfig, own: object) -> Iterator[str]:
    """A field that config.json does not decide: it must change nothing."""
    if hf.is_mla and name in ("num_query_groups", "kv_channels", "add_qkv_bias"):
        return  # nominal: latent attention reads none of them, here or in Megatron, and public scripts give them
    flag, _ = _NAMES.get(name, (f"--{name.replace('_', '-')}", name))
    allowed = NEUTRAL.get(name)
    if name == "rotary_interleaved":
        allowed = (True, False) if hf.is_mla else (hf.model_type == "glm4",)
    elif name in ("moe_router_num_groups", "moe_router_group_topk"):
        allowed = (None, 1)
    elif name in ("moe_router_score_function", "moe_router_pre_softmax", "moe_router_enable_expert_bias", "add_qkv_bias",
                  "moe_shared_expert_intermediate_size", "qk_layernorm"):  # fmt: skip
        allowed = (default_of(name), 0 if name.endswith("size") else default_of(name))
    elif name == "moe_router_topk_scaling_factor":
        allowed = (None, 1.0)
    elif name in _NEITHER:
        allowed = ()
    if allowed is not None and not any(_same(good, own) for good in allowed):
        yield f"{flag} {own} would make another model than the {hf.model_type} that config.json describes; leave it out"


def _positions(hf: HfConfig, v: Mapping[str, object], megatron: Mapping[str, object]) -> Iterator[str]:
    """RoPE: the base, the share of a head, and for latent attention how YaRN stretches it. What is trained follows config.json;
    flags only may not say otherwise."""
    base, theta = float(v["rotary_base"]), hf.rope_theta  # type: ignore[arg-type]
    if not _same(theta, base):
        yield (
            f"rope_theta is {theta} there, --rotary-base is {base} here; pass --rotary-base {theta:.0f} (a file of "
            f"scripts/models takes MODEL_ARGS_ROTARY_BASE={theta:.0f} before it is sourced)"
        )
    if v["position_embedding_type"] == "yarn" and hf.rope_parameters["rope_type"] != "yarn":
        yield f"rope_type is {hf.rope_parameters['rope_type']} there, --position-embedding-type is yarn here; pass rope"
    kind, factor = hf.rope_parameters["rope_type"], hf.rope_parameters.get("factor")
    if v["use_rope_scaling"] and kind != "llama3":
        yield f"rope_type is {kind} there, --use-rope-scaling asks for llama3 here; leave --use-rope-scaling out"
    elif v["use_rope_scaling"] and not _same(factor, v["rope_scaling_factor"]):
        asked = v["rope_scaling_factor"]
        flag = "--rope-scaling-factor"
        yield f"rope_parameters.factor is {factor} there, {flag} is {asked} here; pass {flag} {factor}"
    share = hf.partial_rotary_factor if not hf.is_mla else 1.0
    if not _same(share, v["rotary_percent"]):
        yield (
            f"partial_rotary_factor is {share:g} there, --rotary-percent is {v['rotary_percent']:g} here; "
            f"pass --rotary-percent {share:g}"
        )
    if not (v["multi_latent_attention"] and hf.is_mla):
        return
    rope = hf.rope_parameters
    yarn = rope["rope_type"] == "yarn"
    factor = float(rope.get("factor") or 1.0) if yarn else 1.0
    kinds = ("yarn",) if yarn and factor != 1.0 else ("rope", "yarn")
    if not _same(factor, megatron.get("rotary_scaling_factor", 1.0)):
        yield _difference("rotary_scaling_factor", factor, megatron.get("rotary_scaling_factor"), hf)
    if megatron.get("rope_type", kinds[0]) not in kinds:
        yield f"rope_type is {rope['rope_type']} there, --rope-type is {megatron['rope_type']} here; leave it out"
    meant = {"mscale": rope.get("mscale"), "mscale_all_dim": rope.get("mscale_all_dim"),
             "beta_fast": rope.get("beta_fast", 32), "beta_slow": rope.get("beta_slow", 1),
             "original_max_position_embeddings": rope.get("original_max_position_embeddings") if yarn else None}  # fmt: skip
    for name, value in meant.items():
        if name not in megatron or (name.startswith("orig") and value is None):
            continue
        allowed = (value if value is not None else 1.0, default_of(name) if value is None else value)
        if not any(_same(good, megatron[name]) for good in allowed):
            flag = f"--{name.replace('_', '-')}"
            yield f"rope_scaling.{name} is {value} there, {flag} is {megatron[name]} here; pass {flag} {allowed[0]}"


def _rest(hf: HfConfig, v: Mapping[str, object]) -> Iterator[str]:
    """Head, vocabulary, and the norms that only GLM-4 has."""
    tied, untied = bool(hf.get("tie_word_embeddings", False)), v["untie_embeddings_and_output_weights"]
    if tied == untied:
        flag = "--untie-embeddings-and-output-weights"
        yield f"tie_word_embeddings is {tied} there, {flag} is {'given' if untied else 'not given'} here; " + (
            f"leave {flag} out" if tied else f"pass {flag}"
        )
    own, vocab = v["vocab_size"], hf["vocab_size"]
    if own is not None and own != vocab:
        yield f"vocab_size is {vocab} there, --vocab-size is {own} here; pass --vocab-size {vocab}"
    for name in ("post_self_attn_layernorm", "post_mlp_layernorm"):
        if v[name] != hf.has_sandwich_norms:
            flag = "--" + name.replace("_", "-")
            yield (
                f"model_type is {hf.model_type} there, {flag} is {'given' if v[name] else 'not given'} here; "
                f"{f'pass {flag}' if hf.has_sandwich_norms else f'leave {flag} out'}"
            )
