"""The rehearsal as text for a terminal and as JSON for programs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from slime.config import Config
from slime.config.stages import layout_string
from slime.engine.spec import EngineSpec
from slime.rehearse.advice.curves import Curve, Point
from slime.rehearse.advice.variants import Variant
from slime.rehearse.checks.layout import paste
from slime.rehearse.checks.memory import Budget
from slime.rehearse.model.rates import rates_shown
from slime.rehearse.model.stages import Split
from slime.rehearse.model.weight_map import WeightMap
from slime.rehearse.report.sync import sync_json, sync_lines
from slime.rehearse.result import Rehearsal
from slime.rehearse.sync import PlannedSync
from slime.weights.digest import KEY_VARIABLE, sign


def as_text(done: Rehearsal) -> str:
    findings = done.findings
    lines = [verdict(done)]
    lines += [finding.line() for finding in findings.of("violation")]
    lines += sorted((finding.line() for finding in findings.of("unchecked")), key=lambda line: not line.startswith("UNPROVEN"))
    lines += [finding.line() for finding in findings.of("ok")]
    for title, part in (
        ("stages", _stages(done)),
        ("memory per GPU, GB", _memory(done)),
        ("prediction and measurement, GB", _measured(done)),
        ("cost of one rollout", _cost(done)),
        ("weight sync", sync_lines(done.sync) if done.sync else []),
        ("what would pass", _remedies(done)),
        ("what a GPU-hour buys (* as it is)", _curves(done)),
        ("engine options", list(done.engines.renames)),
    ):
        if part:
            lines += ["", f"-- {title}", *part]
    lines += ["", "-- time: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in (done.seconds or {}).items())]
    lines.append(verdict(done))
    return "\n".join(lines) + "\n"


def verdict(done: Rehearsal) -> str:
    """One line, what could not be checked first."""
    findings = done.findings
    violations, unchecked = len(findings.of("violation")), len(findings.of("unchecked"))
    deciding = sum(finding.decides for finding in findings.of("unchecked"))
    open_points = f"{unchecked} points could not be checked from here" + (f", {deciding} of which decide" if deciding else "")
    if findings.verdict == "not launchable":
        return f"NOT LAUNCHABLE: {violations} violation{'s' if violations > 1 else ''} ({open_points})"
    if findings.verdict == "not proven":
        return f"NOT PROVEN: {open_points}; {len(findings.of('ok'))} checks passed, none failed"
    return f"launchable: {open_points}; {len(findings.of('ok'))} checks passed, none failed"


def _stages(done: Rehearsal) -> list[str]:
    balance = done.balance
    if balance is None or len(balance.sizes) < 2:
        return []
    lines = [
        f"layers {'/'.join(map(str, balance.sizes))}: "
        f"stages are {balance.value:.1%} even by training FLOPs at {balance.length:,} tokens "
        f"({sum(balance.sizes) / len(balance.sizes) / max(balance.sizes):.1%} by layers)"
    ]
    for split in balance.first_last[:5]:
        lines.append(f"  legal, {split.balance:.1%}: {paste(done.reading.config, split, as_list=False)}")
    if len(balance.first_last) > 5:
        lines.append(f"  and {len(balance.first_last) - 5} more pairs, all in --json")
    if balance.best is not None:
        lines.append(f"  best list, {balance.best.balance:.1%}: {paste(done.reading.config, balance.best, as_list=True)}")
    return lines


def _memory(done: Rehearsal) -> list[str]:
    if done.budget is None:
        return []
    names = [phase.name for phase in done.budget.stages[0].phases]
    lines = ["stage  layers  params B  " + "  ".join(name.rjust(max(7, len(name))) for name in names) + "  host GB/node"]
    per_node = done.reading.config.cluster.actor_num_gpus_per_node
    for stage in done.budget.stages:
        share = stage.share
        cells = "  ".join(f"{stage.phase(name).total / 1e9:.1f}".rjust(max(7, len(name))) for name in names)
        lines.append(
            f"{share.stage:5d}  {len(share.layers):6d}  {share.parameters / 1e9:8.3f}  {cells}  "
            f"{stage.host_optimizer * per_node / 1e9:12.0f}"
        )
    node = done.budget.node
    for when, parts in (("while engines generate", node.rollout), ("while a checkpoint is written", node.checkpoint)):
        told = ", ".join(f"{name} {count / 1e9:.0f}" for name, count in parts.items())
        lines.append(f"main memory of the fullest node {when}: {sum(parts.values()) / 1e9:.0f} GB ({told})")
    for cache in done.budget.caches:
        batch = (
            f"; an engine of {cache.gpus} GPUs holds {cache.at_once:,} samples of {cache.longest:,}" if cache.longest else ""
        )
        lines.append(f"KV cache of a {cache.role} GPU: {cache.tokens:,} tokens of {cache.bytes_per_token:,} bytes{batch}")
    for fit in done.budget.fits:
        word = "fits" if fit.fits else "does not fit"
        lines.append(
            f"training on {fit.nodes} nodes (CP {fit.cp}, DP {fit.dp}, EP {fit.ep}): "
            f"{fit.peak_gb:.1f} GB per GPU, {word} {done.options.gpu_memory_gb:g} GB; "
            f"{fit.host_gb_per_node:.0f} GB of optimizer per node"
        )
    lines.append("assumed: " + ", ".join(f"{name} {value:g}" for name, value in done.budget.assumed.items()))
    return lines


def _measured(done: Rehearsal) -> list[str]:
    if done.budget is None or done.budget.measured is None:
        return []
    seen = done.budget.measured
    lines = [
        f"{seen.num_ranks} ranks on {seen.device}, largest micro-batch {seen.micro_batch_tokens:,} tokens per rank, "
        f"up to {seen.micro_batches} in a step",
        "stage  phase          predicted  measured   error",
    ]
    for row in done.budget.comparisons:
        lines.append(
            f"{row.stage:5d}  {row.phase:12s}  {row.predicted / 1e9:10.3f}  {row.measured / 1e9:8.3f}  {row.error:+6.1%}"
        )
    if done.times:
        lines.append("seconds of a rollout  predicted  measured   error")
        lines += [f"{row.name:20s}  {row.predicted:9.1f}  {row.measured:8.1f}  {row.error:+6.1%}" for row in done.times]
    if seen.device == "cuda":
        lines.append(
            f"live tensors; the allocator kept up to {seen.slack / 1e9:.3f} GB beside them, "
            f"a part of overhead_gb {done.budget.assumed['overhead_gb']:g}"
        )
    return lines


def _cost(done: Rehearsal) -> list[str]:
    cost = done.cost
    if cost is None:
        return []
    lines = [
        f"{cost.tokens:,} tokens, {cost.flops_per_token_forward / 1e9:.1f} GF forward "
        f"and {cost.flops_per_token_training / 1e9:.1f} GF training per token"
    ]
    lines += [f"  {phase.name:22s} {phase.seconds:8.1f} s   {phase.why}" for phase in cost.phases]
    hours = f"{cost.gpu_hours:.1f} GPU-hours per rollout; {cost.dominant.name} dominates"
    if cost.overlaps:
        generation, training = (sum(phase.seconds for phase in phases) for phases in (cost.generation, cost.training))
        lines.append(
            f"  {'an iteration':22s} {cost.seconds:8.1f} s   the longer of generation {generation:.1f} s and training "
            f"{training:.1f} s, which go on at the same time, and the sync; {hours}"
        )
        lines.append(f"  {staleness_said(done.reading.config)}")
    else:
        lines.append(f"  {'sum':22s} {cost.seconds:8.1f} s   {hours}")
    if cost.sync is not None:
        sync = cost.sync
        lines.append(
            f"  bytes of a weight sync: experts {sync.experts / 1e9:.2f} GB, the rest {sync.rest / 1e9:.2f} GB; "
            f"land on a GPU {sync.lands_per_gpu / 1e9:.2f} GB, "
            f"in an engine {sync.per_engine / 1e12:.2f} TB, in all engines {sync.all_engines / 1e12:.2f} TB"
        )
    lines.append("  assumed: " + ", ".join(f"{name} {value:g}" for name, value in rates_shown(done.rates).items()))
    return lines


def staleness_said(config: Config) -> str:
    """How far behind the weights are that wrote what is trained."""
    bound = 1 if config.loop.schedule == "one-step-ahead" else config.loop.max_weight_staleness
    most = "any number of weight versions" if bound is None else f"at most {bound} weight version{'s' if bound != 1 else ''}"
    return f"--schedule {config.loop.schedule}: samples are trained {most} after the one that wrote them"


def _remedies(done: Rehearsal) -> list[str]:
    lines = [line for remedy in done.remedies for line in (f"{remedy.what}; append:", *_pasted(remedy.variant))]
    if done.findings.of("violation") and not lines and done.reading.table is not None:
        lines.append("none of the changes that were tried; --plan searches layouts, engines and batches for these nodes")
    return lines


def _pasted(variant: Variant) -> list[str]:
    """Words, and the YAML that takes the place of the run's own."""
    lines = [f"  {' '.join(variant.flags)}"]
    if variant.yaml is not None:
        lines += ["  --sglang-config with", *(f"    {line}" for line in variant.yaml.splitlines())]
    return lines


