"""The report's bars: boxes whose widths are numbers, with words that wrap beside them. The hint of a box is its value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby

from slime.rehearse.checks.layout import Balance
from slime.rehearse.checks.memory import NodeMemory
from slime.rehearse.model.cost import Cost
from slime.rehearse.model.measured import Comparison
from slime.rehearse.model.memory import Phase, StageMemory
from slime.rehearse.model.shares import Grid
from slime.rehearse.report.style import KINDS, colour_class, kind_of
from slime.weights.price import PlanPrice

GB = 1e9
MOST_CELLS = 4096
"""Ranks that are drawn one by one; a page with more of them opens slowly and shows nothing."""
KIND_OF_COST = {
    "prefill": "KV cache",
    "rollout": "engine weights",
    "train": "weights",
    "log-probs": "gradients",
    "optimizer": "optimizer",
    "weight sync": "on the way",
    "checkpoint": "activations",
}
"""Phases of an iteration in the colours of who works: the trainer's blues, the engines' green. Handing over is grey."""


def amount(value: float) -> str:
    """As many digits as say something, whether of a 744B model or of a tiny one."""
    if 0 < value < 0.005:
        return "under 0.01"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 or not value else f"{value:.2f}"


def figure(title: str, body: Iterable[str], *, kind: str = "") -> str:
    return f'<div class="figure {kind}" role="figure" aria-label="{escape(title)}">{"".join(body)}</div>'


def _box(share: float, colour: str, hint: str) -> str:
    return f'<i class="{colour}" style="width:{100 * share:.3f}%" title="{escape(hint)}"></i>'


def _row(
    name: str, boxes: Iterable[str], value: str, *, mark: float | None = None, over: bool = False, wide: bool = False
) -> str:
    """mark: share of the width at which a limit stands. over: the value is above it."""
    limit = "" if mark is None else f'<i class="mark" style="left:{100 * mark:.2f}%"></i>'
    alarm = " over" if over else ""
    return (
        f'<div class="row{" wide" if wide else ""}"><span class="name">{escape(name)}</span>'
        f'<span class="track">{"".join(boxes)}{limit}</span><span class="value{alarm}">{escape(value)}</span></div>'
    )


def _swatch(colour: str) -> str:
    return f'<i class="swatch {colour}"></i>'


def legend(words: Mapping[str, str]) -> str:
    """words: what a colour stands for -> its class."""
    return '<div class="legend">' + "".join(f"<span>{_swatch(c)}{escape(name)}</span>" for name, c in words.items()) + "</div>"


def layers_text(layers: Sequence[int]) -> str:
    """1-based, as flags count them: "layers 1-5, 40-44" of a stage with two chunks; lines do not break inside a range."""
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    told = ", ".join(f"{run[0] + 1}\u2011{run[-1] + 1}" if len(run) > 1 else f"{run[0] + 1}" for run in runs)
    return f"layer {told}" if len(layers) == 1 else f"layers {told}"


def rank_grid(grid: Grid, stages: Sequence[StageMemory], limit_gb: float) -> str:
    """Every rank: a row per pipeline stage, fuller where training needs more memory. The hint of a cell is its place."""
    rows = []
    for memory in stages:
        # Training tells stages apart; rollout and weight sync are mostly the engine's and alike everywhere.
        stage, train = memory.share.stage, memory.phase("train").total / GB
        told = f"{memory.share.parameters / GB:.3f} B parameters, {train:.1f} GB while training"
        first = stage * grid.ranks_per_stage
        cells = range(first, first + grid.ranks_per_stage) if grid.world <= MOST_CELLS else ()
        boxes = []
        for rank in cells:
            where = " ".join(f"{axis} {value}" for axis, value in grid.place(rank).items())
            opacity = min(1.0, max(0.15, train / limit_gb))
            boxes.append(f'<i class="k0" style="opacity:{opacity:.2f}" title="rank {rank}: {where}; {told}"></i>')
        rows.append(_row(f"stage {stage}: {layers_text(memory.share.layers)}", boxes, f"{train:.1f} GB in training", wide=True))
    return figure("ranks by stage and memory", rows, kind="ranks")


def balance_bars(given: Balance) -> str:
    """Cost of each stage: as launched, the best first/last pair, and the best list."""
    pair = next(iter(given.first_last), None)
    splits = [("as given", tuple((size,) for size in given.sizes), given.costs)]
    splits += [
        (name, split.stage_layers, split.costs)
        for name, split in (("best first and last", pair), ("best list", given.best))
        if split is not None
    ]
    top = max(max(costs) for _, _, costs in splits)
    body = []
    for name, layers, costs in splits:
        body.append(f"<h3>{escape(name)}: {sum(costs) / len(costs) / max(costs):.1%} even</h3>")
        for stage, (sizes, cost) in enumerate(zip(layers, costs, strict=True)):
            value = f"{' + '.join(map(str, sizes))} layers, {amount(cost / 1e9)} GF"
            box = _box(cost / top, "k3" if cost == max(costs) else "k1", f"{amount(cost / 1e9)} GF per token")
            body.append(_row(f"stage {stage}", [box], value, wide=True))
    return figure("stage balance", [legend({"a stage": "k1", "the slowest, which decides": "k3"}), *body])


def memory_bars(stages: Sequence[StageMemory], limit_gb: float) -> str:
    """All phases of every stage. Neighbours that differ in what is under way alone are drawn once."""
    top = max(limit_gb * GB, *(phase.total for stage in stages for phase in stage.phases))
    body = []
    for _, group in groupby(stages, lambda stage: stage.share.parameters):
        same = list(group)
        fullest = max(same, key=lambda stage: stage.phase("train").total)
        named, share = f"stage {fullest.share.stage}", fullest.share
        if len(same) > 1:
            named = f"stages {same[0].share.stage} to {same[-1].share.stage}, as stage {share.stage}, the fullest in training"
        body.append(f"<h3>{named}: {share.parameters / GB:.3f} B parameters per rank</h3>")
        body += [_memory_row(phase, top, limit_gb * GB) for phase in fullest.phases]
        peak = fullest.peak
        body.append(f'<p class="note">largest, {escape(peak.name)} {peak.total / GB:.1f} GB: {escape(_parts(peak.parts))}</p>')
    used = {kind_of(part) for stage in stages for phase in stage.phases for part, count in phase.parts.items() if count}
    return figure("memory by phase and stage", [_kinds(used, f"limit of {limit_gb:g} GB"), *body])


def node_bars(node: NodeMemory, limit_gb: float) -> str:
    """Main memory of the fullest node against its size."""
    phases = (Phase("engines generate", node.rollout), Phase("checkpoint, at most", node.checkpoint))
    top = max(limit_gb * GB, *(phase.total for phase in phases))
    used = {kind_of(part) for phase in phases for part, count in phase.parts.items() if count}
    rows = [_memory_row(phase, top, limit_gb * GB, of=limit_gb) for phase in phases]
    notes = [f'<p class="note">{phase.name}: {escape(_parts(phase.parts) or "under 0.05 GB each")}</p>' for phase in phases]
    return figure("main memory of a node", [_kinds(used, f"a node's {limit_gb:,g} GB"), *rows, *notes])


def _memory_row(phase: Phase, top: float, limit: float, *, of: float | None = None) -> str:
    boxes = []
    for kind in KINDS:
        parts = {name: count for name, count in phase.parts.items() if kind_of(name) == kind and count}
        if parts:
            boxes.append(_box(sum(parts.values()) / top, colour_class(kind), _parts(parts, least=0)))
    value = f"{phase.total / GB:,.1f} GB" if of is None else f"{amount(phase.total / GB)} of {of:,g} GB"
    return _row(phase.name, boxes, value, mark=limit / top, over=phase.total > limit)


def _parts(parts: Mapping[str, int], *, least: float = 5e7) -> str:
    return ", ".join(f"{name} {count / GB:.1f}" for name, count in parts.items() if count >= least)


def _kinds(used: set[str], limit: str) -> str:
    return legend({kind: colour_class(kind) for kind in KINDS if kind in used} | {limit: "limit"})


def measured_bars(rows: Sequence[Comparison]) -> str:
    """A pair of bars per stage and phase: predicted above, measured below."""
    top = max(max(row.predicted, row.measured) for row in rows)
    body = [legend({"predicted": "k0", "measured": "k3"})]
    for row in rows:
        value = f"{row.predicted / GB:.2f}"
        body.append(_row(f"stage {row.stage} {row.phase}", [_box(row.predicted / top, "k0", f"predicted {value} GB")], value))
        value = f"{row.measured / GB:.2f}"
        box = _box(row.measured / top, "k3", f"measured {value} GB")
        body.append(_row("", [box], f"{value} GB, {row.error:+.1%}"))
    return figure("predicted and measured memory", body)


def timeline(cost: Cost) -> str:
    """One iteration, phase after phase, or generation above the training beside it; the short ones drawn again, enlarged,
    without the longest; all of them in words."""
    colours = {phase.name: colour_class(KIND_OF_COST.get(phase.name, "overhead")) for phase in cost.phases}
    body = []
    others = tuple(phase for phase in cost.phases if phase is not cost.dominant)
    bars = [("generation", cost.generation), ("training", cost.training)] if cost.overlaps else [("one rollout", cost.phases)]
    longest = max(sum(phase.seconds for phase in phases) for _, phases in bars)
    for title, phases in (*bars, (f"without {cost.dominant.name}", others)):
        total = sum(phase.seconds for phase in phases)
        if total:
            whole = longest if phases is not others else total
            boxes = [_box(p.seconds / whole, colours[p.name], f"{p.name}: {amount(p.seconds)} s, {p.why}") for p in phases]
            body.append(_row(title, boxes, f"{amount(total)} s"))
    rows = [
        f"<tr><td>{_swatch(colours[phase.name])}{escape(phase.name)}</td><td>{amount(phase.seconds)} s</td>"
        f"<td>{escape(phase.why)}</td></tr>"
        for phase in cost.phases
    ]
    return figure("iteration timeline", [*body, '<table class="phases">', *rows, "</table>"])


def sync_bars(found: PlanPrice) -> str:
    """The rounds of a weight sync: hop by hop over the links, and loading, which goes on while the next round travels."""
    words = {"over links, hop by hop": colour_class("on the way"), "loaded by engines": colour_class("engine weights")}
    longest = max((one.wire + one.load for one in found.rounds), default=0.0) or 1.0
    rows = []
    for number, one in enumerate(found.rounds):
        boxes = [
            _box(seconds / longest, colour_class("on the way"), f"hop {hop}: {seconds * 1e3:.1f} ms")
            for hop, seconds in enumerate(one.hops)
        ]
        boxes.append(_box(one.load / longest, colour_class("engine weights"), f"loading: {one.load * 1e3:.1f} ms"))
        rows.append(_row(f"round {number}", boxes, f"{amount(one.bucket / 1e9)} GB, {amount((one.wire + one.load) * 1e3)} ms"))
    return figure("rounds of a weight sync", [legend(words), *rows])
