"""config.json of released models, for machines on which the checkpoint is not: enough of it to prove a layout.

A folder whose name is a model's (GLM-5.2, GLM-5.2-FP8) is taken for that release; the -FP8 name adds its block quantisation.
Under any other name MODEL_ARGS say what the model is, as far as they do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from slime.config import hf_check
from slime.config.hf_config import HfConfig
from slime.config.rules.engine_model import DRAFTS_ITSELF

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@lru_cache(maxsize=1)
def _stored() -> dict[str, dict]:
    return json.loads((Path(__file__).parent / "known_models.json").read_text())


def known_names() -> list[str]:
    return list(_stored())


def known_config(folder: str) -> HfConfig | None:
    """The stored config of the release that `folder` is named after; None for a name that is not stored."""
    name = Path(folder).name
    base = name.removesuffix("-FP8")
    if base not in _stored():
        return None
    raw = dict(_stored()[base])
    if name.endswith("-FP8"):
        raw["quantization_config"] = FP8
    return HfConfig(raw, f"the stored config of {name}")


def described_config(start: Mapping[str, object]) -> tuple[dict[str, object] | None, str]:
    """(config.json of the model that MODEL_ARGS describe, in words where it comes from); None where they describe none.

    A stored release whose every field agrees with them is taken, because an index schedule is in no flag. start: attributes as
    they were said.
    """
    mega = start["model.megatron"]
    if not all(mega.get(name) for name in ("num_layers", "hidden_size", "num_attention_heads")):
        return None, ""
    for name, raw in _stored().items():
        try:
            if not hf_check.differences(raw, start, mega):
                return dict(raw), f"{name}, whose fields are those of MODEL_ARGS,"
        except (TypeError, KeyError, ValueError, ZeroDivisionError):
            continue
    if start["spec"] is not None:
        return None, ""  # what a layer spec builds is not in the flags
    return _from_flags(start, mega), "the model that MODEL_ARGS describe"


def _from_flags(start: Mapping[str, object], mega: Mapping[str, object]) -> dict[str, object]:
    """A config.json with the shapes of MODEL_ARGS, of the family that has their parts."""
    experts, mla = mega.get("num_moe_experts"), bool(start["multi_latent_attention"])
    hidden, heads, layers = int(mega["hidden_size"]), int(mega["num_attention_heads"]), int(mega["num_layers"])
    drafts = bool(start["mtp_num_layers"]) or str(start["sglang"].get("speculative_algorithm", "")).upper() in DRAFTS_ITSELF
    plain = ("mimo" if drafts else "qwen2") if mega.get("add_qkv_bias") else "llama"
    routed = "glm4_moe" if mega.get("moe_router_score_function") == "sigmoid" else "qwen3_moe"
    family = "qwen3" if mega.get("qk_layernorm") else "glm4" if start["post_mlp_layernorm"] else plain
    raw: dict[str, object] = {
        "model_type": "deepseek_v3" if mla else routed if experts else family,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": mega.get("num_query_groups") or heads,
        "head_dim": mega.get("kv_channels") or hidden // heads,
        "intermediate_size": mega.get("ffn_hidden_size") or 4 * hidden,
        "rms_norm_eps": mega.get("layernorm_epsilon", 1e-5),
        "rope_theta": start["rotary_base"],
        "vocab_size": start["vocab_size"] or start["padded_vocab_size"],
        "tie_word_embeddings": not start["untie_embeddings_and_output_weights"],
        "attention_bias": bool(mega.get("add_qkv_bias", False)),
    }
    if drafts and raw["model_type"] in ("mimo", "glm4_moe", "deepseek_v3"):
        raw["num_nextn_predict_layers"] = 1  # the flags presuppose it
    if raw["model_type"] == "glm4_moe":
        raw["use_qk_norm"] = bool(mega.get("qk_layernorm", False))
    if start["rotary_percent"] != 1.0:
        raw["partial_rotary_factor"] = start["rotary_percent"]
    if start["use_rope_scaling"]:
        # The bounds are those of every Llama 3 release; no flag names them.
        ends = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        raw["rope_scaling"] = {"rope_type": "llama3", "factor": start["rope_scaling_factor"], **ends}
    if mla:
        raw |= {key: mega.get(name, default) for key, (name, default) in _LATENT.items()}
        raw |= _stretched(mega)
    if experts:
        raw |= _experts(mega, layers, sigmoid=mla or routed == "glm4_moe")
    return raw


_LATENT = {
    "q_lora_rank": ("q_lora_rank", None),
    "kv_lora_rank": ("kv_lora_rank", 512),
    "qk_nope_head_dim": ("qk_head_dim", 128),
    "qk_rope_head_dim": ("qk_pos_emb_head_dim", 64),
    "v_head_dim": ("v_head_dim", 128),
}
"""Field of config.json -> megatron-core's field and its default."""


def _stretched(mega: Mapping[str, object]) -> dict[str, object]:
    """RoPE scaling, where the flags stretch it."""
    factor = mega.get("rotary_scaling_factor", 1.0)
    if factor == 1.0:
        return {}
    names = ("mscale", "mscale_all_dim", "beta_fast", "beta_slow", "original_max_position_embeddings")
    said = {name: mega[name] for name in names if name in mega}
    return {"rope_scaling": {"type": "yarn", "factor": factor, **said}}


def _experts(mega: Mapping[str, object], layers: int, *, sigmoid: bool) -> dict[str, object]:
    frequency = mega.get("moe_layer_freq", 1)
    moe = frequency if isinstance(frequency, list) else [int(layer % frequency == 0) for layer in range(layers)]
    inner = mega.get("moe_ffn_hidden_size") or mega.get("ffn_hidden_size")
    raw: dict[str, object] = {
        "num_experts_per_tok": mega.get("moe_router_topk", 2),
        "moe_intermediate_size": inner,
        "norm_topk_prob": True,
    }
    if not sigmoid:
        dense = [layer for layer in range(layers) if layer < len(moe) and not moe[layer]]
        return raw | {"num_experts": mega["num_moe_experts"], "decoder_sparse_step": 1, "mlp_only_layers": dense}
    shared = mega.get("moe_shared_expert_intermediate_size") or 0
    return raw | {
        "n_routed_experts": mega["num_moe_experts"],
        "n_shared_experts": shared // inner,
        "first_k_dense_replace": [*moe, 1].index(1),
        "routed_scaling_factor": mega.get("moe_router_topk_scaling_factor", 1.0),
        "n_group": mega.get("moe_router_num_groups", 1),
        "topk_group": mega.get("moe_router_group_topk", 1),
    }
