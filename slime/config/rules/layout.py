"""Sizes of the axes must multiply up to the ranks, and layers must divide over stages."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from slime.config import hf_check
from slime.config.stages import Chunk, Cut, computing_layers, cut_layers, layout_string, unrolled_layout, wrong_starts

if TYPE_CHECKING:
    from slime.config.rules.book import Values


def layout(v: Values) -> None:
    """Sizes must multiply up to the ranks, and layers must divide over stages."""
    mega: dict[str, Any] = v["model.megatron"]
    sizes = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
    )
    tp, pp, cp, ep = (v[name] for name in sizes)
    if v["expert_tensor_parallel_size"] is None:
        v.derive("expert_tensor_parallel_size", tp, "it defaults to --tensor-model-parallel-size")
    if tp == 1 and v["sequence_parallel"]:
        v.derive("sequence_parallel", False, "with --tensor-model-parallel-size 1 there is nothing to split")
    _data_parallel(v, tp, pp, cp, ep)
    _stages(v, mega, pp)
    if "num_layers" not in mega:
        return
    _cuts(v, mega, tp, ep)


def _cuts(v: Values, mega: dict[str, Any], tp: int, ep: int) -> None:
    """Everything that a cut goes through divides."""
    heads, groups = mega["num_attention_heads"], mega.get("num_query_groups")
    v.require(heads % tp == 0, f"--num-attention-heads {heads} is no multiple of --tensor-model-parallel-size {tp}")
    if groups is not None:
        v.require(
            groups % tp == 0,
            f"--num-query-groups {groups} is no multiple of --tensor-model-parallel-size {tp}; choose one that divides it",
        )
        v.require(heads % groups == 0, f"--num-attention-heads {heads} is no multiple of --num-query-groups {groups}")
    width = mega.get("ffn_hidden_size") or 4 * mega["hidden_size"]
    v.require(width % tp == 0, f"--ffn-hidden-size {width} is no multiple of --tensor-model-parallel-size {tp}")
    experts, etp = mega.get("num_moe_experts"), v["expert_tensor_parallel_size"]
    if experts is None:
        v.require(ep == 1, f"--expert-model-parallel-size {ep} needs --num-experts")
        return
    v.require(experts % ep == 0, f"--num-experts {experts} is no multiple of --expert-model-parallel-size {ep}")
    inner = mega.get("moe_ffn_hidden_size") or width
    v.require(
        inner % etp == 0,
        f"--expert-tensor-parallel-size {etp} does not divide the experts' inner width {inner}; choose a divisor",
    )
    shared = mega.get("moe_shared_expert_intermediate_size") or 0
    v.require(
        shared % tp == 0, f"--moe-shared-expert-intermediate-size {shared} is no multiple of --tensor-model-parallel-size {tp}"
    )


def sequences(v: Values) -> None:
    """How activations and sequences are shared, where that changes what is computed."""
    tp, cp = v["tensor_model_parallel_size"], v["context_parallel_size"]
    v.require(
        tp == 1 or v["sequence_parallel"] or v["debug_rollout_only"],
        f"--tensor-model-parallel-size {tp} without --sequence-parallel: megatron-core would double gradients of "
        "norms and cannot "
        "train experts; pass --sequence-parallel",
    )
    hf = v.hf
    if hf is None or cp == 1 or v["debug_rollout_only"]:
        return
    sparse = hf.has_indexer or set(hf.get("architectures") or ()) & set(hf_check.ALLGATHER_CP_ARCHITECTURES)
    if sparse:
        v.require(
            v["allgather_cp"],
            f"sparse attention with --context-parallel-size {cp} needs contiguous shards; pass --allgather-cp",
            holds=f"CP {cp} with the contiguous layout of sparse attention",
        )
    else:
        v.require(
            not v["allgather_cp"],
            f"--allgather-cp is the layout of sparse attention ({' and '.join(hf_check.ALLGATHER_CP_ARCHITECTURES)}), and "
            f"{hf.source} is {hf.get('model_type')}; remove --allgather-cp: zigzag shards are balanced for full attention",
        )


def chunks_of(v: Values) -> tuple[Chunk, ...] | None:
    """Layers of every model chunk; None where the flags do not say, or not rightly."""
    layers, pp = v["model.megatron"].get("num_layers"), v["pipeline_model_parallel_size"]
    if not layers or pp < 1:
        return None
    layout = v["pipeline_model_parallel_layout"]
    vpp = 1 if layout else v["virtual_pipeline_model_parallel_size"] or 1
    first, last = v["decoder_first_pipeline_num_layers"], v["decoder_last_pipeline_num_layers"]
    try:
        return tuple(cut_layers(Cut(layers, pp, vpp, first, last, layout)))
    except ValueError:
        return None


def stage_starts(v: Values) -> None:
    """No stage is empty, and with shared indices none starts where a layer reuses those of an earlier stage."""
    chunks, hf, pp = chunks_of(v), v.hf, v["pipeline_model_parallel_size"]
    if chunks is None or pp == 1 or v["debug_rollout_only"]:
        return
    empty = [rank for rank in range(pp) if not any(len(chunk.layers) for chunk in chunks if chunk.pp_rank == rank)]
    v.require(not empty, f"pipeline stages {empty} hold no layer; lower --pipeline-model-parallel-size or change the split")
    if hf is None or v["dsa_send_indices"]:
        return
    for chunk in wrong_starts(hf, chunks):
        start = chunk.layers.start
        v.mistakes.append(
            f"pipeline stage {chunk.pp_rank} starts at layer {start + 1}, which reuses the indices of layer "
            f"{hf.index_source(start) + 1} on an earlier stage (computing layers: {computing_layers(hf)}); choose "
            "layers per stage "
            "so that each starts on one of these, or pass --dsa-send-indices, which lifts the rule"
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
    try:
        stages = len(unrolled_layout(text).split("|"))
        cut_layers(Cut(layers or unrolled_layout(text).count("t"), pp, layout=text))
    except ValueError as error:
        v.mistakes.append(str(error))
        return
    drawn, built = unrolled_layout(text).count("m"), v["mtp_num_layers"] or 0
    v.require(
        drawn == built,
        f"--pipeline-model-parallel-layout places {drawn} multi-token-prediction layers (m), and {built} are trained; "
        + ("write m before L" if built else "remove m, or pass --mtp-num-layers 1 --enable-mtp-training"),
    )
    if stages > pp:
        v.derive("virtual_pipeline_model_parallel_size", stages // pp, f"the layout has {stages} stages for {pp} ranks")
