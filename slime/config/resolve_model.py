"""Rules about the model, its layout over ranks, the optimizer and the first weights. Each takes the values and changes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slime.config import hf_check

if TYPE_CHECKING:
    from slime.config.resolve import Values


def dtype_and_optimizer(v: Values) -> None:
    if v["bf16"]:
        v.require(v["params_dtype"] in ("auto", "bf16"), "--bf16 and --params-dtype fp32 contradict each other")
        v.derive("params_dtype", "bf16", "--bf16 is given")
    if not v["use_distributed_optimizer"]:
        v.derive("use_distributed_optimizer", True, "checkpoints and sharded state are built on it")
    v.derive("accumulate_allreduce_grads_in_fp32", True, "gradients are summed in fp32 on every device")
    v.require(
        not v["overlap_cpu_optimizer_d2h_h2d"] or v["optimizer_cpu_offload"],
        "--overlap-cpu-optimizer-d2h-h2d needs --optimizer-cpu-offload",
    )
    odd = [name for name in ("main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype") if v[name] != "fp32"]
    v.require(
        not odd or v["use_precision_aware_optimizer"],
        f"{', '.join('--' + name.replace('_', '-') for name in odd)} needs --use-precision-aware-optimizer",
    )
    v.require(
        not (v["only_train_params_name_list"] and v["freeze_params_name_list"]),
        "--only-train-params-name-list and --freeze-params-name-list are two answers to one question; give one",
    )
    v.require(
        not (v["override_opt_param_scheduler"] and v["use_checkpoint_opt_param_scheduler"]),
        "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler exclude each other",
    )
    v.require(
        v["lr_warmup_fraction"] is None or not v["lr_warmup_iters"],
        "--lr-warmup-fraction and --lr-warmup-iters exclude each other",
    )
    v.require(
        v["lr_warmup_fraction"] is None or 0 <= v["lr_warmup_fraction"] <= 1,
        f"--lr-warmup-fraction is a share between 0 and 1, got {v['lr_warmup_fraction']}",
    )
    v.require(v["min_lr"] <= v["lr"], f"--min-lr {v['min_lr']} is above --lr {v['lr']}")


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
            mega["original_max_position_embeddings"] = v["max_position_embeddings"]
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
    mega = v["model.megatron"]
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
    if not rollout_only and not v.mistakes:
        lines = hf_check.differences(v.facts.hf_config, v, mega)
        v.require(not lines, f"the model flags disagree with {v['hf_checkpoint']}/config.json:\n  " + "\n  ".join(lines))
    if v["allgather_cp"] and v["context_parallel_size"] > 1:
        architectures = list(v.facts.hf_config.get("architectures") or ())
        v.require(
            set(architectures) & set(hf_check.ALLGATHER_CP_ARCHITECTURES),
            f"--allgather-cp with --context-parallel-size {v['context_parallel_size']} is for "
            f"{' and '.join(hf_check.ALLGATHER_CP_ARCHITECTURES)}; "
            f"the checkpoint is {architectures}",
        )


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
        held = hf_check.text_config(v.facts.hf_config).get("num_nextn_predict_layers") or 0
        v.require(
            held == 1,
            f"--mtp-num-layers {layers}: {v['hf_checkpoint']}/config.json has num_nextn_predict_layers {held}; "
            "leave --mtp-num-layers and --enable-mtp-training out",
        )
    v.require(v["mtp_loss_scaling_factor"] > 0, "--mtp-loss-scaling-factor must be above 0; leave out --enable-mtp-training")
    if v.door != "convert" and not v["enable_mtp_training"]:
        v.derive("mtp_num_layers", None, "without --enable-mtp-training nothing would use the layer")


def layout(v: Values) -> None:
    """Sizes must multiply up to the ranks, and layers must divide over stages."""
    mega: dict[str, Any] = v["model.megatron"]
    sizes = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
    )
    for name in sizes:
        v.require(v[name] >= 1, f"--{name.replace('_', '-')} must be at least 1, got {v[name]}")
    v.stop_if_wrong()
    tp, pp, cp, ep = (v[name] for name in sizes)
    if v["expert_tensor_parallel_size"] is None:
        v.derive("expert_tensor_parallel_size", tp, "it defaults to --tensor-model-parallel-size")
    if tp == 1 and v["sequence_parallel"]:
        v.derive("sequence_parallel", False, "with --tensor-model-parallel-size 1 there is nothing to split")
    _data_parallel(v, tp, pp, cp, ep)
    _stages(v, mega, pp)
    if "num_layers" not in mega:
        return
    heads, groups = mega["num_attention_heads"], mega.get("num_query_groups")
    v.require(heads % tp == 0, f"--num-attention-heads {heads} is no multiple of --tensor-model-parallel-size {tp}")
    if groups is not None:
        v.require(
            groups % tp == 0 or tp % groups == 0,
            f"--num-query-groups {groups} and --tensor-model-parallel-size {tp} do not divide each other",
        )
        v.require(heads % groups == 0, f"--num-attention-heads {heads} is no multiple of --num-query-groups {groups}")
    experts = mega.get("num_moe_experts")
    if experts is None:
        v.require(ep == 1, f"--expert-model-parallel-size {ep} needs --num-experts")
    else:
        v.require(experts % ep == 0, f"--num-experts {experts} is no multiple of --expert-model-parallel-size {ep}")
        v.require(
            tp == 1 or v["sequence_parallel"] or v.door == "convert",
            f"experts with --tensor-model-parallel-size {tp} need --sequence-parallel",
        )


def _data_parallel(v: Values, tp: int, pp: int, cp: int, ep: int) -> None:
    if v.door == "convert" or v["debug_rollout_only"]:
        return
    world = v["actor_num_nodes"] * v["actor_num_gpus_per_node"]
    v.derive(
        "world_size",
        world,
        f"--actor-num-nodes {v['actor_num_nodes']} times --actor-num-gpus-per-node {v['actor_num_gpus_per_node']}",
    )
    if world % (tp * pp * cp):
        v.mistakes.append(f"{world} training GPUs are no multiple of TP {tp} x PP {pp} x CP {cp} = {tp * pp * cp}")
        return
    v.derive("data_parallel_size", world // (tp * pp * cp), f"{world} training GPUs are shared by TP {tp} x PP {pp} x CP {cp}")
    etp = v["expert_tensor_parallel_size"]
    v.require(
        world % (etp * ep * pp) == 0,
        f"{world} training GPUs are no multiple of expert-TP {etp} x EP {ep} x PP {pp} = {etp * ep * pp}",
    )


def _stages(v: Values, mega: dict[str, Any], pp: int) -> None:
    first, last = v["decoder_first_pipeline_num_layers"], v["decoder_last_pipeline_num_layers"]
    if pp == 1:
        v.require(
            first is None and last is None,
            "--decoder-first/last-pipeline-num-layers need --pipeline-model-parallel-size above 1",
        )
        for name in (
            "num_layers_per_virtual_pipeline_stage",
            "num_virtual_stages_per_pipeline_rank",
            "pipeline_model_parallel_layout",
        ):
            v.require(v[name] is None, f"--{name.replace('_', '-')} needs --pipeline-model-parallel-size above 1")
        return
    layers = mega.get("num_layers")
    v.require(
        not v["dsa_send_indices"] or v["tensor_model_parallel_size"] == 1 or v["dsa_core_axis"] == "queries",
        "--dsa-send-indices needs --dsa-core-axis queries: by heads every tensor-parallel rank would send every index",
    )
    if v["pipeline_model_parallel_layout"] is not None:
        v.require(
            first is None and last is None,
            "--pipeline-model-parallel-layout and --decoder-first/last-pipeline-num-layers exclude each other",
        )
        for name in ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"):
            v.require(
                v[name] is None,
                f"--{name.replace('_', '-')} and --pipeline-model-parallel-layout exclude each other: "
                "a layout of twice as many stages has two chunks per stage",
            )
        _layout(v, layers, pp)
        return
    if layers is None:
        return
    rest, stages = layers - (first or 0) - (last or 0), pp - (first is not None) - (last is not None)
    v.require(
        rest >= 0 and (rest % stages == 0 if stages else rest == 0),
        f"{layers} layers do not divide: first stage {'-' if first is None else first}, "
        f"last stage {'-' if last is None else last}, "
        f"{rest} layers over the {stages} other stages",
    )
    per_stage = rest // stages if stages else layers // pp
    chunk, chunks = v["num_layers_per_virtual_pipeline_stage"], v["num_virtual_stages_per_pipeline_rank"]
    v.require(
        chunk is None or chunks is None,
        "--num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank exclude each other",
    )
    if chunk is not None:
        v.require(
            per_stage % chunk == 0,
            f"--num-layers-per-virtual-pipeline-stage {chunk} does not divide the {per_stage} layers of a stage",
        )
        chunks = per_stage // chunk
    if chunks is not None and chunks > 1:
        v.require(per_stage % chunks == 0, f"{per_stage} layers of a stage do not divide into {chunks} chunks")
        v.derive("virtual_pipeline_model_parallel_size", chunks, f"each stage has {per_stage} layers in {chunks} chunks")


def _layout(v: Values, layers: int | None, pp: int) -> None:
    """--pipeline-model-parallel-layout: a plain list becomes Megatron's string; more stages than ranks are virtual ones."""
    text = v["pipeline_model_parallel_layout"].replace(" ", "")
    if re.fullmatch(r"\d+(,\d+)*", text):
        sizes = [int(size) for size in text.split(",")]
        v.require(
            layers is None or sum(sizes) == layers,
            f"--pipeline-model-parallel-layout {text} places {sum(sizes)} layers, the model has {layers}",
        )
        v.require(0 not in sizes, f"--pipeline-model-parallel-layout {text} has a stage without layers")
        text = layout_string(sizes, mtp=v["mtp_num_layers"] or 0)
        v.derive("pipeline_model_parallel_layout", text, "Megatron's spelling of the listed layers per stage")
    stages = len(unrolled_layout(text).split("|"))
    v.require(
        stages % pp == 0,
        f"--pipeline-model-parallel-layout has {stages} stages, no multiple of --pipeline-model-parallel-size {pp}",
    )
    if stages > pp:
        v.derive("virtual_pipeline_model_parallel_size", stages // pp, f"the layout has {stages} stages for {pp} ranks")


def layout_string(sizes: Sequence[int], *, mtp: int = 0) -> str:
    """[10, 8] -> Et*10|t*8L: embedding before the first layer, `mtp` prediction layers and the loss after the last."""
    return "E" + "|".join(f"t*{size}" for size in sizes) + "m" * mtp + "L"


def unrolled_layout(text: str) -> str:
    """The layout string with its multiplications written out, as megatron-core reads them."""
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(pattern, lambda match: match.group(1) * int(match.group(2)), text)
    return text
