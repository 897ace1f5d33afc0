"""Fields of config.json have the types that every later rule relies on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from slime.config.hf_check import text_config

if TYPE_CHECKING:
    from slime.config.rules.book import Values

COUNTS = frozenset(
    """num_hidden_layers hidden_size num_attention_heads num_key_value_heads intermediate_size vocab_size head_dim
    moe_intermediate_size num_experts_per_tok kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim
    max_position_embeddings index_topk index_head_dim index_n_heads index_topk_freq decoder_sparse_step""".split()
)
"""At least 1."""
SIZES = frozenset(
    """n_routed_experts num_experts num_local_experts n_shared_experts shared_expert_intermediate_size first_k_dense_replace
    index_skip_topk_offset num_nextn_predict_layers n_group topk_group""".split()
)
"""At least 0."""
NUMBERS = frozenset("rms_norm_eps rope_theta routed_scaling_factor partial_rotary_factor".split())
SWITCHES = frozenset("tie_word_embeddings attention_bias norm_topk_prob".split())
MAPPINGS = frozenset("rope_parameters rope_scaling quantization_config text_config".split())
LISTS = frozenset("architectures mlp_only_layers indexer_types layer_types".split())


def types(v: Values) -> None:
    """A field of the wrong type makes the whole file unknown to the rules that follow."""
    raw = v.facts.hf_config
    if raw is None:
        return
    before = len(v.mistakes)
    for part in (raw, text_config(raw)) if "text_config" in raw else (raw,):
        for name, value in part.items():
            wanted = _wanted(name, value)
            v.require(
                not wanted, f"{v['hf_checkpoint']}/config.json: {name} is {value!r:.60}, it must be {wanted}; repair the file"
            )
    if len(v.mistakes) > before:
        v.facts = replace(v.facts, hf_config=None)


def _wanted(name: str, value: object) -> str:
    """What the field must be; empty when it is."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is None:
        return ""  # as if it were not there
    if name in COUNTS:
        return "" if whole and value >= 1 else "a whole number above 0"
    if name in SIZES:
        return "" if whole and value >= 0 else "a whole number, 0 or above"
    if name in NUMBERS:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return "" if number and 0 < value < float("inf") else "a number above 0"
    if name in SWITCHES:
        return "" if isinstance(value, bool) else "true or false"
    if name in MAPPINGS:
        if not isinstance(value, dict):
            return "an object"
        block = value.get("weight_block_size")
        whole_block = isinstance(block, list) and len(block) == 2 and all(type(one) is int and one > 0 for one in block)
        return "" if block is None or whole_block else "an object whose weight_block_size is two whole numbers"
    if name in LISTS:
        return "" if isinstance(value, list) else "a list"
    if name == "moe_layer_freq":
        return "" if whole and value >= 1 else "a whole number above 0"
    if name == "model_type":
        return "" if isinstance(value, str) else "a text"
    return ""
