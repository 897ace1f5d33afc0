"""The report's pictures: inline SVG from numbers, no script, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from slime.rehearse.checks.layout import Balance
from slime.rehearse.model.cost import Cost
from slime.rehearse.model.measured import Comparison
from slime.rehearse.model.memory import StageMemory
from slime.rehearse.model.stages import Split, balance
from slime.rehearse.result import Rehearsal

PARTS = ("#3b6ea5", "#d98841", "#5a9e6f", "#b5524c", "#8a6bb0", "#7d7d7d", "#c2a83e", "#4fa3a5")


def stage_colour(stage: int, count: int, share: float = 0.55) -> str:
    """Hue by stage, darker with `share` (0..1)."""
    return f"hsl({int(360 * stage / max(count, 1))},45%,{int(88 - 48 * max(0.0, min(share, 1.0)))}%)"


def _svg(width: int, height: int, body: Iterable[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )


def _text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 12, colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'


def _box(x: float, y: float, width: float, height: float, colour: str, hint: str = "") -> str:
    inside = f"<title>{escape(hint)}</title>" if hint else ""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.2f}" height="{height:.1f}" '
        f'fill="{colour}" stroke="#fff" stroke-width="0.5">{inside}</rect>'
    )


def rank_grid(done: Rehearsal) -> str:
    """Every rank: a row per pipeline stage, darker where the peak needs more memory. The hint of a cell is its place."""
    grid, limit = done.reading.grid, done.options.gpu_memory_gb
    per_stage = grid.ranks_per_stage
    cell = max(5.0, min(26.0, 860 / per_stage))
    body = []
    for memory in done.budget.stages:
        stage, y = memory.share.stage, 22 + memory.share.stage * 30
        # Training tells stages apart; rollout and weight sync are mostly the engine's and alike everywhere.
        peak = memory.phase("train")
        colour = stage_colour(stage, grid.pp, peak.total / 1e9 / limit)
        first, last = memory.share.layers[0] + 1, memory.share.layers[-1] + 1
        body.append(_text(0, y + 17, f"stage {stage}: layers {first}-{last}"))
        for inside in range(per_stage):
            rank = stage * per_stage + inside
            place = grid.place(rank)
            where = " ".join(f"{axis} {value}" for axis, value in place.items())
            body.append(
                _box(
                    150 + inside * cell,
                    y,
                    cell - 1,
                    25,
                    colour,
                    f"rank {rank}: {where}; {memory.share.parameters / 1e9:.3f} B parameters, "
                    f"{peak.total / 1e9:.1f} GB while training",
                )
            )
        body.append(_text(158 + per_stage * cell, y + 17, f"{peak.total / 1e9:.1f} GB while training"))
    body.append(
        _text(
            150,
            14,
            f"{per_stage} ranks per stage: tp fastest, then cp, then dp; darker = closer to {limit:g} GB",
            size=11,
            colour="#666",
        )
    )
    return _svg(int(158 + per_stage * cell + 170), 30 + grid.pp * 30, body, "rank grid by stage and memory")


def balance_bars(result: Balance) -> str:
    """Cost of each stage: as launched, the best first/last pair, and the best list."""
    rows: list[tuple[str, Sequence[int], Sequence[float]]] = [("as given", result.sizes, result.costs)]
    best_pair = next(iter(result.first_last), None)
    for name, split in (("best first/last", best_pair), ("best list", result.best)):
        if split is not None:
            rows.append((name, split.sizes, _costs_of(result, split)))
    top = max(max(costs) for _, _, costs in rows if costs)
    body, y = [], 6.0
    for name, sizes, costs in rows:
        body.append(_text(0, y + 12, f"{name}: {'/'.join(map(str, sizes))} - {balance(costs):.1%} even", size=13))
        y += 18
        for stage, (size, cost) in enumerate(zip(sizes, costs, strict=True)):
            body.append(_text(0, y + 11, f"stage {stage}", size=11))
            body.append(
                _box(
                    60,
                    y,
                    560 * cost / top,
                    14,
                    stage_colour(stage, len(costs)),
                    f"{size} layers, {cost / 1e9:.1f} GF per token",
                )
            )
            body.append(_text(66 + 560 * cost / top, y + 11, f"{size} layers, {cost / 1e9:.1f} GF", size=11, colour="#555"))
            y += 16
        y += 10
    return _svg(800, int(y), body, "stage balance")


def _costs_of(result: Balance, split: Split) -> list[float]:
    """Stage costs of another split, from the layer costs of the given one: kept by the layout part."""
    costs, start = [], 0
    for size in split.sizes:
        costs.append(sum(result.layer_costs[start : start + size]))
        start += size
    costs[-1] += result.head_cost
    return costs


def memory_bars(memory: Sequence[StageMemory], limit_gb: float) -> str:
    """The training peak and the other phases of every stage, by part."""
    names = sorted({name for stage in memory for phase in stage.phases for name in phase.parts})
    colours = {
        name: f"hsl({int(360 * number * 0.618) % 360},50%,{42 + 18 * (number % 2)}%)" for number, name in enumerate(names)
    }
    top = max(limit_gb * 1e9, max(phase.total for stage in memory for phase in stage.phases))
    body, y, scale = [], 18.0, 640 / top
    for stage in memory:
        body.append(_text(0, y - 4, f"stage {stage.share.stage}: {stage.share.parameters / 1e9:.3f} B parameters", size=12))
        for phase in stage.phases:
            x = 100.0
            body.append(_text(0, y + 10, phase.name, size=10, colour="#555"))
            for name, count in phase.parts.items():
                body.append(_box(x, y, count * scale, 12, colours[name], f"{name}: {count / 1e9:.2f} GB"))
                x += count * scale
            body.append(_text(x + 5, y + 10, f"{phase.total / 1e9:.1f}", size=10))
            y += 14
        y += 20
    line = 100 + limit_gb * 1e9 * scale
    body.append(f'<line x1="{line:.1f}" y1="4" x2="{line:.1f}" y2="{y - 16:.0f}" stroke="#b00" stroke-dasharray="4 3"/>')
    body.append(_text(line + 3, 12, f"{limit_gb:g} GB", size=10, colour="#b00"))
    for number, name in enumerate(names):
        body.append(_box(820, 10 + number * 16, 11, 11, colours[name]))
        body.append(_text(836, 20 + number * 16, name, size=11))
    return _svg(1040, int(max(y, 26 + 16 * len(names))), body, "memory by phase and stage")


def measured_bars(rows: Sequence[Comparison]) -> str:
    """A pair of bars per stage and phase: predicted above, measured below."""
    top = max(max(row.predicted, row.measured) for row in rows)
    body, y = [_box(150, 2, 11, 11, PARTS[0]), _text(166, 12, "predicted", size=11)], 24.0
    body += [_box(240, 2, 11, 11, PARTS[1]), _text(256, 12, "measured", size=11)]
    for row in rows:
        body.append(_text(0, y + 14, f"stage {row.stage} {row.phase}", size=11))
        for place, (name, count) in enumerate((("predicted", row.predicted), ("measured", row.measured))):
            body.append(_box(150, y + 9 * place, 560 * count / top, 9, PARTS[place], f"{name}: {count / 1e9:.3f} GB"))
        width = 560 * max(row.predicted, row.measured) / top
        words = f"{row.predicted / 1e9:.2f} / {row.measured / 1e9:.2f} GB, {row.error:+.1%}"
        body.append(_text(158 + width, y + 14, words, size=11, colour="#555"))
        y += 24
    return _svg(960, int(y), body, "predicted and measured memory")


def weight_flow(done: Rehearsal) -> str:
    """Stages send, engines keep: widths follow bytes."""
    grid, weights = done.reading.grid, done.weights
    by_stage = [[0, 0] for _ in range(grid.pp)]
    for row in weights.rows:
        by_stage[row.stage][".mlp.experts." in row.name] += row.nbytes
    engines = [engine for engine in done.engines.specs if engine.update_weights]
    total = max(weights.nbytes, 1)
    height = max(60 + 44 * grid.pp, 60 + 60 * len(engines), 200)
    body, y = [], 30.0
    middle_top, flow = 40.0, (height - 80) / total
    point = middle_top
    for stage, (rest, experts) in enumerate(by_stage):
        sources = sum(1 for rank in weights.source_bytes if rank // grid.ranks_per_stage == stage)
        body.append(
            _box(10, y, 190, 34, stage_colour(stage, grid.pp), f"dense {rest / 1e9:.2f} GB, experts {experts / 1e9:.2f} GB")
        )
        body.append(_text(16, y + 14, f"stage {stage}: {(rest + experts) / 1e9:.1f} GB", size=12))
        body.append(_text(16, y + 28, f"{sources} source ranks", size=10, colour="#444"))
        thick = (rest + experts) * flow
        body.append(_ribbon(200, y + 17, 380, point + thick / 2, thick, stage_colour(stage, grid.pp)))
        point += thick
        y += 44
    body.append(_box(380, middle_top, 130, total * flow, "#e8e8e8", f"digest {weights.digest}"))
    body.append(
        _text(445, middle_top + total * flow / 2 - 8, f"{len(weights.bucket_bytes):,} buckets", anchor="middle", size=13)
    )
    body.append(_text(445, middle_top + total * flow / 2 + 10, f"{weights.nbytes / 1e9:.1f} GB", anchor="middle", size=13))
    body.append(_text(445, middle_top + total * flow / 2 + 28, weights.digest[:12], anchor="middle", size=10, colour="#666"))
    per_gpu = done.cost.sync.lands_per_gpu if done.cost and done.cost.sync else 0
    for number, engine in enumerate(engines):
        top = 36 + number * (height - 60) / max(len(engines), 1)
        body.append(_ribbon(510, middle_top + total * flow / 2, 690, top + 20, 12, "#9db7d5"))
        body.append(_box(690, top, 250, 42, "#cfdcec", engine.label))
        body.append(
            _text(
                698,
                top + 17,
                f"{engine.role} {engine.engine_id}: {engine.num_gpus} GPUs from slot {engine.gpu_offset}",
                size=12,
            )
        )
        body.append(
            _text(698, top + 33, f"EP {engine.ep_size}, {per_gpu / 1e9:.2f} GB stay on each GPU", size=11, colour="#444")
        )
    body.append(_text(10, 16, "trainer stages", size=11, colour="#666"))
    body.append(_text(690, 16, "engines (all receive every bucket)", size=11, colour="#666"))
    return _svg(960, int(height), body, "weight flow")


def _ribbon(x1: float, y1: float, x2: float, y2: float, width: float, colour: str) -> str:
    middle = (x1 + x2) / 2
    return (
        f'<path d="M{x1:.1f},{y1:.1f} C{middle:.1f},{y1:.1f} {middle:.1f},{y2:.1f} {x2:.1f},{y2:.1f}" '
        f'fill="none" stroke="{colour}" stroke-opacity="0.7" stroke-width="{max(width, 1):.1f}"/>'
    )


def timeline(cost: Cost) -> str:
    """One iteration, phase after phase; the short ones drawn again, enlarged, without the longest."""
    body, y = [], 24.0
    for title, phases in (
        ("one rollout", cost.phases),
        (f"without {cost.dominant.name}", tuple(p for p in cost.phases if p is not cost.dominant)),
    ):
        total, x = sum(phase.seconds for phase in phases), 0.0
        if not total:
            continue
        body.append(_text(0, y - 6, f"{title}: {total:,.0f} s", size=13))
        for phase in phases:
            width = 900 * phase.seconds / total
            colour = PARTS[cost.phases.index(phase) % len(PARTS)]
            body.append(_box(x, y, width, 30, colour, f"{phase.name}: {phase.seconds:.1f} s, {phase.why}"))
            if width > 60:
                body.append(
                    _text(x + width / 2, y + 19, f"{phase.name} {phase.seconds:.0f} s", anchor="middle", size=11, colour="#fff")
                )
            x += width
        y += 64
    for number, phase in enumerate(cost.phases):
        body.append(_box(0, y - 14 + number * 17, 11, 11, PARTS[number % len(PARTS)]))
        body.append(_text(18, y - 4 + number * 17, f"{phase.name}: {phase.seconds:.1f} s ({phase.why})", size=12))
    return _svg(960, int(y + 17 * len(cost.phases)), body, "iteration timeline")
