"""What MODEL_ARGS say about the model, and whether the checkpoint's config.json says the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slime.config import hf_check, hf_fields
from slime.config.hf_config import HfConfig

if TYPE_CHECKING:
    from slime.config.rules.book import Values


def shape(v: Values) -> None:
    """The TransformerConfig values that follow from flags of other names."""
    mega: dict[str, Any] = v["model.megatron"]
    if v.door != "convert" and v["debug_rollout_only"] and "num_layers" not in mega:
        return  # engines alone need no model flags
    missing = [flag for name, flag in _REQUIRED if name not in mega]
    v.require(
        not missing, f"the model flags lack {', '.join(missing)}; source a file of scripts/models and pass ${{MODEL_ARGS[@]}}"
    )
    if missing:
        return
    if v["use_rotary_position_embeddings"]:
        v.derive("position_embedding_type", "rope", "--use-rotary-position-embeddings is its older spelling")
    elif "position_embedding_type" not in v.given:
        v.derive("position_embedding_type", "rope", "every model family here is rotary")
    v.require(
        v["position_embedding_type"] in ("rope", "yarn"),
        f"--position-embedding-type {v['position_embedding_type']}: the model families here are rotary; give rope",
    )
    if v["max_position_embeddings"] is None:
        v.derive("max_position_embeddings", v["seq_length"], "it defaults to --seq-length")
    _attention(v, mega)
    _experts(v, mega)
    if v["swiglu"]:
        mega["gated_linear_unit"] = True
    if v["vocab_size"] is None and v.facts.hf_config is not None:
        v.derive("vocab_size", hf_check.text_config(v.facts.hf_config).get("vocab_size"), "the HF config says so")
    v.require(
        v["vocab_size"] or v["padded_vocab_size"], "--vocab-size is needed (or a readable config.json in --hf-checkpoint)"
    )
    if v["padded_vocab_size"] is None and v["vocab_size"]:
        multiple = v["make_vocab_size_divisible_by"] * v["tensor_model_parallel_size"]
        padded = -(-v["vocab_size"] // multiple) * multiple
        v.derive(
            "padded_vocab_size",
            padded,
            f"{v['vocab_size']} is padded to a multiple of {multiple} "
            "(--make-vocab-size-divisible-by times tensor-parallel size)",
        )
    elif v["vocab_size"]:
        v.require(
            v["padded_vocab_size"] >= v["vocab_size"],
            f"--padded-vocab-size {v['padded_vocab_size']} is below --vocab-size {v['vocab_size']}",
        )
    if v["padded_vocab_size"]:
        v.require(
            v["padded_vocab_size"] % v["tensor_model_parallel_size"] == 0,
            f"--padded-vocab-size {v['padded_vocab_size']} is no multiple of --tensor-model-parallel-size",
        )
    if v["freeze_indexer"]:
        v.notes.append("--freeze-indexer changes nothing: the indexer has no gradient and is not in the optimizer by default")


_REQUIRED = (("num_layers", "--num-layers"), ("hidden_size", "--hidden-size"), ("num_attention_heads", "--num-attention-heads"))


def _attention(v: Values, mega: dict[str, Any]) -> None:
    if v["multi_latent_attention"]:
        mega["multi_latent_attention"] = True
        # Megatron's parser has no query latent unless told; megatron-core's dataclass would take one of 512.
        mega.setdefault("q_lora_rank", None)
        mega["rotary_base"], mega["rotary_percent"] = v["rotary_base"], v["rotary_percent"]
        if "rotary_scaling_factor" not in mega:
            mega["rotary_scaling_factor"] = 1.0
            v.notes.append(
                "rotary_scaling_factor = 1.0, because no --rotary-scaling-factor is given (megatron-core's own default, 40, "
                "would stretch RoPE)"
            )
        if "rope_type" not in mega:
            mega["rope_type"] = "yarn" if mega["rotary_scaling_factor"] != 1.0 else "rope"
            v.notes.append(
                f"rope_type = {mega['rope_type']!r}, because rotary_scaling_factor is {mega['rotary_scaling_factor']:g}"
                + (" (yarn with factor 1 is plain RoPE)" if mega["rope_type"] == "rope" else "")
            )
        if mega["rope_type"] == "yarn" and "original_max_position_embeddings" not in mega and v["max_position_embeddings"]:
            stretched = HfConfig(v.facts.hf_config or {}).rope_parameters.get("original_max_position_embeddings")
            mega["original_max_position_embeddings"] = stretched or v["max_position_embeddings"]
        v.require(not v["group_query_attention"], "--multi-latent-attention and --group-query-attention exclude each other")
    if v["group_query_attention"]:
        v.require("num_query_groups" in mega, "--group-query-attention needs --num-query-groups")
    elif "num_query_groups" in mega:
        v.mistakes.append(
            f"--num-query-groups {mega['num_query_groups']} has no effect without --group-query-attention; add it"
        )


def _experts(v: Values, mega: dict[str, Any]) -> None:
    experts = mega.get("num_moe_experts")
    freq = mega.get("moe_layer_freq")
    if isinstance(freq, list):
        v.require(
            len(freq) == mega["num_layers"], f"--moe-layer-freq lists {len(freq)} layers, --num-layers is {mega['num_layers']}"
        )
    if experts is None:
        stray = [
            name
            for name in mega
            if name.startswith("moe_") and name != "moe_token_dispatcher_type" and name != "moe_permute_fusion"
        ]
        v.require(not stray, f"--num-experts is not given, but {', '.join('--' + name.replace('_', '-') for name in stray)} is")
        return
    topk = mega.get("moe_router_topk", 2)
    v.require(topk <= experts, f"--moe-router-topk {topk} is above --num-experts {experts}")
    if mega.get("moe_token_dispatcher_type", "allgather") == "allgather":
        mega["moe_token_dispatcher_type"] = "alltoall"
        v.notes.append(
            "moe_token_dispatcher_type = 'alltoall', because the all-gather dispatcher cannot take batches of varying length"
        )


def checkpoint_fields(v: Values) -> None:
    """The HF config must agree with the model flags."""
    rollout_only = v.door != "convert" and v["debug_rollout_only"]
    v.require(
        v["hf_checkpoint"], "--hf-checkpoint is needed: it holds the tokenizer, the engines' weights and the config to check"
    )
    if v.facts.hf_config is None:
        if v["hf_checkpoint"]:
            v.notes.append(
                f"model flags are not compared with the checkpoint: {v['hf_checkpoint']}/config.json is not on this machine"
            )
        return
    if not rollout_only and v.hf is not None and v.hf.get("model_type") in hf_fields.FAMILIES:
        _same_model(v, v.hf)


def family(v: Values) -> None:
    """The checkpoint's family has a table of weight names, and the layer spec that builds it."""
    hf = v.hf
    kind = hf.get("model_type") if hf is not None else None
    if hf is None or not isinstance(kind, str):
        return
    if not v.require(kind in hf_fields.FAMILIES, hf_fields.unknown_family(kind, hf.source)):
        return
    if (v.door != "convert" and v["debug_rollout_only"]) or v["custom_model_provider_path"]:
        return
    spec = v["spec"]
    built = spec is not None and tuple(spec[1:]) == ("get_glm5_spec",)
    v.require(
        not hf.has_indexer or built,
        f"{hf.model_type} needs the sparse-attention layer spec"
        + (f", not {' '.join(spec)}" if spec else "")
        + "; pass --spec slime_plugins.models.glm5.glm5 get_glm5_spec",
    )
    v.require(
        hf.has_indexer or not built,
        f"get_glm5_spec builds glm_moe_dsa and deepseek_v32, {hf.source} is {hf.model_type}; remove --spec",
    )