def _curves(done: Rehearsal) -> list[str]:
    lines = []
    for curve in done.curves:
        lines.append(f"{curve.over}:")
        lines += [f"{'*' if point.own else ' '} {curve_line(point)}" for point in curve.points]
        lines.append(f"  {knee_said(curve)}")
    return lines


SHOWN = 120
"""Characters of a refusal; all of it is in --json."""


def curve_line(point: Point) -> str:
    if point.cost is None:
        why = point.refused.partition("; ")[0]
        return f"{point.label}: {why if len(why) < SHOWN else why[:SHOWN].rpartition(' ')[0] + ' ...'}"
    cost = point.cost
    return (
        f"{point.label}: {cost.per_million:.3g} GPU-hours per million trained tokens "
        f"({cost.gpu_hours:.3g} in {cost.seconds:,.0f} s); limit: {cost.limit}"
    )


def knee_said(curve: Curve) -> str:
    knee = curve.knee
    if knee.own:
        return f"knee: as it is; limit: {knee.cost.limit}"
    head = f"knee: {knee.label}, {curve.gain:.3g} times cheaper per token; limit: {knee.cost.limit}; append:"
    return "\n".join([head, *(f"  {line}" for line in _pasted(knee.variant))])


def _memory_json(budget: Budget) -> dict[str, object]:
    seen = budget.measured
    return {
        "stages": [
            {
                "stage": m.share.stage,
                "parameters": m.share.parameters,
                "dense": m.share.dense,
                "experts": m.share.experts,
                "frozen": m.share.frozen,
                "host_optimizer_per_rank": m.host_optimizer,
                "host_checkpoint_per_rank": m.host_checkpoint,
                "phases": {phase.name: dict(phase.parts) for phase in m.phases},
            }
            for m in budget.stages
        ],
        "kv_cache": [{**vars(cache), "longest_at_once_per_engine": cache.at_once} for cache in budget.caches],
        "node_memory": {"rollout": dict(budget.node.rollout), "checkpoint": dict(budget.node.checkpoint)},
        "node_counts": [vars(fit) for fit in budget.fits],
        "assumed": dict(budget.assumed),
        "measured": None
        if seen is None
        else {
            "device": seen.device,
            "ranks": seen.num_ranks,
            "micro_batch_tokens": seen.micro_batch_tokens,
            "micro_batches": seen.micro_batches,
            "allocator_slack": seen.slack,
            "peaks": [{**vars(row), "error": round(row.error, 6)} for row in budget.comparisons],
        },
    }


