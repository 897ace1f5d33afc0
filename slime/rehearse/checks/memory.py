"""Memory of the whole run: stages in an iteration, the engines' cache, other numbers of nodes, a measured run beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from slime.config import Config
from slime.rehearse.checks.layout import padded_sample
from slime.rehearse.findings import Findings
from slime.rehearse.model.engine_memory import EngineRank, KvCache
from slime.rehearse.model.host_memory import host_memory
from slime.rehearse.model.measured import TOLERANCE, Comparison, Measured, compare, read_measured
from slime.rehearse.model.memory import Assumed, StageMemory, TrainShapes, Turns, stage_memory
from slime.rehearse.model.rates import replaced
from slime.rehearse.model.shares import StageShare, shares_of, stage_parts
from slime.rehearse.options import Options
from slime.rehearse.reading import Basis, Reading
from slime.training.copies import copy_places

DEFAULT_LENGTH = 32768
"""Tokens of a sample where no flag bounds it."""

SNAPSHOTS, PEERS = "snapshots of the ranks there", "snapshots of another node's ranks"


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
class NodeMemory:
    """Main memory of the fullest node by part, bytes: while engines generate, and while a checkpoint is written."""

    rollout: Mapping[str, int]
    checkpoint: Mapping[str, int]


@dataclass(frozen=True)
class Budget:
    stages: tuple[StageMemory, ...]
    caches: tuple[KvCache, ...]
    fits: tuple[Fit, ...]
    assumed: Mapping[str, float]
    node: NodeMemory
    measured: Measured | None = None
    comparisons: tuple[Comparison, ...] = ()

    @property
    def node_optimizer(self) -> int:
        """Bytes of optimizer state in main memory of the fullest node."""
        return self.node.rollout["optimizer"]

    @property
    def node_checkpoint(self) -> int:
        """The same and the copies that wait for the disk, while a checkpoint is written."""
        return self.node.checkpoint["optimizer and copies for the disk"]


def assumed_of(words: Sequence[str]) -> Assumed:
    """NAME=VALUE words replace assumptions. Raises ValueError naming the legal ones."""
    return replaced(Assumed(), words, flag="--assume")


def prompt_tokens(config: Config, assumed: Assumed) -> int:
    """Of the longest prompt: what bounds it, or what is assumed."""
    return config.rollout.rollout_max_prompt_len or int(assumed.prompt_tokens)


def mean_sample(longest: int | None, *, prompt: int, share: float) -> int:
    """Tokens. longest: of the longest sample. share: mean response / longest."""
    whole = longest or DEFAULT_LENGTH
    return max(1, int(min(prompt, whole) + max(0, whole - prompt) * share))


def train_shapes(reading: Reading, *, longest: int | None, mean: int) -> TrainShapes:
    """longest: tokens of the longest sample that the flags allow. mean: of a sample."""
    config, grid = reading.config, reading.grid
    batch, optimizer, mega = config.batch, config.optimizer, config.model.megatron
    length = longest or DEFAULT_LENGTH
    dynamic = batch.use_dynamic_batch_size and batch.max_tokens_per_gpu
    tokens = batch.max_tokens_per_gpu if dynamic else -(-length * batch.micro_batch_size // grid.cp)
    samples = (batch.global_batch_size or 1) / grid.dp
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
    block = mega.get("recompute_method") == "block"
    return TrainShapes(
        tokens=tokens,
        stream=tokens * grid.cp,
        recompute=mega.get("recompute_granularity") == "full",
        param_bytes=dtype,
        grad_bytes=4 if dtype == 4 or optimizer.accumulate_allreduce_grads_in_fp32 else 2,
        # float32 weights are their own masters
        optimizer_bytes=moments + (4 if dtype == 2 else 0),
        offloaded=optimizer.optimizer_offload_fraction if optimizer.optimizer_cpu_offload else 0.0,
        micro_batches=max(1, micro),
        padded_vocab=config.model.padded_vocab_size or reading.hf["vocab_size"],
        log_probs_chunk=batch.log_probs_chunk_size,
        core_axis=config.parallel.dsa_core_axis,
        vpp=config.parallel.virtual_pipeline_model_parallel_size or 1,
        recompute_block=mega.get("recompute_num_layers", 0) if block else None,
        critic=config.algorithm.advantage_estimator == "ppo",
        copies=weight_copies(config),
        # Main parameters are float32 in every dtype of the weights.
        snapshot_bytes=moments + 4 if config.upkeep.snapshot_interval else 0,
        longest_tokens=padded_sample(config, grid, longest) // grid.cp if longest and dynamic else 0,
    )


def weight_copies(config: Config) -> int:
    """Whole copies of the weights that a rank keeps in main memory (slime.training.snapshots)."""
    rules = config.algorithm
    reference = bool(rules.use_kl_loss or rules.kl_coef)
    sent = 2 if rules.keep_old_actor else 0  # slime.training.old_actor
    beside = reference + sent + (rules.use_opd and rules.opd_type == "megatron")
    return beside + 1 if beside else 0  # the trained ones lie there while another plays


def check_memory(
    reading: Reading,
    shares: Sequence[StageShare],
    shapes: TrainShapes,
    ranks: Sequence[EngineRank],
    options: Options,
    findings: Findings,
    *,
    longest: int | None,
    node_counts: bool = True,
) -> Budget:
    """ranks: one of each different engine; none without engines. node_counts: other numbers of nodes too."""
    config, assumed, turns = reading.config, assumed_of(options.assume), _turns(reading)
    told = {
        "bucket_bytes": config.engine.update_weight_buffer_size,
        "gpu_bytes": options.gpu_memory_gb * 1e9,
        "assumed": assumed,
        "turns": turns,
    }
    stages = tuple(
        _worst([stage_memory(share, reading.hf, reading.grid, shapes, engine=engine, **told) for engine in ranks or [None]])
        for share in shares
    )
    _judge_stages(stages, options.gpu_memory_gb, findings)
    caches = tuple(_judge_cache(rank, options.gpu_memory_gb, longest, reading.basis, findings) for rank in ranks)
    node = _node_memory(reading, stages, ranks, turns)
    _judge_node(node, options.host_memory_gb, findings)
    budget = Budget(
        stages,
        caches,
        tuple(_node_counts(reading, shapes, assumed, options.gpu_memory_gb)) if node_counts else (),
        {item.name: getattr(assumed, item.name) for item in fields(assumed)},
        node,
    )
    return _beside_measured(budget, reading, shares, shapes, ranks, options, findings) if options.measured else budget


def _worst(cases: Sequence[StageMemory]) -> StageMemory:
    """Beside each kind of engine in turn: every phase as it is where it needs most."""
    phases = [max(same, key=lambda phase: phase.total) for same in zip(*(case.phases for case in cases), strict=True)]
    return replace(cases[0], phases=tuple(phases))


def _turns(reading: Reading) -> Turns:
    cluster, debug = reading.config.cluster, reading.config.debug
    shares = bool(cluster.colocate and not debug.debug_train_only)
    return Turns(shares, bool(cluster.offload_train), bool(cluster.offload_rollout))


def _node_memory(reading: Reading, stages: Sequence[StageMemory], ranks: Sequence[EngineRank], turns: Turns) -> NodeMemory:
    cluster = reading.config.cluster
    nodes = (reading.grid.ranks_per_stage, cluster.actor_num_gpus_per_node, cluster.actor_num_nodes)

    def fullest(what: str) -> int:
        return fullest_node([getattr(stage, what) for stage in stages], *nodes)

    gradients, copies = fullest("host_gradients"), fullest("host_copies")
    snapshots = _snapshots(reading.config, per_node([stage.host_snapshot for stage in stages], *nodes))
    # SGLang keeps a copy of the draft model's weights, which a sync does not bring.
    drafts = max((rank.draft_weights for rank in ranks), default=0) * (cluster.num_gpus_per_node if turns.shares_gpu else 0)
    return NodeMemory(
        {
            "optimizer": fullest("host_optimizer"),
            "float32 gradients": gradients,
            "sleeping weights": fullest("host_weights"),
            "copies of weights (reference, teacher)": copies,
            "engines' draft weights": drafts,
            **snapshots,
        },
        {
            "optimizer and copies for the disk": fullest("host_checkpoint"),
            "float32 gradients": gradients,
            "copies of weights (reference, teacher)": copies,
            "engines' draft weights": drafts,
            **snapshots,
        },
    )


def _snapshots(config: Config, nodes: Sequence[int]) -> dict[str, int]:
    """On the node that holds most: of the ranks there, and of those of another node. nodes: bytes of one snapshot by node."""
    rules = config.upkeep
    if rules.snapshot_interval is None:
        return {}
    copied = [0] * len(nodes)
    if rules.snapshot_peer and len(nodes) > 1:
        for node, place in enumerate(copy_places(nodes)):
            copied[place] = nodes[node]
    own, other = max(zip(nodes, copied, strict=True), key=lambda held: (sum(held), held[0]))
    return {SNAPSHOTS: rules.snapshot_versions * own} | ({PEERS: rules.snapshot_versions * other} if other else {})


def _judge_node(node: NodeMemory, limit_gb: float, findings: Findings) -> None:
    told = ", ".join(f"{name} {count / 1e9:.0f}" for name, count in node.rollout.items() if count >= 5e8)
    always, saving = sum(node.rollout.values()) / 1e9, sum(node.checkpoint.values()) / 1e9
    findings.check(
        always <= limit_gb,
        "memory",
        f"main memory of the fullest node: {always:.0f} GB while engines generate, of {limit_gb:g} (--host-memory)",
        values=told,
        wrong=f"the fullest node needs {always:.0f} GB of main memory, it has {limit_gb:g} (--host-memory)",
        fix=_node_fix(node),
    )
    if saving > limit_gb >= always:
        findings.unchecked(
            "memory",
            f"while a checkpoint is written the fullest node would hold {saving:.0f} GB if every copy waits for the "
            "disk at once, "
            f"it has {limit_gb:g} (--host-memory)",
            "",
            "use more nodes, or --no-save-optim",
        )


def _node_fix(node: NodeMemory) -> str:
    if PEERS in node.rollout:
        return "--snapshot-versions 1, leave the copies on other nodes out (--no-snapshot-peer), or use more nodes"
    if SNAPSHOTS in node.rollout:
        return "leave --snapshot-interval out, lower --optimizer-offload-fraction, or use more nodes"
    return "lower --optimizer-offload-fraction, or use more nodes"


def _judge_stages(stages: Sequence[StageMemory], limit_gb: float, findings: Findings) -> None:
    """One finding for each phase that is too large somewhere, at the stage where it is largest."""
    limit, fits = limit_gb * 1e9, True
    for name in [phase.name for phase in stages[0].phases]:
        over = [stage for stage in stages if stage.phase(name).total > limit]
        if not over:
            continue
        fits = False
        worst = max(over, key=lambda stage: stage.phase(name).total)
        parts, others = worst.phase(name).parts, [str(stage.share.stage) for stage in over if stage is not worst]
        findings.violation(
            "memory",
            f"stage {worst.share.stage} needs {worst.phase(name).total / 1e9:.1f} GB in phase {name}, a GPU has {limit_gb:g}"
            + (f"; so do stages {', '.join(others)}" if others else ""),
            ", ".join(f"{part} {count / 1e9:.1f}" for part, count in parts.items() if count >= 5e7),
            _fix(name, parts),
        )
    if fits:
        worst = max((stage.peak for stage in stages), key=lambda phase: phase.total)
        findings.ok(
            "memory", f"every phase of every stage fits {limit_gb:g} GB", f"largest: {worst.name} {worst.total / 1e9:.1f} GB"
        )


def _fix(phase: str, parts: Mapping[str, int]) -> str:
    largest = max(parts, key=lambda part: parts[part])
    if phase == "rollout" and not parts["KV cache"]:
        return "more GPUs for each engine (num_gpus_per_engine, ep_size): its weights alone are too large"
    if phase == "rollout":
        return "lower --sglang-mem-fraction-static"
    if "engine overhead" in parts:
        return "leave --no-offload-rollout out: the engine keeps its memory while the trainer works"
    if phase == "weight sync":
        return "lower --update-weight-buffer-size, or raise the engine's GPUs (ep_size)"
    return {
        "gradients": "more pipeline stages or expert ranks: weights and gradients fill the GPU",
        "optimizer on GPU": "pass --optimizer-cpu-offload with --optimizer-offload-fraction 1, or more data-parallel ranks",
        "stored layer inputs": "lower --max-tokens-per-gpu, or --recompute-granularity full",
        "index selection": "lower --max-tokens-per-gpu or the layers of this stage",
    }.get(largest, "lower --max-tokens-per-gpu, or give this stage fewer layers")


def _judge_cache(rank: EngineRank, limit_gb: float, longest: int | None, basis: Basis, findings: Findings) -> KvCache:
    room = int(limit_gb * 1e9 * rank.mem_fraction)
    tokens = rank.cache_tokens(limit_gb * 1e9)
    cache = KvCache(rank.name, tokens, rank.kv_bytes_per_token, rank.gpus, rank.attention_dp, longest)
    batch = f", {cache.at_once:,} samples of {longest:,} in an engine of {cache.gpus} GPUs at once" if longest else ""
    values = (
        f"weights {rank.weights / 1e9:.2f} GB"
        + (f", draft {rank.draft_weights / 1e9:.2f} GB" if rank.draft_weights else "")
        + f", {rank.kv_bytes_per_token:,} bytes per token, mem fraction {rank.mem_fraction:g}{batch}"
    )
    what = f"{rank.name}: {tokens:,} tokens of KV cache per GPU"
    if rank.weights + rank.draft_weights < room and (longest is None or tokens >= longest or rank.role == "prefill"):
        findings.ok("memory", what, values)
    elif basis == "flags":  # whether the serving checkpoint is FP8 is in config.json alone
        findings.unchecked("memory", f"{what}, if the checkpoint is BF16", values, decides=True)
    else:
        findings.violation(
            "memory",
            f"{rank.name}: weights of {(rank.weights + rank.draft_weights) / 1e9:.1f} GB do not fit {rank.mem_fraction:g} of "
            f"{limit_gb:g} GB"
            if rank.weights + rank.draft_weights >= room
            else f"{rank.name}: the KV cache holds {tokens:,} tokens per GPU, a sample may have {longest or 0:,}",
            values,
            "raise --sglang-max-total-tokens, or shorter responses"
            if tokens == rank.most_tokens
            else "raise --sglang-mem-fraction-static, more GPUs per engine, or shorter responses",
        )
    return cache


def _node_counts(reading: Reading, shapes: TrainShapes, assumed: Assumed, limit_gb: float) -> list[Fit]:
    """Powers of two of nodes on which the stages could be placed, and whether the largest training phase fits the GPU.

    The micro-batch keeps its tokens per GPU, so a smaller CP shortens the stream; the engines are not part of the question.
    """
    given, per_node = reading.grid, reading.config.cluster.actor_num_gpus_per_node
    experts, found = reading.hf.num_experts, []
    parts, turns = stage_parts(reading.table, reading.chunks, given.pp, mtp=reading.trains_mtp), _turns(reading)
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
        here = replace(shapes, stream=shapes.tokens * cp, micro_batches=micro, longest_tokens=0)
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
                turns=turns,
            )
            for share in shares_of(parts, grid, padded_vocab=reading.config.model.padded_vocab_size)
        ]
        peak = max(stage.peak.total for stage in stages) / 1e9
        host = fullest_node([stage.host_optimizer for stage in stages], grid.ranks_per_stage, per_node, nodes) / 1e9
        found.append(Fit(nodes, cp, grid.dp, ep, peak, host, peak <= limit_gb))
    return found


def fullest_node(per_rank: Sequence[int], ranks_per_stage: int, gpus_per_node: int, nodes: int) -> int:
    """Bytes on the node whose ranks hold most. per_rank: of one rank of each stage."""
    return max(per_node(per_rank, ranks_per_stage, gpus_per_node, nodes))


def per_node(per_rank: Sequence[int], ranks_per_stage: int, gpus_per_node: int, nodes: int) -> list[int]:
    """Bytes by node. per_rank: of one rank of each stage."""
    ranks = [per_rank[rank // ranks_per_stage] for rank in range(nodes * gpus_per_node)]
    return [sum(ranks[node * gpus_per_node : (node + 1) * gpus_per_node]) for node in range(nodes)]


def _beside_measured(
    budget: Budget,
    reading: Reading,
    shares: Sequence[StageShare],
    shapes: TrainShapes,
    ranks: Sequence[EngineRank],
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
        longest_tokens=0,
    )
    turns, engine = _turns(reading), max(ranks, key=lambda rank: rank.mem_fraction, default=None)
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
                turns=turns,
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
