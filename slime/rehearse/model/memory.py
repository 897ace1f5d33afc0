"""Bytes of one GPU through a whole iteration, per pipeline stage, and of one node's main memory. Pure arithmetic.

Every term is a function of shapes; nothing is fitted. What a caching allocator, communication libraries and the CUDA context
add is one printed number (`Assumed.overhead_gb`). `slime.rehearse.model.measured` sets predictions beside the peaks that a run
measured. A trainer on a CPU has a model of its own, `slime.rehearse.model.host_memory`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from slime.model.hf_config import HfConfig
from slime.model.placement import Grid
from slime.rehearse.model.engine_memory import EngineRank
from slime.rehearse.model.shares import StageShare

GB = 1e9


@dataclass(frozen=True)
class Assumed:
    """Values that neither flags nor shapes decide; `--assume NAME=VALUE` replaces one."""

    overhead_gb: float = 6.0
    """CUDA context, NCCL buffers, allocator slack of one process while it owns the GPU."""
    sleeping_trainer_gb: float = 4.0
    """What stays of a trainer that handed its memory back."""
    sleeping_engine_gb: float = 5.0
    """What stays of an engine rank that handed its memory back: contexts, workspaces, communication buffers, graphs. 5.2 GB on
    one H100 with SGLang 0.5.17, one rank and no graphs; 1.1 on one H200 with 0.5.23, one rank, graphs and EAGLE."""
    engine_overhead_gb: float = 8.0
    """Context, communicators, CUDA graphs, activations of an engine rank; DeepEP's buffers are counted apart."""
    host_process_gb: float = 0.415
    """A training rank on a CPU before it holds a model: Python, torch, megatron-core, Ray."""
    host_libraries_gb: float = 0.115
    """What its first pass adds beside tensors: code of the operators, communication, blocks that the allocator keeps."""
    mem_fraction_static: float = 0.8
    """Share of the GPU for weights and KV cache where --sglang-mem-fraction-static does not say."""
    prompt_tokens: float = 1024
    """Tokens of a prompt where --rollout-max-prompt-len does not bound it."""


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
    offloaded: float
    """Share of the optimizer whose state and step are the host's."""
    micro_batches: int
    """Per rank and step; bounds what is in flight."""
    padded_vocab: int
    log_probs_chunk: int
    core_axis: str = "queries"
    """What tensor-parallel ranks share the sparse core by (--dsa-core-axis)."""
    vpp: int = 1
    """Model chunks per stage."""
    recompute_block: int | None = None
    """Layers of a chunk that are recomputed with --recompute-method block; None recomputes all."""
    critic: bool = False
    """A second model of the same shape, with gradients and optimizer, is on the same ranks."""
    copies: int = 0
    """Of the whole weights in main memory: reference, teacher, and the trained ones while one of them plays."""
    snapshot_bytes: int = 0
    """Per trained parameter, of one snapshot for restarts (slime.training.rank_snapshot); 0 where none is taken."""
    longest_tokens: int = 0
    """Rows of one context-parallel rank for the longest sample, padded; above `tokens` it is trained alone."""


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
    host_checkpoint: int = 0
    """Bytes of one rank in main memory while a checkpoint is written: the same, and what waits for the disk."""
    host_gradients: int = 0
    """Bytes of float32 gradients of one rank in main memory, for the optimizer there."""
    host_copies: int = 0
    """Bytes of one rank's copies of weights in main memory (TrainShapes.copies)."""
    host_weights: int = 0
    """Bytes of one rank's weights in main memory while engines own the GPU."""
    host_snapshot: int = 0
    """Bytes of one rank's whole training state in main memory, once (--snapshot-interval)."""

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)


def optimizer_bytes(share: StageShare, grid: Grid, shapes: TrainShapes, *, trained_only: bool = True) -> int:
    """State of one rank. Dense parameters are spread over data- and context-parallel ranks, experts over their own replicas."""
    dense = share.dense - (share.frozen if trained_only else 0)
    return dense * shapes.optimizer_bytes // (grid.dp * grid.cp) + share.experts * shapes.optimizer_bytes // grid.edp


def snapshot_bytes(share: StageShare, grid: Grid, shapes: TrainShapes) -> int:
    """One snapshot of one rank: main parameters and moments, which lie as the optimizer's state does, and frozen parameters."""
    if not shapes.snapshot_bytes:
        return 0
    kept = replace(shapes, optimizer_bytes=shapes.snapshot_bytes)
    return optimizer_bytes(share, grid, kept) + share.frozen * shapes.param_bytes


