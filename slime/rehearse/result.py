"""All parts of one rehearsal, in order, and what they say together."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from slime.rehearse.advice.curves import Curve, curves
from slime.rehearse.advice.remedies import Accepts, Remedy, remedies
from slime.rehearse.advice.variants import Bench
from slime.rehearse.assess import Assessment, assess
from slime.rehearse.checks.engines import EnginePlan, check_engines, check_fixed_models
from slime.rehearse.checks.files import check_files
from slime.rehearse.checks.layout import Balance, check_layout, longest_sample, paste
from slime.rehearse.checks.memory import DEFAULT_LENGTH, Budget, assumed_of
from slime.rehearse.checks.ranks import BuiltRanks, check_held, check_order, check_ranks
from slime.rehearse.findings import Findings
from slime.rehearse.model.cost import Cost
from slime.rehearse.model.measured_times import TimeComparison, compare_times, read_times
from slime.rehearse.model.rates import Rates, rates_of, with_rates
from slime.rehearse.model.shares import StageShare
from slime.rehearse.model.weight_map import WeightMap, build_weight_map
from slime.rehearse.options import Options
from slime.rehearse.reading import Reading, read
from slime.rehearse.sync import PlannedSync, plan_of_sync, trainer_of, with_planned_sync
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
    assessment: Assessment | None = None
    times: tuple[TimeComparison, ...] = ()
    """Measured ones beside the predicted."""
    curves: tuple[Curve, ...] = ()
    """What a GPU-hour buys, of a run that passes."""
    remedies: tuple[Remedy, ...] = ()
    """Words with which it would pass, of one that does not."""
    weights: WeightMap | None = None
    sync: PlannedSync | None = None
    built: BuiltRanks | None = None
    seconds: Mapping[str, float] | None = None


def rehearse(argv: Sequence[str], options: Options) -> Rehearsal:
    """Every part that the flags allow; a part that needs what an earlier mistake left open is left out and said so."""
    with tempfile.TemporaryDirectory(prefix="slime-rehearse-") as folder:
        return _rehearsed(argv, options, Path(folder))


def _rehearsed(argv: Sequence[str], options: Options, folder: Path) -> Rehearsal:
    findings, clock = Findings(), {}
    started = time.monotonic()
    reading = read(argv, findings, env=options.env)
    longest = longest_sample(reading.config, prompt=int(assumed_of(options.assume).prompt_tokens))
    length = options.length or longest or DEFAULT_LENGTH
    done = Rehearsal(findings, reading, options, EnginePlan((), options.engine_version or "", ()))
    done.rates = with_rates(rates_of(options.gpu), options.rates)
    with _part(findings, "files"):
        where = {
            "checkpoint_index": options.checkpoint_index,
            "hostfile": options.hostfile,
            "head": options.head,
            "on_its_disks": options.on_its_disks,
        }
        check_files(reading, findings, **where)
    clock["flags and files"] = time.monotonic() - started
    with _part(findings, "engines"):
        done.engines = check_engines(reading, findings, version=options.engine_version)
    bench = Bench(tuple(argv), options, done.rates, done.engines.version, folder)
    with _part(findings, "layout"):
        accepts = Accepts(bench, findings, whole=not options.quick)
        done.balance = check_layout(reading, findings, length=length, longest=longest, accepts=accepts)
    clock["layout and engines"] = time.monotonic() - started - sum(clock.values())
    if options.quick:
        findings.unchecked("memory", "memory, cost, weight map and ranks were left out (--quick)")
        done.seconds = clock
        return done
    with _part(findings, "memory"):
        fraction = assumed_of(options.assume).mem_fraction_static
        check_fixed_models(done.engines.specs, findings, gpu_gb=options.gpu_memory_gb, mem_fraction=fraction)
    if reading.table is not None and reading.grid is not None and reading.chunks is not None and _divides(reading):
        with _part(findings, "memory"):
            _arithmetic(done, length, longest)
        clock["memory, cost, weight map"] = time.monotonic() - started - sum(clock.values())
        if options.curves and done.assessment is not None:
            with _part(findings, "advice"):
                if findings.of("violation"):
                    done.remedies = remedies(bench, done.assessment, _splits(done))
                else:
                    done.curves = curves(bench, done.assessment)
            clock["advice"] = time.monotonic() - started - sum(clock.values())
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


def _times(done: Rehearsal, length: int, longest: int | None) -> tuple[TimeComparison, ...]:
    """Of a run on GPUs: rates are theirs. Predicted for responses as long as the run's were."""
    options, seen = done.options, done.budget.measured
    measured = read_times(options.measured) if seen is not None and seen.device == "cuda" else None
    if measured is None:
        return ()
    rates, bound = done.rates, done.reading.config.rollout.rollout_max_response_len
    if measured.mean_response and bound:
        rates = replace(rates, mean_response_share=min(1.0, measured.mean_response / bound))
    plain = replace(options, measured=None)
    told = {"length": length, "longest": longest, "node_counts": False}
    return tuple(compare_times(measured, assess(done.reading, done.engines, plain, rates, Findings(), **told).cost))


