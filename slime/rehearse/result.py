"""All parts of one rehearsal, in order, and what they say together."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from slime.rehearse.cost import Cost, Rates, Shape, predict, sync_bytes, with_rates
from slime.rehearse.engine_checks import EnginePlan, check_engines
from slime.rehearse.file_checks import check_files
from slime.rehearse.findings import Findings
from slime.rehearse.flops import model_work
from slime.rehearse.layout_checks import Balance, check_layout, longest_sample
from slime.rehearse.memory import Assumed, EngineRank, StageMemory, TrainShapes, kv_bytes_per_token, stage_memory
from slime.rehearse.ranks import BuiltRanks, check_ranks
from slime.rehearse.reading import Reading, read
from slime.rehearse.shares import StageShare, stage_shares
from slime.rehearse.weight_map import WeightMap, build_weight_map, model_order

DEFAULT_LENGTH = 32768


@dataclass(frozen=True)
class Options:
    """What the rehearsal itself was told (everything else is a flag of the run)."""

    gpu_memory_gb: float = 80.0
    checkpoint_index: str | None = None
    hostfile: str | None = None
    engine_version: str | None = None
    length: int | None = None
    """Tokens of the sequence for FLOPs; None takes the longest that the flags allow."""
    rates: tuple[str, ...] = ()
    assume: tuple[str, ...] = ()
    env: Mapping[str, str] | None = None
    """The launcher's environment of the job."""
    build_ranks: bool = True
    quick: bool = False
    """Flags, files, layout and engines alone."""
    expect_digest: str | None = None


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


@dataclass
class Rehearsal:
    findings: Findings
    reading: Reading
    options: Options
    engines: EnginePlan
    balance: Balance | None = None
    shares: tuple[StageShare, ...] = ()
    memory: tuple[StageMemory, ...] = ()
    cost: Cost | None = None
    rates: Rates = Rates()
    weights: WeightMap | None = None
    built: BuiltRanks | None = None
    seconds: Mapping[str, float] | None = None
    fits: tuple[Fit, ...] = ()
    kv_tokens: Mapping[str, int] | None = None
    """Tokens of KV cache per engine rank, by role."""


def rehearse(argv: Sequence[str], options: Options) -> Rehearsal:
    """Every part that the flags allow; a part that needs what an earlier mistake left open is left out and said so."""
    findings, clock = Findings(), {}
    started = time.monotonic()
    reading = read(argv, findings)
    check_files(reading, findings, checkpoint_index=options.checkpoint_index, hostfile=options.hostfile)
    clock["flags and files"] = time.monotonic() - started
    length = options.length or longest_sample(reading.config) or DEFAULT_LENGTH
    done = Rehearsal(
        findings, reading, options, check_engines(reading, findings, version=options.engine_version, env=options.env)
    )
    done.balance = check_layout(reading, findings, length=length)
    clock["layout and engines"] = time.monotonic() - started - sum(clock.values())
    done.rates = with_rates(Rates(), options.rates)
    if options.quick:
        findings.unchecked("memory", "memory, cost, weight map and ranks were left out (--quick)")
        done.seconds = clock
        return done
    if reading.table is not None and reading.grid is not None and reading.chunks is not None and _divides(reading):
        _arithmetic(done, length)
        clock["memory, cost, weight map"] = time.monotonic() - started - sum(clock.values())
        if options.build_ranks and findings.launchable:
            done.built = check_ranks(reading, done.shares, findings)
            _compare_orders(done)
            clock["all ranks on the meta device"] = time.monotonic() - started - sum(clock.values())
        elif options.build_ranks:
            findings.unchecked("ranks", "ranks are built once the violations above are gone")
        else:
            findings.unchecked("ranks", "ranks were not built (--no-ranks)")
    else:
        findings.unchecked("memory", "memory, cost, weight map and ranks: the layout above is not defined")
    done.seconds = clock
    return done


def _divides(reading: Reading) -> bool:
    experts = reading.hf.num_experts
    return not experts or experts % reading.grid.ep == 0


