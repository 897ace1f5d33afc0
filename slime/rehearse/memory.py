"""Bytes of one GPU through a whole iteration, per pipeline stage, and of one node's main memory. Pure arithmetic.

Every term is a function of shapes; nothing is fitted. What a caching allocator, communication libraries and the CUDA context
add is one printed number (`Assumed.overhead_gb`). `slime.rehearse.measured` sets predictions beside the peaks that a run
measured. A trainer on a CPU has a model of its own, `slime.rehearse.host_memory`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slime.model.hf_config import HfConfig
from slime.rehearse.shares import Grid, StageShare

GB = 1e9


@dataclass(frozen=True)
class Assumed:
    """Values that neither flags nor shapes decide; `--assume NAME=VALUE` replaces one."""

    overhead_gb: float = 6.0
    """CUDA context, NCCL buffers, allocator slack of one process while it owns the GPU."""
    sleeping_trainer_gb: float = 4.0
    """What stays of a trainer that handed its memory back."""
    sleeping_engine_gb: float = 3.0
    """What stays of an engine rank that handed its memory back: context, communication buffers, graphs."""
    engine_overhead_gb: float = 8.0
    """Context, DeepEP buffers, CUDA graphs, activations of an engine rank."""
    host_process_gb: float = 0.415
    """A training rank on a CPU before it holds a model: Python, torch, megatron-core, Ray."""
    host_libraries_gb: float = 0.115
    """What its first pass adds beside tensors: code of the operators, communication, blocks that the allocator keeps."""
    mem_fraction_static: float = 0.8
    """Share of the GPU for weights and KV cache where --sglang-mem-fraction-static does not say."""


@dataclass(frozen=True)
class TrainShapes:
    """What activations depend on."""

    tokens: int
    """Rows of one context-parallel rank in a micro-batch (--max-tokens-per-gpu)."""
    stream: int
    """Tokens of the whole micro-batch: tokens x context-parallel size."""
    recompute: bool
    param_bytes: int
    """2 for bf16, 4 for fp32."""
    grad_bytes: int
    """Of the main gradient buffer."""
    optimizer_bytes: int
    """Per parameter: master weight and two moments."""
    optimizer_on_host: bool
    micro_batches: int
    """Per rank and step; bounds what is in flight."""
    padded_vocab: int
    log_probs_chunk: int
    core_axis: str = "queries"
    """What tensor-parallel ranks share the sparse core by (--dsa-core-axis)."""


@dataclass(frozen=True)
class Phase:
    """One phase's bytes by part."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class StageMemory:
    share: StageShare
    phases: tuple[Phase, ...]
    host_optimizer: int
    """Bytes of optimizer state of one rank in main memory."""

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)


def optimizer_bytes(share: StageShare, grid: Grid, shapes: TrainShapes, *, trained_only: bool = True) -> int:
    """State of one rank. Dense parameters are spread over data- and context-parallel ranks, experts over their own replicas."""
    dense = share.dense - (share.frozen if trained_only else 0)
    return dense * shapes.optimizer_bytes // (grid.dp * grid.cp) + share.experts * shapes.optimizer_bytes // grid.edp


def in_flight(stage: int, grid: Grid, shapes: TrainShapes) -> int:
    """Micro-batches whose activations a stage keeps at once under one-forward-one-backward."""
    return min(grid.pp - stage, shapes.micro_batches)


def checkpointed_input(hf: HfConfig, grid: Grid, shapes: TrainShapes) -> int:
    """A layer's stored input under full recomputation, sequence-parallel."""
    return shapes.tokens * hf["hidden_size"] * shapes.param_bytes // grid.tp


def index_holder(hf: HfConfig, grid: Grid, shapes: TrainShapes) -> int:
    """int32 [rows, topk] of one computing layer: this rank's slice of the tokens, or all of them where heads share the core."""
    rows = shapes.tokens // (grid.tp if shapes.core_axis == "queries" else 1)
    return rows * hf["index_topk"] * 4 if hf.has_indexer else 0


# slime/ops/vocab_logprob.py: logits exist in tiles of so many rows (where --log-probs-chunk-size does not say) and words.
HEAD_ROWS, HEAD_WORDS = 16384, 4096