def in_flight(stage: int, grid: Grid, shapes: TrainShapes) -> float:
    """Micro-batches whose activations a stage keeps at once under one-forward-one-backward.

    With v virtual stages a chunk holds 1/v of the stage's layers, and 2 (p - 1 - stage) + (v - 1) p + 1 chunks are under way:
    megatron-core's warm-up of the interleaved schedule, and the one that follows.
    """
    if shapes.vpp > 1:
        return min(2 * (grid.pp - 1 - stage) + (shapes.vpp - 1) * grid.pp + 1, shapes.micro_batches * shapes.vpp) / shapes.vpp
    return min(grid.pp - stage, shapes.micro_batches)


UNSAVED = 16
"""Inputs' worth of activations that a layer keeps without recomputation."""


def stored_inputs(share: StageShare, hf: HfConfig, grid: Grid, shapes: TrainShapes) -> int:
    """Bytes that the layers of a stage keep of one micro-batch."""
    one = checkpointed_input(hf, grid, shapes)
    if not shapes.recompute:
        return one * share.stored_inputs * UNSAVED
    if shapes.recompute_block is None:
        return one * share.stored_inputs
    # --recompute-method block: so many layers of each chunk, the others keep all.
    recomputed = min(shapes.recompute_block * shapes.vpp, len(share.layers))
    return one * (share.stored_inputs - len(share.layers) + recomputed + UNSAVED * (len(share.layers) - recomputed))


def checkpointed_input(hf: HfConfig, grid: Grid, shapes: TrainShapes) -> int:
    """A layer's stored input under full recomputation, sequence-parallel."""
    return shapes.tokens * hf["hidden_size"] * shapes.param_bytes // grid.tp


def index_holder(hf: HfConfig, grid: Grid, shapes: TrainShapes) -> int:
    """int32 [rows, topk] of one computing layer: this rank's slice of the tokens, or all of them where heads share the core."""
    rows = shapes.tokens // (grid.tp if shapes.core_axis == "queries" else 1)
    return rows * hf["index_topk"] * 4 if hf.has_indexer else 0


# slime/ops/vocab_logprob.py: logits exist in tiles of so many rows (where --log-probs-chunk-size does not say) and words.
HEAD_ROWS, HEAD_WORDS = 16384, 4096


# slime_plugins/models/glm5/ops/hopper_ops.py: what the sparse core's backward and the indexer hold at once, at most. The first
# gives way where memory is short.
STAGING_BYTES, SCORES_BYTES = 5_000_000_000, 1 << 28


