"""All parts of one rehearsal, in order, and what they say together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from slime.config import Config
from slime.rehearse.checks.engines import EnginePlan, check_engines
from slime.rehearse.checks.files import check_files
from slime.rehearse.checks.layout import Balance, check_layout, longest_sample
from slime.rehearse.checks.memory import DEFAULT_LENGTH, Budget, assumed_of, check_memory, train_shapes
from slime.rehearse.checks.ranks import BuiltRanks, check_held, check_order, check_ranks
from slime.rehearse.findings import Findings
from slime.rehearse.model.advice import Advice, advise, held_at_once
from slime.rehearse.model.cost import Cost, Rates, Shape, SyncBytes, predict, sync_bytes, with_rates
from slime.rehearse.model.engine_memory import engine_ranks, speculates
from slime.rehearse.model.flops import model_work
from slime.rehearse.model.memory import TrainShapes
from slime.rehearse.model.shares import StageShare, stage_shares
from slime.rehearse.model.weight_map import WeightMap, build_weight_map
from slime.rehearse.options import Options
from slime.rehearse.reading import Reading, read
from slime.weights.digest import KEY_VARIABLE, rehearsed_digest


@dataclass
class Rehearsal:
    findings: Findings
    reading: Reading
    options: Options
    engines: EnginePlan
    balance: Balance | None = None
    shares: tuple[StageShare, ...] = ()
    budget: Budget | None = None
    cost: Cost | None = None
    rates: Rates = Rates()
    advice: Advice | None = None
    weights: WeightMap | None = None
    built: BuiltRanks | None = None
    seconds: Mapping[str, float] | None = None


def rehearse(argv: Sequence[str], options: Options) -> Rehearsal:
    """Every part that the flags allow; a part that needs what an earlier mistake left open is left out and said so."""
    findings, clock = Findings(), {}
    started = time.monotonic()
    reading = read(argv, findings, env=options.env)
    longest = longest_sample(reading.config, prompt=int(assumed_of(options.assume).prompt_tokens))
    length = options.length or longest or DEFAULT_LENGTH
    done = Rehearsal(findings, reading, options, EnginePlan((), options.engine_version or "", ()))
    done.rates = with_rates(Rates(), options.rates)
    with _part(findings, "files"):
        where = {"checkpoint_index": options.checkpoint_index, "hostfile": options.hostfile, "head": options.head}
        check_files(reading, findings, **where)
    clock["flags and files"] = time.monotonic() - started
    with _part(findings, "engines"):
        done.engines = check_engines(reading, findings, version=options.engine_version)
    with _part(findings, "layout"):
        done.balance = check_layout(reading, findings, length=length, longest=longest)
    clock["layout and engines"] = time.monotonic() - started - sum(clock.values())
    if options.quick:
        findings.unchecked("memory", "memory, cost, weight map and ranks were left out (--quick)")
        done.seconds = clock
        return done
    if reading.table is not None and reading.grid is not None and reading.chunks is not None and _divides(reading):
        with _part(findings, "memory"):
            _arithmetic(done, length, longest)
        clock["memory, cost, weight map"] = time.monotonic() - started - sum(clock.values())
        if options.build_ranks and not findings.of("violation"):
            done.built = check_ranks(reading, done.shares, findings)
            check_order(reading, done.built, findings)
            check_held(reading, done.built, done.weights, findings)
            clock["all ranks on the meta device"] = time.monotonic() - started - sum(clock.values())
        elif options.build_ranks:
            findings.unchecked("ranks", "ranks are built once the violations above are gone")
        else:
            findings.unchecked("ranks", "ranks were not built (--no-ranks)")
    else:
        findings.unchecked("memory", "memory, cost, weight map and ranks: the layout above is not defined")
    done.seconds = clock
    return done


@contextmanager
def _part(findings: Findings, area: str) -> Iterator[None]:
    """A part that relies on what an earlier violation left open is left out; without one it is our own mistake."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError, OverflowError) as consequence:
        if not findings.of("violation"):
            raise
        findings.unchecked(area, f"{area}: not worked out, because of what is wrong above", f"{type(consequence).__name__}")


def _divides(reading: Reading) -> bool:
    experts = reading.hf.num_experts
    return not experts or experts % reading.grid.ep == 0


