"""The report as one HTML file: findings, pictures and tables, readable without a network and on paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from slime.rehearse.findings import Finding, Verdict
from slime.rehearse.model.measured import TOLERANCE
from slime.rehearse.model.rates import rates_shown
from slime.rehearse.report.bars import (
    amount,
    balance_bars,
    measured_bars,
    memory_bars,
    node_bars,
    rank_grid,
    sync_bars,
    timeline,
)
from slime.rehearse.report.style import STYLE
from slime.rehearse.report.svg import weight_flow
from slime.rehearse.report.text import as_text, knee_said, verdict
from slime.rehearse.result import Rehearsal

VERDICT_CLASS: dict[Verdict, str] = {"launchable": "good", "not launchable": "bad", "not proven": "open"}


def as_html(done: Rehearsal) -> str:
    reading = done.reading
    grid, name = reading.grid, (reading.hf.source if reading.hf else "unknown model")
    head = "layout not defined"
    if grid:
        head = f"{grid.world} ranks: TP {grid.tp} x PP {grid.pp} x CP {grid.cp} x DP {grid.dp}, EP {grid.ep}"
    word, _, rest = verdict(done).partition(": ")
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>Rehearsal: {escape(word)}</title><style>{STYLE}</style></head><body>",
        "<h1>Rehearsal</h1>",
        f"<p>{escape(name)}<br>{escape(head)}</p>",
        f'<p class="verdict {VERDICT_CLASS[done.findings.verdict]}"><strong>{escape(word)}</strong>{escape(rest)}</p>',
        *_findings("Violations", done.findings.of("violation")),
        *_findings("Not checked from here", sorted(done.findings.of("unchecked"), key=lambda finding: not finding.decides)),
        *_tiles(done),
        *_layout(done),
        *_memory(done),
        *_measured(done),
        *_cost(done),
        *_curves(done),
        *_weights(done),
        *_findings("Checked", done.findings.of("ok")),
        "<details><summary>All of it as text</summary>",
        f"<pre>{escape(as_text(done))}</pre></details>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _tiles(done: Rehearsal) -> list[str]:
    """The four numbers that one looks for first."""
    budget, tiles = done.budget, []
    if budget is not None:
        peak = max((stage.peak for stage in budget.stages), key=lambda phase: phase.total)
        node = max(sum(budget.node.rollout.values()), sum(budget.node.checkpoint.values()))
        tiles.append((f"{peak.total / 1e9:.1f} of {done.options.gpu_memory_gb:g} GB", f"a GPU's largest phase, {peak.name}"))
        tiles.append((f"{amount(node / 1e9)} of {done.options.host_memory_gb:,g} GB", "main memory of the fullest node"))
    if done.cost is not None:
        hours = f"{amount(done.cost.gpu_hours)} GPU-hours"
        tiles.append((f"{amount(done.cost.seconds)} s", f"one rollout and its training, {hours}"))
    if done.balance is not None and len(done.balance.sizes) > 1:
        tiles.append((f"{done.balance.value:.0%} even", "pipeline stages, by training FLOPs"))
    cells = [f'<div class="tile"><strong>{escape(value)}</strong>{escape(what)}</div>' for value, what in tiles]
    return ['<div class="tiles">', *cells, "</div>"] if cells else []


def _layout(done: Rehearsal) -> list[str]:
    parts = []
    if done.budget:
        grid, limit = done.reading.grid, done.options.gpu_memory_gb
        parts += [
            "<h2>Ranks</h2>",
            f'<p class="note">{_ranks(grid.ranks_per_stage)} per stage: tp fastest, then cp, then dp; the stronger the colour, '
            f"the nearer to {limit:g} GB.</p>",
            rank_grid(grid, done.budget.stages, limit),
        ]
    balance = done.balance
    if balance is None or len(balance.sizes) < 2:
        return parts
    parts += [
        "<h2>Stage balance</h2>",
        f"<p>Training FLOPs per token at sequences of {balance.length:,} tokens: linear layers, attention, indexer, "
        "recomputation, output layer.</p>",
        balance_bars(balance),
    ]
    if balance.first_last:
        listed = ", ".join(f"{split.sizes[0]}/{split.sizes[-1]} ({split.balance:.0%})" for split in balance.first_last)
        parts.append(f'<p class="note">All legal pairs of first and last stage, best balanced first: {listed}</p>')
    return parts


def _memory(done: Rehearsal) -> list[str]:
    if done.budget is None:
        return []
    limit = done.options.gpu_memory_gb
    parts = ["<h2>Memory of a GPU through an iteration</h2>", memory_bars(done.budget.stages, limit)]
    if done.budget.caches:
        rows = [
            (c.role, f"{c.tokens:,}", f"{c.bytes_per_token:,}", c.gpus, f"{c.at_once:,} of {c.longest:,}" if c.longest else "-")
            for c in done.budget.caches
        ]
        parts += _table(
            ("engine", "cache tokens per GPU", "bytes per token", "GPUs of an engine", "longest samples it holds at once"), rows
        )
    parts += ["<h2>Main memory of the fullest node</h2>", node_bars(done.budget.node, done.options.host_memory_gb)]
    rows = [
        (
            fit.nodes,
            fit.cp,
            fit.dp,
            fit.ep,
            f"{fit.peak_gb:.1f}",
            f"{fit.host_gb_per_node:.0f}",
            f"fits {limit:g} GB" if fit.fits else "does not fit",
        )
        for fit in done.budget.fits
    ]
    if rows:
        parts.append("<h2>Training on other numbers of nodes</h2>")
        parts += _table(("nodes", "CP", "DP", "EP", "peak GB per GPU", "optimizer GB per node", ""), rows)
    parts.append(f'<p class="note">Assumed: {_listed(done.budget.assumed)}</p>')
    return parts


def _measured(done: Rehearsal) -> list[str]:
    if done.budget is None or done.budget.measured is None:
        return []
    seen, rows = done.budget.measured, done.budget.comparisons
    cells = [
        (row.stage, row.phase, f"{row.predicted / 1e9:.3f}", f"{row.measured / 1e9:.3f}", f"{row.error:+.1%}") for row in rows
    ]
    return [
        "<h2>Prediction and measurement</h2>",
        f"<p>{seen.num_ranks} ranks on {escape(seen.device)}, largest micro-batch {seen.micro_batch_tokens:,} tokens per rank; "
        f"the largest rank of each stage.</p>",
        measured_bars(rows),
        *_table(
            ("stage", "phase", "predicted GB", "measured GB", "error"),
            cells,
            off={number for number, row in enumerate(rows) if abs(row.error) > TOLERANCE},
        ),
    ]


def _cost(done: Rehearsal) -> list[str]:
    if done.cost is None:
        return []
    return [
        "<h2>One iteration</h2>",
        timeline(done.cost),
        f'<p class="note">{amount(done.cost.gpu_hours)} GPU-hours per rollout; {escape(done.cost.dominant.name)} dominates. '
        f"Assumed: {_listed(rates_shown(done.rates))}</p>",
    ]


def _curves(done: Rehearsal) -> list[str]:
    """Each as bars of what a token costs; the run's own choice and the knee are marked."""
    parts = ["<h2>What a GPU-hour buys</h2>"] if done.curves else []
    for curve in done.curves:
        highest = max(point.per_million for point in curve.known)
        rows = []
        for point in curve.points:
            mark = "as it is" if point.own else "knee" if point is curve.knee else ""
            if point.cost is None:
                rows.append(f'<tr><td>{escape(point.label)}</td><td colspan="3">{escape(point.refused)}</td></tr>')
                continue
            bar = f'<meter max="{highest:.6g}" value="{point.per_million:.6g}"></meter>'
            rows.append(
                f"<tr><td>{escape(point.label)}</td><td>{bar} {point.per_million:.3g}</td>"
                f"<td>{escape(point.cost.limit)}</td><td>{mark}</td></tr>"
            )
        head = "<tr><th></th><th>GPU-hours per million trained tokens</th><th>limit</th><th></th></tr>"
        parts.append(f"<h3>Over {escape(curve.over)}</h3><table>{head}{''.join(rows)}</table>")
        parts.append(f"<pre>{escape(knee_said(curve))}</pre>")
    return parts