def _splits(done: Rehearsal) -> list[str]:
    """Words of every split that is recommended."""
    balance, config = done.balance, done.reading.config
    if balance is None:
        return []
    lists = [paste(config, balance.best, as_list=True)] if balance.best is not None else []
    return [*lists, *(paste(config, split, as_list=False) for split in balance.first_last)]


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
    found = assess(reading, done.engines, options, done.rates, done.findings, length=length, longest=longest)
    done.assessment, done.shares, done.budget, done.cost = found, found.shares, found.budget, found.cost
    done.times = _times(done, length, longest)
    if not options.weight_map:
        return
    done.sync = plan_of_sync(reading, done.engines.specs, done.rates)
    if done.sync is not None:
        done.cost = with_planned_sync(done.cost, done.sync, every=reading.config.engine.update_weights_interval)
    plan = done.sync.carried_out if done.sync else None
    done.weights = build_weight_map(reading.table, reading.hf, trainer_of(reading), done.engines.specs, plan)
    _check_weights(done)


def _check_weights(done: Rehearsal) -> None:
    weights, findings, table = done.weights, done.findings, done.reading.table
    for problem in weights.problems[:8]:
        findings.violation("weights", problem, "", "a defect of the weight table; please report it")
    mtp = sum(entry.name.startswith("mtp.") for entry in table.entries for _ in entry.hf)
    if not weights.problems:
        gathered = sum(row.block == "gather" for row in weights.rows)
        findings.ok(
            "weights",
            f"each of {len(weights.rows):,} tensors is in one round, each slice once in every replica, fused pairs together, "
            "and reaches every GPU that keeps it once; "
            f"{mtp:,} of the MTP layer {'among them' if done.reading.trains_mtp else 'stay as the engines loaded them'}",
            f"{done.sync.carried_out.rounds if done.sync else 0:,} rounds, {weights.nbytes:,} bytes, "
            f"{gathered} FP8 tensors gathered first, digest {weights.digest[:16]}",
        )
    if report := done.reading.config.engine.rehearsed:
        _compare_with_report(done.sync.digest if done.sync else "", report, findings)
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


def _compare_with_report(digest: str, report: str, findings: Findings) -> None:
    """--rehearsed: what the run itself will compare after its first weight sync."""
    try:
        expected = rehearsed_digest(report, key=os.environ.get(KEY_VARIABLE))
    except ValueError as error:
        findings.violation("weights", str(error), "", str(error).rpartition(";")[2].strip())
        return
    findings.check(
        digest == expected,
        "weights",
        f"the weight stream is that of --rehearsed {report}",
        values=f"expected {expected[:16]}, found {digest[:16]}",
        wrong=f"the weight stream is not that of --rehearsed {report}",
        fix="model, layout, serving checkpoint or bucket size changed since; rehearse these flags again",
    )