def _arithmetic(done: Rehearsal, length: int) -> None:
    reading, options = done.reading, done.options
    config, grid, hf = reading.config, reading.grid, reading.hf
    assumed = _assumed(options.assume)
    done.shares = tuple(stage_shares(reading.table, reading.chunks, grid, padded_vocab=config.model.padded_vocab_size))
    sync = sync_bytes(reading.table, hf, done.engines.specs, done.rates, gpus_per_node=config.cluster.num_gpus_per_node)
    shapes = train_shapes(done)
    ranks = {spec.role: _engine_rank(done, spec.role, sync.per_gpu, assumed) for spec in done.engines.specs} if sync else {}
    engine = max(ranks.values(), key=lambda rank: rank.mem_fraction, default=None)
    done.memory = tuple(
        stage_memory(
            share,
            hf,
            grid,
            shapes,
            bucket_bytes=config.engine.update_weight_buffer_size,
            engine=engine,
            gpu_bytes=options.gpu_memory_gb * 1e9,
            assumed=assumed,
        )
        for share in done.shares
    )
    done.kv_tokens = {
        role: max(0, int(options.gpu_memory_gb * 1e9 * rank.mem_fraction) - rank.weights - rank.draft_weights)
        // rank.kv_bytes_per_token
        for role, rank in ranks.items()
    }
    _check_memory(done, ranks)
    done.fits = node_counts(done, shapes, assumed)
    _predict(done, length, sync, shapes)
    done.weights = build_weight_map(
        reading.table, hf, grid, reading.chunks, done.engines.specs, limit_bytes=config.engine.update_weight_buffer_size
    )
    _check_weights(done)


def _assumed(words: Sequence[str]) -> Assumed:
    values = Assumed()
    known = {item.name for item in fields(Assumed)}
    for word in words:
        name, _, value = word.partition("=")
        if name not in known:
            raise ValueError(f"--assume {word}: legal names are {', '.join(sorted(known))}")
        values = replace(values, **{name: float(value)})
    return values


