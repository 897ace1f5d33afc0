"""The report as one HTML file: findings, pictures and tables, readable without a network and on paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from slime.rehearse.findings import Finding
from slime.rehearse.model.cost import rates_shown
from slime.rehearse.model.measured import TOLERANCE
from slime.rehearse.report.svg import balance_bars, measured_bars, memory_bars, rank_grid, timeline, weight_flow
from slime.rehearse.report.text import as_text, verdict
from slime.rehearse.result import Rehearsal

STYLE = """
body { font: 14px/1.45 system-ui, "DejaVu Sans", sans-serif; color: #222; background: #fff }
body { margin: 24px auto; max-width: 1080px; padding: 0 16px }
h1 { font-size: 22px; margin: 0 0 4px } h2 { font-size: 17px; margin: 32px 0 8px; border-bottom: 1px solid #ddd }
.verdict { font-size: 16px; padding: 8px 12px; border-radius: 6px; display: inline-block }
.good { background: #dff0e2 } .bad { background: #f6dcda }
table { border-collapse: collapse; width: 100% }
td, th { padding: 3px 8px; vertical-align: top; border-bottom: 1px solid #eee; text-align: left }
table.numbers { width: auto }
table.numbers td, table.numbers th { text-align: right; font-variant-numeric: tabular-nums; padding: 2px 12px }
th { font-weight: 600; color: #555 } td.off { color: #a11; font-weight: 600 }
td.mark { white-space: nowrap; font-weight: 600 }
.violation { color: #a11 } .unchecked { color: #9a6b00 } .ok { color: #2a7a3a }
.values, .note { color: #666 } .fix { color: #134d8a }
pre { background: #f6f6f6; padding: 10px; overflow-x: auto; font-size: 12px }
svg { max-width: 100%; height: auto; display: block; margin: 6px 0 }
@media print {
  body { margin: 0; max-width: none } pre { white-space: pre-wrap }
  svg, tr { break-inside: avoid } h2 { break-after: avoid }
}
"""


def as_html(done: Rehearsal) -> str:
    reading = done.reading
    grid, name = reading.grid, (reading.hf.source if reading.hf else "unknown model")
    head = "layout not defined"
    if grid:
        head = f"{grid.world} ranks: TP {grid.tp} x PP {grid.pp} x CP {grid.cp} x DP {grid.dp}, EP {grid.ep}"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><title>Rehearsal</title>',
        f"<style>{STYLE}</style></head><body>",
        "<h1>Rehearsal</h1>",
        f"<p>{escape(name)}<br>{escape(head)}</p>",
        f'<p class="verdict {"good" if done.findings.launchable else "bad"}">{escape(verdict(done))}</p>',
        *_findings("Violations", done.findings.of("violation")),
        *_findings("Not checked from here", sorted(done.findings.of("unchecked"), key=lambda finding: not finding.decides)),
        *_layout(done),
        *_memory(done),
        *_measured(done),
        *_cost(done),
        *_weights(done),
        *_findings("Checked", done.findings.of("ok")),
        "<h2>As text</h2>",
        f"<pre>{escape(as_text(done))}</pre>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _layout(done: Rehearsal) -> list[str]:
    parts = ["<h2>Ranks</h2>", rank_grid(done)] if done.budget else []
    balance = done.balance
    if balance is None or len(balance.sizes) < 2:
        return parts
    parts += [
        "<h2>Stage balance</h2>",
        f"<p>Training FLOPs per token at sequences of {balance.length:,} tokens: linear layers, sparse core, indexer, "
        "recomputation, output layer. The slowest stage decides.</p>",
        balance_bars(balance),
    ]
    if balance.first_last:
        listed = ", ".join(f"{split.sizes[0]}/{split.sizes[-1]} ({split.balance:.0%})" for split in balance.first_last)
        parts.append(f'<p class="note">All legal first/last pairs, best balanced first: {listed}</p>')
    return parts


def _memory(done: Rehearsal) -> list[str]:
    if done.budget is None:
        return []
    limit = done.options.gpu_memory_gb
    parts = ["<h2>Memory of a GPU through an iteration, GB</h2>", memory_bars(done.budget.stages, limit)]
    if done.budget.caches:
        rows = [
            (c.role, f"{c.tokens:,}", f"{c.bytes_per_token:,}", c.gpus, f"{c.at_once:,} of {c.longest:,}" if c.longest else "-")
            for c in done.budget.caches
        ]
        parts += _table(
            ("engine", "cache tokens per GPU", "bytes per token", "GPUs of an engine", "longest samples it holds at once"), rows
        )
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
    parts += ['<p class="note">Training on other numbers of nodes, TP and PP as given:</p>']
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
        f'<p class="note">{done.cost.gpu_hours:.1f} GPU-hours per rollout; {escape(done.cost.dominant.name)} dominates. '
        f"Assumed: {_listed(rates_shown(done.rates))}</p>",
    ]


def _weights(done: Rehearsal) -> list[str]:
    if done.weights is None or not done.weights.rows:
        return []
    return ["<h2>Weight flow</h2>", weight_flow(done), f"<p>Digest of the weight map: <code>{done.weights.digest}</code></p>"]


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
        values = f' <span class="values">[{escape(item.values)}]</span>' if item.values else ""
        fix = f'<br><span class="fix">fix: {escape(item.fix)}</span>' if item.fix else ""
        rows.append(
            f'<tr><td class="mark {item.severity}">{item.severity}</td><td>{escape(item.area)}</td>'
            f"<td>{escape(item.what)}{values}{fix}</td></tr>"
        )
    return [f"<h2>{escape(title)} ({len(items)})</h2>", "<table>", *rows, "</table>"]