def _weights_json(weights: WeightMap, sync: PlannedSync | None, engines: Sequence[EngineSpec]) -> dict[str, object]:
    """`places`: each different set of ranks once, with how many tensors lie there."""
    key, digest = os.environ.get(KEY_VARIABLE), sync.digest if sync is not None else ""
    alike = Counter((row.stage, row.holders.text, row.engines) for row in weights.rows)
    sent: dict[int, list[int]] = {}
    for row in weights.rows:
        if row.round is not None:
            sent.setdefault(row.round, []).append(row.nbytes)
    return {
        "tensors": len(weights.rows),
        "rounds": len(sent),
        "bytes": weights.nbytes,
        "digest": weights.digest,
        "stream_digest": digest,
        "signature": sign(digest, key) if key else None,
        "bytes_per_maker": {str(rank): count for rank, count in sorted(weights.made_bytes.items())},
        "places": [
            {"stage": stage, "holders": holders, "kept_by": kept, "tensors": count}
            for (stage, holders, kept), count in alike.items()
        ],
        "sent": [{"round": number, "tensors": len(sizes), "bytes": sum(sizes)} for number, sizes in sent.items()],
        "received_by": {engine.label: f"0-{engine.num_gpus - 1}" for engine in engines if engine.update_weights},
    }


