"""Memory of the whole run: stages in an iteration, the engines' cache, other numbers of nodes, a measured run beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from slime.rehearse.cost import SyncBytes, replaced
from slime.rehearse.engine_checks import EnginePlan
from slime.rehearse.findings import Findings
from slime.rehearse.host_memory import host_memory
from slime.rehearse.layout_checks import longest_sample
from slime.rehearse.measured import TOLERANCE, Comparison, Measured, compare, read_measured
from slime.rehearse.memory import Assumed, EngineRank, StageMemory, TrainShapes, kv_bytes_per_token, stage_memory
from slime.rehearse.options import Options
from slime.rehearse.reading import Reading
from slime.rehearse.shares import StageShare, shares_of, stage_parts

DEFAULT_LENGTH = 32768
"""Tokens of a sample where no flag bounds it."""


@dataclass(frozen=True)
class Fit:
    """Training memory of the same model on another number of nodes: CP and EP scaled, TP and PP as given."""

    nodes: int
    cp: int
    dp: int
    ep: int
    peak_gb: float
    host_gb_per_node: float
    fits: bool


@dataclass(frozen=True)
class KvCache:
    """What an engine GPU has left for its cache."""

    role: str
    tokens: int
    bytes_per_token: int
    gpus: int
    """Of the engine."""
    attention_dp: int
    longest: int | None
    """Tokens of the longest sample that the flags allow."""

    @property
    def at_once(self) -> int | None:
        """Longest samples that one engine holds at the same time: each attention-data-parallel rank has a cache of its own."""
        return self.tokens // self.longest * self.attention_dp if self.longest else None


@dataclass(frozen=True)
class Budget:
    stages: tuple[StageMemory, ...]
    caches: tuple[KvCache, ...]
    fits: tuple[Fit, ...]
    assumed: Mapping[str, float]
    node_optimizer: int
    """Bytes of optimizer state in main memory of the fullest node."""
    node_checkpoint: int
    """The same and the copies that wait for the disk, while a checkpoint is written."""
    measured: Measured | None = None
    comparisons: tuple[Comparison, ...] = ()


def assumed_of(words: Sequence[str]) -> Assumed:
    """NAME=VALUE words replace assumptions. Raises ValueError naming the legal ones."""
    return replaced(Assumed(), words, flag="--assume")


def train_shapes(reading: Reading, *, mean_share: float) -> TrainShapes:
    """mean_share: mean length of a sample / the longest that the flags allow."""
    config, grid = reading.config, reading.grid
    batch, optimizer = config.batch, config.optimizer
    longest = longest_sample(config) or DEFAULT_LENGTH
    dynamic = batch.use_dynamic_batch_size and batch.max_tokens_per_gpu
    tokens = batch.max_tokens_per_gpu if dynamic else -(-longest * batch.micro_batch_size // grid.cp)
    samples = (batch.global_batch_size or 1) / grid.dp
    mean = max(1, int(longest * mean_share))
    micro = (
        int(-(-samples * mean // (tokens * grid.cp)))
        if batch.use_dynamic_batch_size
        else int(samples // batch.micro_batch_size)
    )
    dtype = 4 if config.model.params_dtype == "fp32" else 2
    sizes = {"fp32": 4, "bf16": 2}
    moments = (
        sizes[optimizer.exp_avg_dtype] + sizes[optimizer.exp_avg_sq_dtype] if optimizer.use_precision_aware_optimizer else 8
    )
    return TrainShapes(
        tokens=tokens,
        stream=tokens * grid.cp,
        recompute=config.model.megatron.get("recompute_granularity") == "full",
        param_bytes=dtype,
        grad_bytes=4 if dtype == 4 or optimizer.accumulate_allreduce_grads_in_fp32 else 2,
        # float32 weights are their own masters
        optimizer_bytes=moments + (4 if dtype == 2 else 0),
        optimizer_on_host=optimizer.optimizer_cpu_offload,
        micro_batches=max(1, micro),
        padded_vocab=config.model.padded_vocab_size or reading.hf["vocab_size"],
        log_probs_chunk=batch.log_probs_chunk_size,
        core_axis=config.parallel.dsa_core_axis,
    )


def check_memory(
    reading: Reading,
    shares: Sequence[StageShare],
    shapes: TrainShapes,
    engines: EnginePlan,
    sync: SyncBytes | None,
    options: Options,
    findings: Findings,
) -> Budget:
    """sync: what one engine GPU keeps; None without engines."""
    config, assumed = reading.config, assumed_of(options.assume)
    ranks = {}
    if sync is not None:
        ranks = {spec.role: _engine_rank(reading, engines, spec.role, sync, assumed) for spec in engines.specs}
    engine = max(ranks.values(), key=lambda rank: rank.mem_fraction, default=None)
    stages = tuple(
        stage_memory(
            share,
            reading.hf,
            reading.grid,
            shapes,
            bucket_bytes=config.engine.update_weight_buffer_size,
            engine=engine,
            gpu_bytes=options.gpu_memory_gb * 1e9,
            assumed=assumed,
            shares_gpu=_shares_gpu(reading),
        )
        for share in shares
    )
    _judge_stages(stages, options.gpu_memory_gb, findings)
    caches = tuple(_judge_cache(reading, engines, rank, options.gpu_memory_gb, findings) for rank in ranks.values())
    fits = tuple(_node_counts(reading, shapes, assumed, options.gpu_memory_gb))
    cluster = config.cluster
    nodes = (reading.grid.ranks_per_stage, cluster.actor_num_gpus_per_node, cluster.actor_num_nodes)
    budget = Budget(
        stages,
        caches,
        fits,
        {item.name: getattr(assumed, item.name) for item in fields(assumed)},
        node_optimizer=fullest_node([stage.host_optimizer for stage in stages], *nodes),
        node_checkpoint=fullest_node([stage.host_checkpoint for stage in stages], *nodes),
    )
    return _beside_measured(budget, reading, shares, shapes, engine, options, findings) if options.measured else budget


def _shares_gpu(reading: Reading) -> bool:
    config = reading.config
    return bool(config.cluster.colocate and config.cluster.offload_train and not config.debug.debug_train_only)


def _engine_rank(reading: Reading, engines: EnginePlan, role: str, sync: SyncBytes, assumed: Assumed) -> EngineRank:
    spec, hf = next(spec for spec in engines.specs if spec.role == role), reading.hf
    dtype = str(spec.settings.get("kv_cache_dtype", "auto"))
    drafts = bool(spec.settings.get("speculative_algorithm")) and hf.num_mtp_layers > 0
    kv = kv_bytes_per_token(hf, fp8=dtype.startswith("fp8"), tp=spec.tp_size // spec.dp_size, drafts=drafts)
    fraction = float(str(spec.settings.get("mem_fraction_static", assumed.mem_fraction_static)))
    return EngineRank(role, sync.per_gpu, kv, fraction, sync.draft_per_gpu if drafts else 0)


def _judge_stages(stages: Sequence[StageMemory], limit_gb: float, findings: Findings) -> None:
    over = [(stage.share.stage, phase) for stage in stages for phase in stage.phases if phase.total > limit_gb * 1e9]
    for stage, phase in over:
        largest = max(phase.parts, key=lambda name: phase.parts[name])
        findings.violation(
            "memory",
            f"stage {stage} needs {phase.total / 1e9:.1f} GB in phase {phase.name}, a GPU has {limit_gb:g}",
            ", ".join(f"{name} {count / 1e9:.1f}" for name, count in phase.parts.items() if count >= 5e7),
            _fix(phase.name, largest),
        )
    if not over:
        worst = max((stage.peak for stage in stages), key=lambda phase: phase.total)
        findings.ok(
            "memory", f"every phase of every stage fits {limit_gb:g} GB", f"largest: {worst.name} {worst.total / 1e9:.1f} GB"
        )


def _fix(phase: str, largest: str) -> str:
    if phase == "rollout":
        return "lower --sglang-mem-fraction-static"
    if phase == "weight sync":
        return "lower --update-weight-buffer-size, or raise the engine's GPUs (ep_size)"
    return {
        "gradients": "more pipeline stages or expert ranks: weights and gradients fill the GPU",
        "optimizer on GPU": "pass --optimizer-cpu-offload, or more data-parallel ranks",
        "stored layer inputs": "lower --max-tokens-per-gpu, or --recompute-granularity full",
        "index selection": "lower --max-tokens-per-gpu or the layers of this stage",
    }.get(largest, "lower --max-tokens-per-gpu, or give this stage fewer layers")


def _judge_cache(reading: Reading, engines: EnginePlan, rank: EngineRank, limit_gb: float, findings: Findings) -> KvCache:
    room, longest = int(limit_gb * 1e9 * rank.mem_fraction), longest_sample(reading.config)
    spec = next(spec for spec in engines.specs if spec.role == rank.role)
    tokens = max(0, room - rank.weights - rank.draft_weights) // rank.kv_bytes_per_token
    cache = KvCache(rank.role, tokens, rank.kv_bytes_per_token, spec.num_gpus, spec.dp_size, longest)
    batch = f", {cache.at_once:,} samples of {longest:,} in an engine of {cache.gpus} GPUs at once" if longest else ""
    findings.check(
        rank.weights + rank.draft_weights < room and (longest is None or tokens >= longest or rank.role == "prefill"),
        "memory",
        f"{rank.role}: {tokens:,} tokens of KV cache per GPU",
        values=f"weights {rank.weights / 1e9:.2f} GB, {rank.kv_bytes_per_token:,} bytes per token, "
        f"mem fraction {rank.mem_fraction:g}{batch}",
        wrong=f"{rank.role}: the KV cache holds {tokens:,} tokens per GPU, a sample may have {longest or 0:,}",
        fix="raise --sglang-mem-fraction-static, more GPUs per engine, or shorter responses",
    )
    return cache


def _node_counts(reading: Reading, shapes: TrainShapes, assumed: Assumed, limit_gb: float) -> list[Fit]:
    """Powers of two of nodes on which the stages could be placed, and whether the largest training phase fits the GPU.

    The micro-batch keeps its tokens per GPU, so a smaller CP shortens the stream; the engines are not part of the question.
    """
    given, per_node = reading.grid, reading.config.cluster.actor_num_gpus_per_node
    experts, found = reading.hf.num_experts, []
    parts = stage_parts(reading.table, reading.chunks, given.pp, mtp=reading.trains_mtp)
    for nodes in (1, 2, 4, 8, 16, 32, 64, 128):
        ranks = nodes * per_node // given.pp
        if nodes * per_node % given.pp or ranks % given.tp:
            continue
        cp = min(given.cp, ranks // given.tp)
        ep = min(ranks // given.etp, experts, 64) if experts else 1
        if ranks % (given.tp * cp) or ranks % (given.etp * ep) or (experts and experts % ep):
            continue
        grid = replace(given, world=nodes * per_node, cp=cp, ep=ep)
        micro = max(1, shapes.micro_batches * given.cp * given.dp // (cp * grid.dp))
        here = replace(shapes, stream=shapes.tokens * cp, micro_batches=micro)
        stages = [
            stage_memory(
                share,
                reading.hf,
                grid,
                here,
                bucket_bytes=0,
                engine=None,
                gpu_bytes=0,
                assumed=assumed,
                shares_gpu=_shares_gpu(reading),
            )
            for share in shares_of(parts, grid, padded_vocab=reading.config.model.padded_vocab_size)
        ]
        peak = max(stage.peak.total for stage in stages) / 1e9
        host = fullest_node([stage.host_optimizer for stage in stages], grid.ranks_per_stage, per_node, nodes) / 1e9
        found.append(Fit(nodes, cp, grid.dp, ep, peak, host, peak <= limit_gb))
    return found


def fullest_node(per_rank: Sequence[int], ranks_per_stage: int, gpus_per_node: int, nodes: int) -> int:
    """Bytes on the node whose ranks hold most. per_rank: of one rank of each stage."""
    ranks = [per_rank[rank // ranks_per_stage] for rank in range(nodes * gpus_per_node)]
    return max(sum(ranks[node * gpus_per_node : (node + 1) * gpus_per_node]) for node in range(nodes))


def _beside_measured(
    budget: Budget,
    reading: Reading,
    shares: Sequence[StageShare],
    shapes: TrainShapes,
    engine: EngineRank | None,
    options: Options,
    findings: Findings,
) -> Budget:
    """Predictions for the micro-batches that the run really had, beside its peaks."""
    grid, config, assumed = reading.grid, reading.config, assumed_of(options.assume)
    measured = read_measured(options.measured)
    if not findings.check(
        (measured.num_ranks, measured.num_stages) == (grid.world, grid.pp),
        "memory",
        f"--measured {options.measured} is of {grid.world} ranks in {grid.pp} stages",
        wrong=f"--measured {options.measured} is of {measured.num_ranks} ranks in {measured.num_stages} stages, "
        f"the flags make {grid.world} in {grid.pp}",
        fix="pass the flags of the run that wrote the file",
    ):
        return budget
    seen = replace(
        shapes,
        tokens=measured.micro_batch_tokens,
        stream=measured.micro_batch_tokens * grid.cp,
        micro_batches=measured.micro_batches,
    )
    buffer = config.engine.update_weight_buffer_size
    if measured.device == "host":
        wide = config.model.params_dtype != "bf16"  # a CPU trains in float32 unless told otherwise
        seen = replace(seen, param_bytes=4, grad_bytes=4, optimizer_bytes=8) if wide else seen
        predicted = [host_memory(share, reading.hf, grid, seen, assumed, bucket_bytes=buffer) for share in shares]
        if not shapes.recompute:
            findings.unchecked(
                "memory",
                "what layers keep for backward is not predicted for a CPU",
                "no --recompute-granularity full",
                "expect larger peaks than predicted with long micro-batches",
            )
    else:
        predicted = [
            stage_memory(
                share,
                reading.hf,
                grid,
                seen,
                bucket_bytes=buffer,
                engine=engine,
                gpu_bytes=options.gpu_memory_gb * 1e9,
                assumed=assumed,
                shares_gpu=_shares_gpu(reading),
                resumes=measured.resumes,
            )
            for share in shares
        ]
    rows = compare(measured, predicted)
    worst = max(rows, key=lambda row: abs(row.error))
    what = f"memory that the run measured ({measured.device}, {len(rows)} peaks) is predicted within {TOLERANCE:.0%}"
    if abs(worst.error) <= TOLERANCE:
        findings.ok("memory", what, f"largest error: {worst.line()}")
    else:
        findings.unchecked(
            "memory",
            f"predictions are off by up to {abs(worst.error):.0%} of what the run measured ({measured.device})",
            worst.line(),
            "take the difference into account, e.g. with --assume overhead_gb=...",
        )
    return replace(budget, measured=measured, comparisons=tuple(rows))
