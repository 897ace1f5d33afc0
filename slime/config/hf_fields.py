"""Every field that a config.json may hold, family by family: used, with the value that the code assumes, or without meaning.

A closed list, because a field that nobody reads may change what the model computes, and training would go on as another model
than the one that is served. Fields of a checkpoint whose family is not here are not looked at: the family itself is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from slime.config.errors import nearest
from slime.config.hf_config import HfConfig

NOTHING_COMPUTED = frozenset(
    # who wrote the file, and what generation, old transformers or a trainer kept in it
    """transformers_version architectures auto_map _name_or_path _commit_hash use_cache initializer_range
    tokenizer_class task_specific_params id2label label2id problem_type finetuning_task return_dict return_dict_in_generate
    output_hidden_states output_attentions output_scores output_router_logits output_past chunk_size_feed_forward
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id unk_token_id cls_token_id mask_token_id
    forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens bad_words_ids prefix
    do_sample temperature top_k top_p typical_p max_length min_length max_new_tokens num_beams num_beam_groups
    num_return_sequences
    diversity_penalty repetition_penalty length_penalty no_repeat_ngram_size
    exponential_decay_length_penalty encoder_no_repeat_ngram_size early_stopping remove_invalid_values
    tf_legacy_loss torchscript use_bfloat16 pruned_heads
    router_aux_loss_coef aux_loss_alpha seq_aux ep_size moe_router_dtype pretraining_tp
    unsloth_version unsloth_fixed model_max_length _attn_implementation _attn_implementation_autoset attn_implementation
    _experts_implementation""".split()
)
"""Fields that change nothing about what the model computes."""

COMMON = frozenset(
    """model_type vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size rms_norm_eps
    max_position_embeddings tie_word_embeddings rope_theta rope_parameters rope_scaling quantization_config
    text_config""".split()
)
"""Used by every family."""

_GQA = frozenset("num_key_value_heads head_dim".split())
_MLA = frozenset("q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim qk_head_dim v_head_dim rope_interleave".split())
_EXPERTS = frozenset("moe_intermediate_size num_experts_per_tok".split())
_ROUTED = _EXPERTS | frozenset(
    """n_routed_experts n_shared_experts routed_scaling_factor n_group topk_group first_k_dense_replace moe_layer_freq
    num_nextn_predict_layers mlp_layer_types""".split()
)
_INDEXER = frozenset(
    """index_topk index_head_dim index_n_heads index_topk_freq index_skip_topk_offset index_topk_pattern indexer_types
    indexer_rope_interleave""".split()
)
# MLA's key/value heads are nominal, and head_dim is a rest of another model; num_local_experts repeats n_routed_experts.
_NOMINAL = frozenset("num_key_value_heads head_dim num_local_experts num_experts".split())

ASSUMED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, 0.0),
    "hidden_dropout": (0, 0.0),
    "mlp_bias": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (),
    "is_decoder": (False, True),
    "use_mrope": (False,),
    "partial_rotary_factor": (1.0, 1),
    "num_nextn_predict_layers": (0,),
    "quantization": (),
    "dtype": ("bfloat16", "float16", "float32"),
    "torch_dtype": ("bfloat16", "float16", "float32"),
}
"""Of every family: field -> the values that the code assumes; a field that is absent or null has the first one."""

_FULL = {"layer_types": ("full_attention",), "use_sliding_window": (False,), "sliding_window": ()}
_SIGMOID = {
    "attention_bias": (False,),
    "norm_topk_prob": (True,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
}
_HAS_SWITCH = ("qwen2", "qwen3", "qwen3_moe", "mimo")
"""Families whose windows are off unless use_sliding_window says so."""
_SPARSE = {"layer_types": ("indexed_attention", "deepseek_sparse_attention")}


@dataclass(frozen=True)
class Family:
    """What config.json of one model_type may hold beyond COMMON and ASSUMED."""

    used: frozenset[str]
    assumed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()
    """Without meaning in this family."""


_LATENT = Family(_MLA | _ROUTED, _SIGMOID, _NOMINAL)
_INDEXED = Family(
    _MLA | _ROUTED | _INDEXER, {**_SIGMOID, **_SPARSE}, _NOMINAL | {"index_share_for_mtp_iteration"}
)  # the last one is about draft models of an engine

FAMILIES: dict[str, Family] = {
    "qwen2": Family(_GQA, {**_FULL, "attention_bias": (True,)}, frozenset({"max_window_layers"})),
    "qwen3": Family(_GQA, {**_FULL, "attention_bias": (False,)}, frozenset({"max_window_layers"})),
    "qwen3_moe": Family(
        _GQA | _EXPERTS | {"num_experts", "num_local_experts", "decoder_sparse_step", "mlp_only_layers"},
        {**_FULL, "attention_bias": (False,), "norm_topk_prob": (True,)},
        frozenset({"max_window_layers"}),
    ),
    "mimo": Family(_GQA | {"attention_bias"}, _FULL, frozenset({"max_window_layers", "num_nextn_predict_layers"})),
    "llama": Family(_GQA, {**_FULL, "attention_bias": (False,)}),
    "glm4": Family(_GQA | {"attention_bias", "partial_rotary_factor"}, _FULL),
    "glm4_moe": Family(
        _GQA | _ROUTED | {"attention_bias", "partial_rotary_factor", "use_qk_norm"},
        {**_FULL, **{name: value for name, value in _SIGMOID.items() if name != "attention_bias"}},
        frozenset({"num_local_experts", "num_experts"}),
    ),
    "glm4_moe_lite": _LATENT,
    "deepseek_v3": _LATENT,
    "kimi_k2": _LATENT,
    "deepseek_v32": _INDEXED,
    "glm_moe_dsa": _INDEXED,
}
"""model_type -> its fields: the families that can be trained."""

MISSING = {
    "qwen3_next": "gated delta attention",
    "qwen3_5": "gated delta attention",
    "qwen3_5_moe": "gated delta attention",
    "gpt_oss": "attention sinks, sliding windows and biased experts",
    "gemma3_text": "sliding windows",
    "gemma4": "sliding windows",
    "nemotron_h": "Mamba layers",
    "kimi_linear": "gated delta attention",
    "qwen2_moe": "a gate on the shared expert",
}
"""Public families without a table here -> what they need that the layers lack."""

_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "yarn": (
        "factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim attention_factor truncate".split()
    ),
    "llama3": "factor low_freq_factor high_freq_factor original_max_position_embeddings".split(),
}
_QUANTIZATION = frozenset(
    """quant_method fmt activation_scheme weight_block_size scale_fmt modules_to_not_convert ignored_layers
    dequantize""".split()
)


def unknown_family(model_type: object, source: str) -> str:
    """One line for a model_type that is not in FAMILIES."""
    needs = MISSING.get(str(model_type))
    why = f"it needs {needs}, which no layer here has" if needs else "no weight-name table knows it"
    known = ", ".join(sorted(FAMILIES))
    return f"{source} is a {model_type} model: {why} ({known}); train a model of one of these families"


def faults(hf: HfConfig) -> list[str]:
    """One line for every field of which the code would compute something else than config.json says; none for a known model."""
    if hf.get("model_type") not in FAMILIES:
        return [unknown_family(hf.get("model_type"), hf.source)]
    return [f"{hf.source}: {line}" for line in _faults(hf, FAMILIES[hf.model_type])]


def _faults(hf: HfConfig, family: Family) -> Iterator[str]:
    assumed = {name: values for name, values in ASSUMED.items() if name not in family.used | family.unread} | family.assumed
    known = COMMON | NOTHING_COMPUTED | family.used | family.unread | set(assumed)
    for name, value in hf.items():
        if value is None or name in known and name not in assumed:
            continue
        if name not in known:
            yield (
                f"{name} {value!r:.60} is not known for a {hf.model_type} model{nearest(name, known)}; if it changes nothing "
                "about what the model computes, remove it from config.json"
            )
        elif wrong := _unexpected(name, value, assumed[name], hf):
            yield wrong
    if family is _INDEXED and hf.get("index_topk") is None:
        yield "index_topk is missing: how many keys does a query attend to?"
    yield from _rope_faults(hf)
    if hf.num_experts and hf.get("num_experts_per_tok") is not None:
        yield from _router_faults(hf)
    if (quantization := hf.get("quantization_config")) is not None:
        yield from _quantization_faults(quantization)
    if "qk_head_dim" in family.used and hf.get("qk_head_dim") not in (
        None,
        sum(parts := (hf.get("qk_nope_head_dim", 0), hf.get("qk_rope_head_dim", 0))),
    ):
        yield f"qk_head_dim {hf['qk_head_dim']} is not the sum of qk_nope_head_dim {parts[0]} and qk_rope_head_dim {parts[1]}"


def _unexpected(name: str, value: object, allowed: Sequence[object], hf: HfConfig) -> str | None:
    if name == "sliding_window" and hf.model_type in _HAS_SWITCH and not hf.get("use_sliding_window", False):
        return None  # the width of a window that is off
    values = value if isinstance(value, list) and name == "layer_types" else [value]
    odd = [one for one in values if not any(_equal(one, good) for good in allowed)]
    if not odd:
        return None
    only = " or ".join(repr(good) for good in allowed[:2]) or "null"
    return f"{name} is {odd[0]!r:.60}, and what is trained here has {only}"


def _equal(one: object, other: object) -> bool:
    # True == 1 in Python, and a flag is no number.
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _rope_faults(hf: HfConfig) -> Iterator[str]:
    for name in ("rope_parameters", "rope_scaling"):
        given = hf.get(name)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            yield f"{name} is {given!r:.60}, no mapping"
            continue
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in _ROPE_KEYS:
            yield f"{name}: rope_type {kind!r} is not supported{nearest(str(kind), _ROPE_KEYS)} ({', '.join(_ROPE_KEYS)})"
            continue
        known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_KEYS[kind]}
        for key, value in given.items():
            if value is not None and key not in known:
                yield f"{name}: {key} {value!r:.60} is not known for {kind} positions{nearest(key, known)}"
            elif value is not None and key not in ("rope_type", "type") and not isinstance(value, int | float):
                yield f"{name}: {key} is {value!r:.60}, no number"
        share = given.get("partial_rotary_factor", 1.0)
        if share != 1.0 and "partial_rotary_factor" not in FAMILIES[hf.model_type].used:
            yield f"{name}: partial_rotary_factor is {share}, and a {hf.model_type} model turns whole heads"
        if given.get("truncate", True) is False:
            yield f"{name}: truncate is False, and the bounds of YaRN's ramp are whole numbers here"
        if kind != "default" and given.get("factor") is None:
            yield f"{name}: {kind} positions need a factor"
    both = [hf.get(name) for name in ("rope_parameters", "rope_scaling")]
    if all(isinstance(one, Mapping) for one in both) and any(both[0].get(key) != both[1][key] for key in both[1]):
        yield f"rope_parameters {dict(both[0])!r} and rope_scaling {dict(both[1])!r} differ; remove one of them"
    if "rope_theta" in hf and hf.get("rope_theta") is not None and hf.rope_theta != float(hf["rope_theta"]):
        yield f"rope_theta is {hf['rope_theta']}, rope_parameters say {hf.rope_theta:g}; remove one of them"


def _router_faults(hf: HfConfig) -> Iterator[str]:
    topk, shown = hf["num_experts_per_tok"], "num_experts_per_tok"
    if topk < 2:
        # The released models divide by the sum of the chosen probabilities, megatron-core does not for a single one.
        yield f"{shown} is {topk}, and a single expert's weight is not normalised here; 2 or more can be trained"
    if hf.model_type == "qwen3_moe" and not hf.get("norm_topk_prob", False):
        yield "norm_topk_prob is false, and what is trained here normalises the weights of the chosen experts"
    if (hf.get("topk_group") or 1) > (hf.get("n_group") or 1):
        yield f"topk_group is {hf.get('topk_group')}, more than the {hf.get('n_group') or 1} groups of n_group"
    if hf.get("n_group", 1) > 1 and topk != 2 * hf.get("topk_group", 1):
        # megatron-core ranks groups by their best topk // topk_group experts, DeepSeek by their best two.
        groups = hf.get("topk_group")
        yield f"{shown} {topk} of topk_group {groups} groups, and only two experts per chosen group are routed as there"
    kinds, dense = hf.get("mlp_layer_types"), hf.get("first_k_dense_replace")
    if kinds is not None and dense is not None:
        wanted = ["dense" if layer < dense else "sparse" for layer in range(hf.num_layers)]
        if list(kinds)[: hf.num_layers] != wanted:
            yield f"mlp_layer_types has {list(kinds).count('dense')} dense layers, first_k_dense_replace says the first {dense}"


def _quantization_faults(quantization: object) -> Iterator[str]:
    if not isinstance(quantization, Mapping):
        yield f"quantization_config is {quantization!r:.60}, no mapping"
        return
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8":
        yield (
            f"quantization_config: quant_method is {method!r}; weights in BF16, or in FP8 (e4m3) with square blocks, can be "
            "read: take such a release"
        )
        return
    for key, value in quantization.items():
        if value is not None and key not in _QUANTIZATION:
            yield f"quantization_config: {key} {value!r:.60} is not known{nearest(key, _QUANTIZATION)}"
    if quantization.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        yield f"quantization_config: fmt is {quantization['fmt']!r}, and e4m3 is read"
    if quantization.get("scale_fmt") not in (None, "ue8m0", "float"):
        yield f"quantization_config: scale_fmt is {quantization['scale_fmt']!r}; ue8m0 and float are read"
    if quantization.get("activation_scheme", "dynamic") != "dynamic":
        yield f"quantization_config: activation_scheme is {quantization['activation_scheme']!r}, and dynamic is served"
    if not isinstance(block, list | tuple) or len(block) != 2 or block[0] != block[1]:
        yield f"quantization_config: weight_block_size is {block!r}; blocks must be square, as [128, 128]"