def working_sets(hf: HfConfig, grid: Grid, shapes: TrainShapes, share: StageShare, *, backward: bool) -> list[dict[str, int]]:
    """What a GPU holds beside weights, stored inputs and indices while it works on one thing: an attention, the experts of a
    layer (whose attention's results wait for their own backward), the output layer. One of them at a time.
    """
    tokens, hidden, size = shapes.tokens, hf["hidden_size"], shapes.param_bytes
    states = {"hidden states of the layer": 4 * tokens // grid.tp * hidden * size}
    attention, kept = (_sparse_core if hf.has_indexer else _dense_core)(hf, grid, shapes, backward=backward)
    sets = [states | attention]
    if hf.has_indexer and share.computing:
        scores = min(SCORES_BYTES, tokens // grid.tp * shapes.stream * 4)
        sets.append(states | {"queries": attention["queries"], "indexer scores": scores})
    if hf.num_experts:
        sets.append(states | kept | experts_parts(hf, grid, shapes, both_ways=backward))
    if share.has_head:
        head = head_parts(hf, grid, shapes)
        sets.append(head if backward else {name: count for name, count in head.items() if "gradient" not in name})
    return sets


def _sparse_core(hf: HfConfig, grid: Grid, shapes: TrainShapes, *, backward: bool) -> tuple[dict[str, int], dict[str, int]]:
    """(at its peak, what of it waits for backward): slime_plugins/models/glm5/attention.py step by step. A rank has as many
    pairs of row and head by queries as by heads."""
    size, up_heads = shapes.param_bytes, hf["num_attention_heads"]
    pairs = shapes.tokens * up_heads // grid.tp * size
    query, value = hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"], hf["v_head_dim"]
    latent, row = hf["kv_lora_rank"], hf["kv_lora_rank"] + hf["qk_rope_head_dim"]
    exchanged = grid.tp > 1 and shapes.core_axis == "queries"
    up = up_heads * (hf["qk_nope_head_dim"] + value) * latent if exchanged else 0
    kept = {
        "queries": pairs * query,
        "absorbed queries": pairs * row,
        "outputs over latents": pairs * latent,
        "outputs": pairs * value,
        "whole key/value up-projection": up * size,
    }
    if not backward:
        # As projected, rotated, put together and, by queries, exchanged: all in use until the outputs are made.
        return kept | {"queries": pairs * ((3 if exchanged else 2) * query + hf["qk_rope_head_dim"])}, kept
    rows = shapes.tokens // (grid.tp if exchanged else 1)
    core = {
        "queries": pairs * query,
        "absorbed queries and their gradient": 2 * pairs * row,
        "outputs over latents, their gradient and its copy": 3 * pairs * latent,
        "staged gradients of keys": min(STAGING_BYTES, rows * hf["index_topk"] * row * 2),
        "keys, reordered, and their fp32 gradient": shapes.stream * row * (2 * size + 4),
        "whole key/value up-projection and its fp32 gradient": up * (size + 4),
    }
    return core, kept


def _dense_core(hf: HfConfig, grid: Grid, shapes: TrainShapes, *, backward: bool) -> tuple[dict[str, int], dict[str, int]]:
    width = hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"] if hf.is_mla else hf.head_dim
    one = shapes.tokens * hf["num_attention_heads"] // grid.tp * width * shapes.param_bytes
    kept = {"queries, keys, values, output": 4 * one}
    return {"queries, keys, values, output and gradients": 8 * one} if backward else kept, kept


def experts_parts(hf: HfConfig, grid: Grid, shapes: TrainShapes, *, both_ways: bool) -> dict[str, int]:
    """Of one layer, with even routing. both_ways: values and their gradients."""
    rows = shapes.tokens // grid.tp * hf["num_experts_per_tok"] * (grid.etp or 1) * shapes.param_bytes * (1 + both_ways)
    return {
        "routed tokens, in and out": 2 * rows * hf["hidden_size"],
        "expert intermediates": 3 * rows * hf["moe_intermediate_size"],
    }


def head_parts(hf: HfConfig, grid: Grid, shapes: TrainShapes) -> dict[str, int]:
    """Of the output layer and its loss, forward and backward together."""
    tokens, hidden, size = shapes.tokens, hf["hidden_size"], shapes.param_bytes
    words = shapes.padded_vocab // grid.tp
    tile = min(tokens, shapes.log_probs_chunk if shapes.log_probs_chunk > 0 else HEAD_ROWS) * min(HEAD_WORDS, words)
    return {
        "rows before the output layer": tokens * hidden * size,
        "gradient of these rows, fp32 and rounded": tokens * hidden * (4 + size),
        "logits of a tile, fp32": tile * 4,
        "gradient of these logits": tile * size,
        "gradient of the output layer": words * hidden * size,
    }


def _largest(sets: list[dict[str, int]]) -> dict[str, int]:
    return max(sets, key=lambda parts: sum(parts.values()))


@dataclass(frozen=True)
class Turns:
    """Who owns the GPU when."""

    shares_gpu: bool
    """Trainer and engine are on one GPU."""
    trainer_sleeps: bool = True
    engine_sleeps: bool = True


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
    turns: Turns,
    resumes: bool = True,
) -> StageMemory:
    """All phases of one rank of a stage, in the order of an iteration. engine: a rank of the engine on (or beside) this GPU.
    resumes: from a checkpoint with optimizer state; moments are made by the first step otherwise.
    """
    overhead, weights = int(assumed.overhead_gb * GB), share.parameters * shapes.param_bytes
    state = optimizer_bytes(share, grid, shapes)
    offloaded = int(state * shapes.offloaded)
    gradients, models = share.trained * shapes.grad_bytes, 2 if shapes.critic else 1
    awake = {"weights": weights, "optimizer on GPU": state - offloaded, "overhead": overhead, "gradients": gradients}
    if shapes.critic:
        awake["critic"] = weights + gradients + state - offloaded
    beside = _engine_beside(engine, gpu_bytes, assumed, turns)
    phases = [Phase(name, parts | beside) for name, parts in _training(share, hf, grid, shapes, awake, state, resumes)]
    if engine is not None:
        # A trainer that does not sleep keeps everything; otherwise gradients and optimizer are handed back before a sync.
        sleeps = turns.shares_gpu and turns.trainer_sleeps
        sync = {"weights": weights, "overhead": overhead} if sleeps else dict(awake)
        sync["bucket, as trained and on the wire"] = 3 * bucket_bytes
        if turns.shares_gpu:
            sync |= {"engine weights": engine.weights} if turns.engine_sleeps else beside
            sync |= {"DeepEP buffers": engine.buffers} if engine.buffers else {}
        phases.append(Phase("weight sync", sync))
        rollout = engine_parts(engine, gpu_bytes, assumed)
        if sleeps:
            rollout["sleeping trainer"] = int(assumed.sleeping_trainer_gb * GB)
        elif turns.shares_gpu:
            rollout |= awake
        phases.append(Phase("rollout", rollout))
    phases.append(Phase("checkpoint", {**awake, "staging of one shard": weights // max(len(share.layers), 1), **beside}))
    written = share.dense * shapes.param_bytes // (grid.dp * grid.cp) + share.experts * shapes.param_bytes // grid.edp
    return StageMemory(
        share,
        tuple(phases),
        offloaded * models,
        # Saved one after the other, so that one model's copies wait for the disk at a time.
        offloaded * models + state + written,
        # The optimizer on the host keeps float32 gradients of its share beside its state, pinned.
        host_gradients=offloaded // shapes.optimizer_bytes * 4 * models,
        host_copies=weights * shapes.copies,
        host_snapshot=snapshot_bytes(share, grid, shapes) * models,
        host_weights=weights * models if turns.shares_gpu and turns.trainer_sleeps else 0,
    )


def _cache_bytes(engine: EngineRank, gpu_bytes: float) -> int:
    if engine.most_tokens is not None:
        return engine.cache_tokens(gpu_bytes) * engine.kv_bytes_per_token
    return max(0, int(gpu_bytes * engine.mem_fraction) - engine.weights - engine.draft_weights)


def engine_parts(engine: EngineRank, gpu_bytes: float, assumed: Assumed) -> dict[str, int]:
    """An engine rank that serves."""
    parts = {
        "engine weights": engine.weights,
        "draft weights": engine.draft_weights,
        "KV cache": _cache_bytes(engine, gpu_bytes),
        "engine overhead": int(assumed.engine_overhead_gb * GB),
    }
    return parts | ({"DeepEP buffers": engine.buffers} if engine.buffers else {})


def _engine_beside(engine: EngineRank | None, gpu_bytes: float, assumed: Assumed, turns: Turns) -> dict[str, int]:
    """What an engine on the same GPU holds while the trainer works."""
    if not turns.shares_gpu:
        return {}
    if engine is not None and not turns.engine_sleeps:
        return engine_parts(engine, gpu_bytes, assumed)
    asleep = {"sleeping engine": int(assumed.sleeping_engine_gb * GB)}
    return asleep | ({"DeepEP buffers": engine.buffers} if engine is not None and engine.buffers else {})


def _training(
    share: StageShare, hf: HfConfig, grid: Grid, shapes: TrainShapes, awake: dict[str, int], state: int, resumes: bool
) -> Iterator[tuple[str, dict[str, int]]]:
    weights, on_gpu = awake["weights"], awake["optimizer on GPU"]
    loaded = on_gpu if resumes else on_gpu * (shapes.optimizer_bytes - 8) // shapes.optimizer_bytes
    reading = {**awake, "optimizer on GPU": loaded, "one layer being read": weights // max(len(share.layers), 1)}
    yield "load", max(reading, *_wrapping(share, shapes, awake), key=lambda parts: sum(parts.values()))
    yield "hand-over", awake
    holders = index_holder(hf, grid, shapes) * share.computing
    forward = _largest(working_sets(hf, grid, shapes, share, backward=False))
    yield "log-probs", {**awake, "index selection": holders, **forward}
    yield "train", awake | activations(share, hf, grid, shapes)
    if shapes.longest_tokens > shapes.tokens:
        yield "longest sample", awake | _with_longest(share, hf, grid, shapes)


def _wrapping(share: StageShare, shapes: TrainShapes, awake: dict[str, int]) -> Iterator[dict[str, int]]:
    """The two moments at which megatron-core moves trained weights into one buffer beside that of their gradients, dense ones
    first and then experts: each weight is there twice until the last one is copied."""
    dense = share.trained - share.experts
    moved = ((dense, dense * shapes.grad_bytes), (share.experts, awake["gradients"]))
    for count, gradients in moved:
        yield {**awake, "optimizer on GPU": 0, "gradients": gradients, "weights copied": count * shapes.param_bytes}


def activations(share: StageShare, hf: HfConfig, grid: Grid, shapes: TrainShapes) -> dict[str, int]:
    """What a stage keeps of the micro-batches under way, and works with in one of them."""
    kept = in_flight(share.stage, grid, shapes)
    return {
        "stored layer inputs": int(stored_inputs(share, hf, grid, shapes) * kept),
        "index selection": int(index_holder(hf, grid, shapes) * share.computing * kept),
        **_largest(working_sets(hf, grid, shapes, share, backward=True)),
    }


def _with_longest(share: StageShare, hf: HfConfig, grid: Grid, shapes: TrainShapes) -> dict[str, int]:
    """One micro-batch is the longest sample, trained alone; the others under way are of the usual length."""
    kept = in_flight(share.stage, grid, shapes)
    long = replace(shapes, tokens=shapes.longest_tokens, stream=shapes.longest_tokens * grid.cp)
    usual = max(kept - 1, 0)
    one = min(kept, 1)
    return {
        "stored layer inputs": int(stored_inputs(share, hf, grid, shapes) * usual + stored_inputs(share, hf, grid, long) * one),
        "index selection": int(share.computing * (index_holder(hf, grid, shapes) * usual + index_holder(hf, grid, long) * one)),
        **_largest(working_sets(hf, grid, long, share, backward=True)),
    }