def _same_model(v: Values, hf: HfConfig) -> None:
    """config.json is of a model that is known to its last field, and the flags describe the same one."""
    try:
        unknown = hf_fields.faults(hf)
        lines = hf_check.differences(hf, v, v["model.megatron"]) if not (unknown or v.mistakes) else []
    except (TypeError, ValueError, AttributeError, IndexError) as odd:
        v.mistakes.append(f"{hf.source} cannot be understood: {odd}; download it again")
        return
    v.mistakes += unknown
    v.require(not lines, f"the model flags disagree with {hf.source}:\n  " + "\n  ".join(lines))
    if not (unknown or lines or v.mistakes):
        v.holds("MODEL_ARGS describe the model of the HF config", f"compared with {hf.source}")


def mtp(v: Values) -> None:
    """The multi-token-prediction layer is converted with --mtp-num-layers 1, and built for training where it is trained."""
    layers = v["mtp_num_layers"]
    v.require(
        layers or not v["enable_mtp_training"],
        "--enable-mtp-training trains the layer that --mtp-num-layers 1 builds; pass both",
    )
    if not layers:
        return
    v.require(layers == 1, f"--mtp-num-layers {layers}: one multi-token-prediction layer can be built; pass 1 or leave it out")
    if v.facts.hf_config is not None:
        mimo = v.facts.hf_config.get("model_type") == "mimo"
        v.require(
            not mimo,
            "--mtp-num-layers: MiMo's multi-token-prediction layer is built otherwise than the one that can be trained here; "
            "leave --mtp-num-layers and --enable-mtp-training out (the engines draft from it all the same)",
        )
        held = layers if mimo else HfConfig(v.facts.hf_config).num_mtp_layers
        v.require(
            held == 1,
            f"--mtp-num-layers {layers}: {v['hf_checkpoint']}/config.json has num_nextn_predict_layers {held}; "
            "leave --mtp-num-layers and --enable-mtp-training out",
        )
    v.require(v["mtp_loss_scaling_factor"] > 0, "--mtp-loss-scaling-factor must be above 0; leave out --enable-mtp-training")
    if v.door != "convert" and not v["enable_mtp_training"]:
        v.derive("mtp_num_layers", None, "without --enable-mtp-training nothing would use the layer")