def _weights(done: Rehearsal) -> list[str]:
    if done.weights is None or not done.weights.rows:
        return []
    planned = ["<h3>Rounds of a sync</h3>", sync_bars(done.sync.price)] if done.sync else []
    digest = f"<p>Digest of the weight map: <code>{done.weights.digest}</code></p>"
    return ["<h2>Weight flow</h2>", weight_flow(done), *planned, digest]


def _ranks(count: int) -> str:
    return f"{count:,} rank" + "s" * (count != 1)


def _listed(values: object) -> str:
    return escape(", ".join(f"{name} {value:g}" for name, value in values.items()))


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], *, off: set[int] = frozenset()) -> list[str]:
    body = []
    for number, row in enumerate(rows):
        mark = ' class="off"' if number in off else ""
        body.append("<tr>" + "".join(f"<td{mark}>{escape(str(cell))}</td>" for cell in row) + "</tr>")
    return [
        '<table class="numbers">',
        "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>",
        *body,
        "</table>",
    ]


def _findings(title: str, items: list[Finding]) -> list[str]:
    if not items:
        return []
    rows = []
    for item in items:
        mark = "unproven" if item.decides else item.severity
        values = f' <span class="values">[{escape(item.values)}]</span>' if item.values else ""
        fix = f'<br><span class="fix">fix: {escape(item.fix)}</span>' if item.fix else ""
        rows.append(
            f'<tr><td class="{mark}">{mark}</td><td>{escape(item.area)}</td><td>{escape(item.what)}{values}{fix}</td></tr>'
        )
    return [f"<h2>{escape(title)} ({len(items)})</h2>", '<table class="findings">', *rows, "</table>"]
