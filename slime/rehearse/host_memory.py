"""Bytes of a training rank on a CPU through an iteration, as the resident memory of its process. Full recomputation.

Other than on a GPU: nothing sleeps, the optimizer stays, gloo gathers updated parameters through a copy of one buffer, and the
torch reference of the sparse core gathers keys in bounded pieces.
"""

from __future__ import annotations

from slime.model.hf_config import HfConfig
from slime.rehearse.memory import (
    GB,
    Assumed,
    Phase,
    StageMemory,
    TrainShapes,
    checkpointed_input,
    in_flight,
    index_holder,
    optimizer_bytes,
    transients,
)
from slime.rehearse.shares import Grid, StageShare

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
                "stored layer inputs": checkpointed_input(hf, grid, shapes) * share.stored_inputs * kept,
                "index selection": holders * kept,
                **moving,
            },
        ),
        Phase("checkpoint", {**held, "staging of one shard": weights // max(len(share.layers), 1)}),
        Phase("weight sync", {**held, "bucket, as trained and on the wire": 3 * on_the_wire}),
        Phase("rollout", held),
    )
    return StageMemory(share, phases, 0)


def _transients(hf: HfConfig, grid: Grid, shapes: TrainShapes, share: StageShare) -> dict[str, int]:
    """As on a GPU, but for scores and gathered keys, which come in pieces here: never both at once."""
    parts = transients(hf, grid, shapes, share)
    if hf.has_indexer:
        latent = hf["kv_lora_rank"] + hf["qk_rope_head_dim"]
        # Gathered keys, their gradient and its sum in the core; scores before and after the gates in the indexer.
        keys = 3 * min(shapes.tokens * hf["index_topk"] * latent * 4, CORE_CHUNK)
        scores = 2 * min(shapes.tokens // grid.tp * hf["index_n_heads"] * shapes.stream * 4, CORE_CHUNK)
        del parts["indexer scores"], parts["gradient of keys, fp32"]
        parts["sparse core or indexer"] = max(keys, scores)
    return parts
