"""Bytes of a training rank on a CPU through an iteration, as the resident memory of its process. Full recomputation.

Other than on a GPU: nothing sleeps, the optimizer stays, gloo gathers updated parameters through a copy of one buffer, and the
torch reference of the sparse core gathers keys in bounded pieces.
"""

from __future__ import annotations

from slime.model.hf_config import HfConfig
from slime.model.placement import Grid
from slime.rehearse.model.memory import (
    GB,
    Assumed,
    Phase,
    StageMemory,
    TrainShapes,
    experts_parts,
    head_parts,
    in_flight,
    index_holder,
    optimizer_bytes,
    stored_inputs,
)
from slime.rehearse.model.shares import StageShare

# slime_plugins/models/glm5/ops/torch_ops.py bounds its temporaries to this many bytes each.
CORE_CHUNK = 4 * (1 << 24)


def host_memory(
    share: StageShare, hf: HfConfig, grid: Grid, shapes: TrainShapes, assumed: Assumed, *, bucket_bytes: int
) -> StageMemory:
    """The phases that a trainer measures, in the order of an iteration."""
    weights = share.parameters * shapes.param_bytes
    process = {"process": int(assumed.host_process_gb * GB)}
    loaded = {
        **process,
        "weights": weights,
        "gradients": share.trained * shapes.grad_bytes,
        "optimizer": optimizer_bytes(share, grid, shapes),
    }
    if shapes.critic:
        loaded["critic"] = weights + loaded["gradients"] + loaded["optimizer"]
    if shapes.copies:
        loaded["copies of weights (reference, teacher, old actor)"] = weights * shapes.copies
    held = {**loaded, "libraries in use": int(assumed.host_libraries_gb * GB)}
    kept, moving = in_flight(share.stage, grid, shapes), _transients(hf, grid, shapes, share)
    holders = index_holder(hf, grid, shapes) * share.computing
    on_the_wire = min(bucket_bytes, weights)
    phases = (
        Phase("start", process),
        Phase("load", {**loaded, "one layer being read": weights // max(len(share.layers), 1)}),
        Phase("hand-over", held),
        Phase("log-probs", {**held, "index selection": holders, **moving}),
        Phase(
            "train",
            {
                **held,
                "gathered parameters": max(share.experts, share.trained - share.experts) * shapes.param_bytes,
                "stored layer inputs": int(stored_inputs(share, hf, grid, shapes) * kept),
                "index selection": int(holders * kept),
                **moving,
            },
        ),
        Phase("checkpoint", {**held, "staging of one shard": weights // max(len(share.layers), 1)}),
        Phase("weight sync", {**held, "bucket, as trained and on the wire": 3 * on_the_wire}),
        Phase("rollout", held),
    )
    return StageMemory(share, phases, 0)


def _transients(hf: HfConfig, grid: Grid, shapes: TrainShapes, share: StageShare) -> dict[str, int]:
    """The largest short-lived tensors of one layer and of the output layer, all of which the process keeps for reuse."""
    size, pairs = shapes.param_bytes, shapes.tokens * hf["num_attention_heads"] // grid.tp
    parts: dict[str, int] = {}
    if hf.has_indexer:
        latent = hf["kv_lora_rank"] + hf["qk_rope_head_dim"]
        parts["absorbed queries and outputs"] = 2 * pairs * latent * size
        if grid.tp > 1 and shapes.core_axis == "queries":
            width = hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"] + hf["v_head_dim"]
            parts["queries and outputs, exchanged"] = pairs * width * size
            up = hf["num_attention_heads"] * (hf["qk_nope_head_dim"] + hf["v_head_dim"]) * hf["kv_lora_rank"]
            parts["whole key/value up-projection and its fp32 gradient"] = up * (size + 4)
        # Gathered keys, their gradient and its sum in the core; scores before and after the gates in the indexer. They come in
        # pieces, and never both at once.
        keys = 3 * min(shapes.tokens * hf["index_topk"] * latent * 4, CORE_CHUNK)
        scores = 2 * min(shapes.tokens // grid.tp * hf["index_n_heads"] * shapes.stream * 4, CORE_CHUNK)
        parts["sparse core or indexer"] = max(keys, scores)
    else:
        width = hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"] if hf.is_mla else hf.head_dim
        parts["queries, keys, values, output"] = 4 * pairs * width * size
    if hf.num_experts:
        parts |= experts_parts(hf, grid, shapes, both_ways=False)
    if share.has_head:
        parts |= head_parts(hf, grid, shapes)
    return parts