def _curve_json(curve: Curve) -> dict[str, object]:
    return {
        "over": curve.over,
        "knee": curve.known.index(curve.knee),
        "gain": curve.gain,
        "points": [
            {
                "value": point.value,
                "label": point.label,
                "own": point.own,
                "gpu_hours": point.cost.gpu_hours if point.cost else None,
                "gpu_hours_per_million_tokens": point.per_million,
                "limit": point.cost.limit if point.cost else None,
                "refused": point.refused,
                "append": " ".join(point.variant.flags),
                "sglang_config": point.variant.yaml,
            }
            for point in curve.points
        ],
    }


def _split(split: Split) -> dict[str, object]:
    return {"layers": list(split.sizes), "balance": round(split.balance, 6)}


def as_json(done: Rehearsal) -> dict[str, object]:
    """Everything but the weight map's names (--weight-map writes those)."""
    grid, balance, weights, cost, built = done.reading.grid, done.balance, done.weights, done.cost, done.built
    return {
        "launchable": done.findings.launchable,
        "verdict": done.findings.verdict,
        "findings": [vars(finding) for finding in done.findings.items],
        "notes": list(done.reading.config.notes),
        "seconds": dict(done.seconds or {}),
        "grid": None if grid is None else {**vars(grid), "dp": grid.dp, "edp": grid.edp},
        "stages": None
        if balance is None
        else {
            "layers": list(balance.sizes),
            "balance": balance.value if balance.sizes else None,
            "tokens": balance.length,
            "costs": list(balance.costs),
            "computing_layers": list(balance.computing),
            "legal_first_last": [_split(split) for split in balance.first_last],
            "best": None if balance.best is None else {**_split(balance.best), "layout": layout_string(balance.best.sizes)},
        },
        "would_pass": [
            {"what": remedy.what, "append": " ".join(remedy.variant.flags), "sglang_config": remedy.variant.yaml}
            for remedy in done.remedies
        ],
        "memory": None if done.budget is None else _memory_json(done.budget),
        "measured_seconds": [{**vars(row), "error": round(row.error, 6)} for row in done.times],
        "cost": None
        if cost is None
        else {
            "tokens": cost.tokens,
            "flops_per_token_forward": cost.flops_per_token_forward,
            "flops_per_token_training": cost.flops_per_token_training,
            "phases": [vars(phase) for phase in cost.phases],
            "seconds": cost.seconds,
            "overlaps": cost.overlaps,
            "gpu_hours": cost.gpu_hours,
            "rates": dict(rates_shown(done.rates)),
            "limit": cost.limit,
            "held_at_once": done.assessment.engines.held if done.assessment else 0,
            "curves": [_curve_json(curve) for curve in done.curves],
            "sync": None if cost.sync is None else vars(cost.sync),
        },
        "engines": {
            "sglang": done.engines.version,
            "renames": list(done.engines.renames),
            "engines": [
                {
                    "label": s.label,
                    "gpus": s.num_gpus,
                    "offset": s.gpu_offset,
                    "tp": s.tp_size,
                    "dp": s.dp_size,
                    "ep": s.ep_size,
                }
                for s in done.engines.specs
            ],
        },
        "sync_plan": None if done.sync is None else sync_json(done.sync),
        "weights": None if weights is None else _weights_json(weights, done.sync, done.engines.specs),
        "ranks": None
        if built is None
        else {
            "built": built.num_ranks,
            "unique_parameters": built.unique,
            "seconds": built.seconds,
            "peak_bytes": built.peak_bytes,
            "errors": list(built.errors),
        },
    }