def train_shapes(done: Rehearsal) -> TrainShapes:
    config, grid = done.reading.config, done.reading.grid
    batch, optimizer = config.batch, config.optimizer
    per_sample = longest_sample(config) or DEFAULT_LENGTH
    tokens = (
        batch.max_tokens_per_gpu
        if batch.use_dynamic_batch_size and batch.max_tokens_per_gpu
        else -(-per_sample * batch.micro_batch_size // grid.cp)
    )
    stream = tokens * grid.cp
    samples = (batch.global_batch_size or 1) / grid.dp
    micro = (
        max(1, int(-(-samples * _mean_tokens(done) // stream)))
        if batch.use_dynamic_batch_size
        else max(1, int(samples // batch.micro_batch_size))
    )
    sizes = {"fp32": 4, "bf16": 2}
    dtype = 4 if config.model.params_dtype == "fp32" else 2
    precise = optimizer.use_precision_aware_optimizer
    state = 4 + (sizes[optimizer.exp_avg_dtype] + sizes[optimizer.exp_avg_sq_dtype] if precise else 8)
    return TrainShapes(
        tokens=tokens,
        stream=stream,
        recompute=config.model.megatron.get("recompute_granularity") == "full",
        param_bytes=dtype,
        grad_bytes=4 if dtype == 4 or optimizer.accumulate_allreduce_grads_in_fp32 else 2,
        optimizer_bytes=state,
        optimizer_on_host=optimizer.optimizer_cpu_offload,
        micro_batches=micro,
        padded_vocab=config.model.padded_vocab_size or done.reading.hf["vocab_size"],
        log_probs_chunk=batch.log_probs_chunk_size,
        core_axis=config.parallel.dsa_core_axis,
        offload_train=bool(config.cluster.offload_train),
    )


def _mean_tokens(done: Rehearsal) -> int:
    config = done.reading.config
    longest = longest_sample(config) or DEFAULT_LENGTH
    return max(1, int(longest * done.rates.mean_response_share))


def _engine_rank(done: Rehearsal, role: str, weights: int, assumed: Assumed) -> EngineRank:
    spec = next(spec for spec in done.engines.specs if spec.role == role)
    hf = done.reading.hf
    dtype = str(spec.settings.get("kv_cache_dtype", "auto"))
    kv = kv_bytes_per_token(hf, fp8=dtype.startswith("fp8"), tp=spec.tp_size // spec.dp_size)
    fraction = float(str(spec.settings.get("mem_fraction_static", assumed.mem_fraction_static)))
    draft = 0
    if spec.settings.get("speculative_algorithm") and hf.num_mtp_layers:
        draft = int(weights / hf.num_layers)
    return EngineRank(role, weights, kv, fraction, draft)


def _check_memory(done: Rehearsal, ranks: Mapping[str, EngineRank]) -> None:
    findings, limit = done.findings, done.options.gpu_memory_gb
    over = [(stage.share.stage, phase) for stage in done.memory for phase in stage.phases if phase.total > limit * 1e9]
    worst = max((stage.peak for stage in done.memory), key=lambda phase: phase.total)
    if over:
        for stage, phase in over:
            largest = max(phase.parts, key=lambda name: phase.parts[name])
            findings.violation(
                "memory",
                f"stage {stage} needs {phase.total / 1e9:.1f} GB in phase {phase.name}, a GPU has {limit:g}",
                ", ".join(f"{name} {count / 1e9:.1f}" for name, count in phase.parts.items() if count >= 5e7),
                _memory_fix(phase.name, largest),
            )
    else:
        findings.ok(
            "memory", f"every phase of every stage fits {limit:g} GB", f"largest: {worst.name} {worst.total / 1e9:.1f} GB"
        )
    for role, rank in ranks.items():
        tokens = done.kv_tokens[role]
        room = done.options.gpu_memory_gb * 1e9 * rank.mem_fraction
        longest = longest_sample(done.reading.config)
        findings.check(
            rank.weights + rank.draft_weights < room and (longest is None or tokens >= longest or role == "prefill"),
            "memory",
            f"{role}: {tokens:,} tokens of KV cache per GPU",
            values=f"weights {rank.weights / 1e9:.2f} GB, {rank.kv_bytes_per_token:,} bytes per token, mem fraction {rank.mem_fraction:g}"
            + (f", {tokens // longest} samples of {longest:,} at once" if longest else ""),
            wrong=f"{role}: the KV cache holds {max(tokens, 0):,} tokens per GPU, a sample may have {longest or 0:,}",
            fix="raise --sglang-mem-fraction-static, more GPUs per engine, or shorter responses",
        )


def _memory_fix(phase: str, largest: str) -> str:
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


def _predict(done: Rehearsal, length: int, sync, shapes: TrainShapes) -> None:
    reading = done.reading
    config, grid = reading.config, reading.grid
    prompts, samples = config.data.rollout_batch_size or 0, config.data.n_samples_per_prompt
    steps = max(1, prompts * samples // (config.batch.global_batch_size or max(prompts * samples, 1)))
    per_node = config.cluster.actor_num_gpus_per_node
    host = max(
        (sum(stage.host_optimizer for stage in _node(done, node)) for node in range(config.cluster.actor_num_nodes)), default=0
    )
    shape = Shape(
        samples=prompts * samples,
        mean_tokens=_mean_tokens(done),
        longest_response=config.rollout.rollout_max_response_len or length,
        trainer_gpus=grid.world,
        rollout_gpus=config.cluster.rollout_num_gpus or 0,
        micro_batches=shapes.micro_batches,
        steps=steps,
        needs_reference=bool(config.algorithm.kl_coef or config.algorithm.use_kl_loss),
        needs_old_log_probs=config.algorithm.loss_type == "policy_loss" and not config.algorithm.use_rollout_logprobs,
        colocate=config.cluster.colocate,
    )
    assert per_node > 0
    weights = max(
        stage.share.parameters * shapes.param_bytes + stage.share.trained * shapes.grad_bytes for stage in done.memory
    )
    parameters = reading.table.num_parameters(mtp=False)
    saved = parameters * 2 if config.checkpoint.no_save_optim else parameters * (2 + shapes.optimizer_bytes)
    done.cost = predict(
        model_work(reading.table, reading.hf, min(length, shape.mean_tokens) or length),
        done.balance.costs if done.balance else (),
        grid,
        shape,
        sync,
        done.rates,
        recompute=shapes.recompute,
        trainer_bytes_per_gpu=weights,
        optimizer_bytes_per_node=host,
        checkpoint_bytes=saved,
        save_interval=config.checkpoint.save_interval if config.checkpoint.save else None,
    )


def node_counts(done: Rehearsal, shapes: TrainShapes, assumed: Assumed) -> tuple[Fit, ...]:
    """Powers of two of nodes on which the stages could be placed, and whether the largest training phase fits the GPU.

    The micro-batch keeps its tokens per GPU, so a smaller CP shortens the stream; the engines are not part of the question.
    """
    reading, given = done.reading, done.reading.grid
    per_node, found = reading.config.cluster.actor_num_gpus_per_node, []
    experts = reading.hf.num_experts
    for nodes in (1, 2, 4, 8, 16, 32, 64, 128):
        ranks = nodes * per_node // given.pp
        if nodes * per_node % given.pp or ranks % given.tp:
            continue
        cp = min(given.cp, ranks // given.tp)
        ep = min(ranks // given.etp, experts, 64) if experts else 1
        if ranks % (given.tp * cp) or ranks % (given.etp * ep) or (experts and experts % ep):
            continue
        grid = replace(given, world=nodes * per_node, cp=cp, ep=ep)
        here = replace(
            shapes,
            stream=shapes.tokens * cp,
            micro_batches=max(1, shapes.micro_batches * given.cp * given.dp // (cp * grid.dp)),
        )
        shares = stage_shares(reading.table, reading.chunks, grid, padded_vocab=reading.config.model.padded_vocab_size)
        stages = [
            stage_memory(share, reading.hf, grid, here, bucket_bytes=0, engine=None, gpu_bytes=0, assumed=assumed)
            for share in shares
        ]
        peak = (
            max(phase.total for stage in stages for phase in stage.phases if phase.name in ("load", "log-probs", "train")) / 1e9
        )
        host = [stages[rank // grid.ranks_per_stage].host_optimizer for rank in range(grid.world)]
        per_host = max(sum(host[first : first + per_node]) for first in range(0, grid.world, per_node)) / 1e9
        found.append(Fit(nodes, cp, grid.dp, ep, peak, per_host, peak <= done.options.gpu_memory_gb))
    return tuple(found)


def _node(done: Rehearsal, node: int) -> list[StageMemory]:
    """The stages of a node's ranks, one entry per rank."""
    per_node, per_stage = done.reading.config.cluster.actor_num_gpus_per_node, done.reading.grid.ranks_per_stage
    return [done.memory[rank // per_stage] for rank in range(node * per_node, (node + 1) * per_node)]


def _check_weights(done: Rehearsal) -> None:
    weights, findings, table = done.weights, done.findings, done.reading.table
    for problem in weights.problems[:8]:
        findings.violation("weights", problem, "", "a defect of the weight table; please report it")
    mtp = sum(entry.name.startswith("mtp.") for entry in table.entries for _ in entry.hf)
    if not weights.problems:
        gathered = sum(row.block == "gather" for row in weights.rows)
        findings.ok(
            "weights",
            f"each of {len(weights.rows):,} tensors is in one bucket, fused pairs together; {mtp:,} of the MTP layer stay as the engines loaded them",
            f"{len(weights.bucket_bytes):,} buckets, {weights.nbytes:,} bytes, {gathered} FP8 tensors gathered first, digest {weights.digest[:16]}",
        )
    expected = done.options.expect_digest
    if expected:
        findings.check(
            weights.digest.startswith(expected),
            "weights",
            f"the weight map is the expected one ({expected[:16]})",
            wrong="the weight map differs from the expected one",
            values=f"expected {expected}, found {weights.digest}",
            fix="layout, model, engines or bucket size changed since; compare the two --json files",
        )


def _compare_orders(done: Rehearsal) -> None:
    """The weight map assumes an order of parameters; the built ranks have one."""
    if done.built is None or done.built.errors:
        return
    owner = {layer: chunk.pp_rank for chunk in done.reading.chunks for layer in chunk.layers}
    entries = {entry.name: entry for entry in done.reading.table.entries}
    first_expert = {}
    for entry in done.reading.table.entries:
        if entry.expert is not None:
            first_expert.setdefault(entry.name.removesuffix(str(entry.expert)), entry)
    for stage, order in done.built.orders.items():
        keys = [
            model_order(entries.get(name) or first_expert[name]) for name, _ in order if name not in done.reading.table.aliases
        ]
        dense = [
            key
            for key, (name, experts) in zip(keys, [o for o in order if o[0] not in done.reading.table.aliases], strict=True)
            if not experts
        ]
        if dense != sorted(dense):
            wrong = next(name for (name, _), left, right in zip(order, dense, sorted(dense), strict=False) if left != right)
            done.findings.violation(
                "weights",
                f"stage {stage} registers its parameters in another order than the weight map assumes, from {wrong} on",
                f"{len(owner)} layers",
                "please report it",
            )
            return
    done.findings.ok(
        "weights",
        "the built ranks register their parameters in the order of the weight map",
        f"{len(done.built.orders)} stages",
    )