def transients(hf: HfConfig, grid: Grid, shapes: TrainShapes, share: StageShare) -> dict[str, int]:
    """The largest short-lived tensors of one layer (recomputed layers hold theirs one at a time) and of the output layer."""
    tokens, hidden, size = shapes.tokens, hf["hidden_size"], shapes.param_bytes
    heads = hf["num_attention_heads"] // grid.tp
    parts: dict[str, int] = {}
    if hf.has_indexer:
        latent = hf["kv_lora_rank"] + hf["qk_rope_head_dim"]
        rows = min(tokens // grid.tp, 8192) if grid.tp > 1 else min(tokens, 8192)
        parts["indexer scores"] = rows * shapes.stream * 4 if share.computing else 0
        parts["absorbed queries and outputs"] = 2 * tokens * heads * latent * size
        if grid.tp > 1 and shapes.core_axis == "queries":
            width = hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"] + hf["v_head_dim"]
            parts["queries and outputs, exchanged"] = tokens * heads * width * size
            up = hf["num_attention_heads"] * (hf["qk_nope_head_dim"] + hf["v_head_dim"]) * hf["kv_lora_rank"]
            parts["whole key/value up-projection and its fp32 gradient"] = up * (size + 4)
        parts["gradient of keys, fp32"] = shapes.stream * latent * 4
    else:
        width = hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"] if hf.is_mla else hf.head_dim
        parts["queries, keys, values, output"] = 4 * tokens * heads * width * size
    if hf.num_experts:
        inner = hf["moe_intermediate_size"]
        routed = tokens // grid.tp * hf["num_experts_per_tok"] * (grid.etp or 1)
        parts["routed tokens, in and out"] = 2 * routed * hidden * size
        parts["expert intermediates"] = 3 * routed * inner * size
    if share.has_head:
        words = shapes.padded_vocab // grid.tp
        tile = min(tokens, shapes.log_probs_chunk if shapes.log_probs_chunk > 0 else HEAD_ROWS) * min(HEAD_WORDS, words)
        parts["rows before the output layer"] = tokens * hidden * size
        parts["gradient of these rows, fp32 and rounded"] = tokens * hidden * (4 + size)
        parts["logits of a tile, fp32"] = tile * 4
        parts["gradient of these logits"] = tile * size
        parts["gradient of the output layer"] = words * hidden * size
    return parts


@dataclass(frozen=True)
class EngineRank:
    """One engine rank's static bytes."""

    role: str
    weights: int
    kv_bytes_per_token: int
    mem_fraction: float
    draft_weights: int = 0


def stage_memory(
    share: StageShare,
    hf: HfConfig,
    grid: Grid,
    shapes: TrainShapes,
    *,
    bucket_bytes: int,
    engine: EngineRank | None,
    gpu_bytes: float,
    assumed: Assumed,
    shares_gpu: bool,
) -> StageMemory:
    """All phases of one rank of a stage, in the order of an iteration. shares_gpu: trainer and engine own the GPU in turn."""
    overhead = int(assumed.overhead_gb * GB)
    weights = share.parameters * shapes.param_bytes
    gradients = share.trained * shapes.grad_bytes
    state = optimizer_bytes(share, grid, shapes)
    on_gpu = 0 if shapes.optimizer_on_host else state
    kept = in_flight(share.stage, grid, shapes)
    stored = checkpointed_input(hf, grid, shapes) * share.stored_inputs * (1 if shapes.recompute else 16)
    holders = index_holder(hf, grid, shapes) * share.computing
    moving = transients(hf, grid, shapes, share)
    forward_only = {name: count for name, count in moving.items() if "gradient" not in name}
    base = {"weights": weights, "optimizer on GPU": on_gpu, "overhead": overhead}
    if shares_gpu:
        base["sleeping engine"] = int(assumed.sleeping_engine_gb * GB)
    awake = {**base, "gradients": gradients}
    phases = [
        Phase("load", {**awake, "one layer being read": weights // max(len(share.layers), 1)}),
        Phase("hand-over", awake),
        Phase("log-probs", {**awake, "index selection": holders, **forward_only}),
        Phase("train", {**awake, "stored layer inputs": stored * kept, "index selection": holders * kept, **moving}),
    ]
    # A trainer that owns its GPU alone keeps everything; otherwise gradients and optimizer are handed back before a sync.
    sync = {"weights": weights, "overhead": overhead} if shares_gpu else dict(awake)
    sync["bucket, as trained and on the wire"] = 3 * bucket_bytes
    if engine is not None:
        if shares_gpu:
            sync["engine weights"] = engine.weights
        phases.append(Phase("weight sync", sync))
        rollout = {
            "engine weights": engine.weights,
            "draft weights": engine.draft_weights,
            "KV cache": max(0, int(gpu_bytes * engine.mem_fraction) - engine.weights - engine.draft_weights),
            "engine overhead": int(assumed.engine_overhead_gb * GB),
        }
        if shares_gpu:
            rollout["sleeping trainer"] = int(assumed.sleeping_trainer_gb * GB)
        phases.append(Phase("rollout", rollout))
    phases.append(Phase("checkpoint", {**awake, "staging of one shard": weights // max(len(share.layers), 1)}))
    return StageMemory(share, tuple(phases), state if shapes.optimizer_on_host else 0)


def kv_bytes_per_token(hf: HfConfig, *, fp8: bool, tp: int = 1, drafts: bool = False) -> int:
    """Of one engine rank. Sparse attention keeps 656 bytes (or 576 bf16 values) a layer and 132 bytes a computing layer.

    drafts: the MTP layer, which runs an indexer of its own, keeps a cache too.
    """
    layers = hf.num_layers + (hf.num_mtp_layers if drafts else 0)
    if hf.has_indexer:
        latent = (
            hf["kv_lora_rank"] + hf["kv_lora_rank"] // 128 * 4 + 2 * hf["qk_rope_head_dim"]
            if fp8
            else 2 * (hf["kv_lora_rank"] + hf["qk_rope_head_dim"])
        )
        computing = sum(hf.runs_indexer(layer) for layer in range(hf.num_layers))
        computing += layers - hf.num_layers
        return layers * latent + computing * (hf["index_head_dim"] + 4)
    size = 1 if fp8 else 2
    if hf.is_mla:
        return layers * (hf["kv_lora_rank"] + hf["qk_rope_head_dim"]) * size
    groups = max(1, hf["num_key_value_heads"] // tp)
    return layers * 2 * groups * hf.head_dim * size