def _arithmetic(done: Rehearsal, length: int, longest: int | None) -> None:
    reading, options = done.reading, done.options
    config, grid, hf = reading.config, reading.grid, reading.hf
    mtp, padded = reading.trains_mtp, config.model.padded_vocab_size
    done.shares = tuple(stage_shares(reading.table, reading.chunks, grid, padded_vocab=padded, mtp=mtp))
    gpus_per_node = config.cluster.num_gpus_per_node
    sync = sync_bytes(reading.table, hf, done.engines.specs, done.rates, gpus_per_node=gpus_per_node, mtp=mtp)
    shapes = train_shapes(reading, longest=longest, mean_share=done.rates.mean_response_share)
    ranks = engine_ranks(
        reading.table,
        hf,
        done.engines.specs,
        version=done.engines.version,
        env=options.env,
        mem_fraction=assumed_of(options.assume).mem_fraction_static,
    )
    done.budget = check_memory(reading, done.shares, shapes, ranks, options, done.findings, longest=longest)
    held = held_at_once(done.engines.specs, done.budget.caches)
    samples = (config.data.rollout_batch_size or 0) * config.data.n_samples_per_prompt
    done.cost = _cost(done, length, longest, sync, shapes, waves=max(1, -(-samples // held)) if held else 1)
    done.advice = _advice(
        done, held, lambda prompts, waves: _cost(done, length, longest, sync, shapes, prompts=prompts, waves=waves)
    )
    done.weights = build_weight_map(
        reading.table,
        hf,
        grid,
        reading.chunks,
        done.engines.specs,
        limit_bytes=config.engine.update_weight_buffer_size,
        mtp=mtp,
        padded_vocab=padded,
    )
    _check_weights(done)


def _steps(config: Config) -> int:
    samples = (config.data.rollout_batch_size or 0) * config.data.n_samples_per_prompt
    return max(1, samples // (config.batch.global_batch_size or max(samples, 1)))


def _advice(done: Rehearsal, held: int, cost_of: Callable[[int, int], Cost]) -> Advice | None:
    config = done.reading.config
    return advise(
        cost_of,
        prompts=config.data.rollout_batch_size or 0,
        samples_per_prompt=config.data.n_samples_per_prompt,
        steps=_steps(config),
        held=held,
    )


def _cost(
    done: Rehearsal,
    length: int,
    longest: int | None,
    sync: SyncBytes | None,
    shapes: TrainShapes,
    *,
    prompts: int | None = None,
    waves: int = 1,
) -> Cost:
    """prompts: of a rollout, in the run's number of steps (its own where nothing is said). waves: see model.advice."""
    reading, stages = done.reading, done.budget.stages
    config, grid = reading.config, reading.grid
    own, samples = config.data.rollout_batch_size or 0, config.data.n_samples_per_prompt
    prompts = own if prompts is None else prompts
    shape = Shape(
        samples=prompts * samples,
        mean_tokens=max(1, int((longest or DEFAULT_LENGTH) * done.rates.mean_response_share)),
        longest_response=(config.rollout.rollout_max_response_len or length) * waves,
        trainer_gpus=grid.world,
        rollout_gpus=config.cluster.rollout_num_gpus or 0,
        micro_batches=-(-shapes.micro_batches * prompts // max(own, 1)),
        steps=_steps(config),
        needs_reference=bool(config.algorithm.kl_coef or config.algorithm.use_kl_loss),
        needs_teacher=config.algorithm.opd_type == "megatron",
        needs_old_log_probs=config.algorithm.loss_type == "policy_loss"
        and (config.algorithm.use_opd or not config.algorithm.use_rollout_logprobs),
        colocate=config.cluster.colocate,
        speculates=all(speculates(spec) for spec in done.engines.specs if spec.role != "prefill"),
        vpp=shapes.vpp,
    )
    parameters = reading.num_parameters
    saved = parameters * 2 if config.checkpoint.no_save_optim else parameters * (2 + shapes.optimizer_bytes)
    return predict(
        model_work(reading.table, reading.hf, min(length, shape.mean_tokens) or length, mtp=reading.trains_mtp),
        done.balance.costs if done.balance else (),
        grid,
        shape,
        sync,
        done.rates,
        recompute=shapes.recompute,
        trainer_bytes_per_gpu=max(
            stage.share.parameters * shapes.param_bytes + stage.share.trained * shapes.grad_bytes for stage in stages
        ),
        optimizer_bytes_per_node=done.budget.node_optimizer,
        checkpoint_bytes=saved,
        save_interval=config.checkpoint.save_interval if config.checkpoint.save else None,
    )


def _check_weights(done: Rehearsal) -> None:
    weights, findings, table = done.weights, done.findings, done.reading.table
    for problem in weights.problems[:8]:
        findings.violation("weights", problem, "", "a defect of the weight table; please report it")
    mtp = sum(entry.name.startswith("mtp.") for entry in table.entries for _ in entry.hf)
    if not weights.problems:
        gathered = sum(row.block == "gather" for row in weights.rows)
        findings.ok(
            "weights",
            f"each of {len(weights.rows):,} tensors is in one bucket, each slice once in every replica, fused pairs together; "
            f"{mtp:,} of the MTP layer {'among them' if done.reading.trains_mtp else 'stay as the engines loaded them'}",
            f"{len(weights.bucket_bytes):,} buckets, {weights.nbytes:,} bytes, {gathered} FP8 tensors gathered first, "
            f"digest {weights.digest[:16]}",
        )
    if report := done.reading.config.engine.rehearsed:
        _compare_with_report(weights, report, findings)
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


def _compare_with_report(weights: WeightMap, report: str, findings: Findings) -> None:
    """--rehearsed: what the run itself will compare after its first weight sync."""
    try:
        expected = rehearsed_digest(report, key=os.environ.get(KEY_VARIABLE))
    except ValueError as error:
        findings.violation("weights", str(error), "", str(error).rpartition(";")[2].strip())
        return
    findings.check(
        weights.stream_digest == expected,
        "weights",
        f"the weight stream is that of --rehearsed {report}",
        values=f"expected {expected[:16]}, found {weights.stream_digest[:16]}",
        wrong=f"the weight stream is not that of --rehearsed {report}",
        fix="model, layout, serving checkpoint or bucket size changed since; rehearse these flags again",
    )
