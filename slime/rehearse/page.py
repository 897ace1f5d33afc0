"""The report as one HTML file: findings and pictures, readable without a network."""

from __future__ import annotations

from html import escape

from slime.rehearse.findings import Finding
from slime.rehearse.report import as_text, verdict
from slime.rehearse.result import Rehearsal
from slime.rehearse.svg import balance_bars, memory_bars, rank_grid, timeline, weight_flow

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 24px auto; max-width: 1080px; color: #222; background: #fff; padding: 0 16px }
h1 { font-size: 22px; margin: 0 0 4px } h2 { font-size: 17px; margin: 32px 0 8px; border-bottom: 1px solid #ddd }
.verdict { font-size: 16px; padding: 8px 12px; border-radius: 6px; display: inline-block }
.good { background: #dff0e2 } .bad { background: #f6dcda }
table { border-collapse: collapse; width: 100% } td { padding: 3px 8px; vertical-align: top; border-bottom: 1px solid #eee }
td.mark { white-space: nowrap; font-weight: 600 } .violation { color: #a11 } .unchecked { color: #9a6b00 } .ok { color: #2a7a3a }
.values { color: #666 } .fix { color: #134d8a } pre { background: #f6f6f6; padding: 10px; overflow-x: auto; font-size: 12px }
svg { max-width: 100%; height: auto; display: block }
"""


def as_html(done: Rehearsal) -> str:
    reading = done.reading
    grid, name = reading.grid, (reading.hf.source if reading.hf else "unknown model")
    head = (
        f"{grid.world} ranks: TP {grid.tp} x PP {grid.pp} x CP {grid.cp} x DP {grid.dp}, EP {grid.ep}"
        if grid
        else "layout not defined"
    )
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><title>Rehearsal</title>',
        f"<style>{STYLE}</style></head><body>",
        "<h1>Rehearsal</h1>",
        f"<p>{escape(name)}<br>{escape(head)}</p>",
        f'<p class="verdict {"good" if done.findings.launchable else "bad"}">{escape(verdict(done))}</p>',
    ]
    parts += _findings("Violations", done.findings.of("violation"))
    if done.memory:
        parts += ["<h2>Ranks</h2>", rank_grid(done)]
    if done.balance is not None and len(done.balance.sizes) > 1:
        parts += [
            "<h2>Stage balance</h2>",
            f"<p>Training FLOPs per token at sequences of {done.balance.length:,} tokens, output layer included.</p>",
            balance_bars(done.balance),
        ]
    if done.cost is not None:
        parts += ["<h2>One iteration</h2>", timeline(done.cost)]
    if done.weights is not None and done.weights.rows:
        parts += [
            "<h2>Weight flow</h2>",
            weight_flow(done),
            f"<p>Digest of the weight map: <code>{done.weights.digest}</code></p>",
        ]
    if done.memory:
        parts += ["<h2>Memory of a GPU, GB</h2>", memory_bars(done.memory, done.options.gpu_memory_gb)]
    parts += _findings("Not checked from here", done.findings.of("unchecked"))
    parts += _findings("Checked", done.findings.of("ok"))
    parts += ["<h2>As text</h2>", f"<pre>{escape(as_text(done))}</pre>", "</body></html>"]
    return "\n".join(parts) + "\n"


def _findings(title: str, items: list[Finding]) -> list[str]:
    if not items:
        return []
    rows = []
    for item in items:
        values = f' <span class="values">[{escape(item.values)}]</span>' if item.values else ""
        fix = f'<br><span class="fix">fix: {escape(item.fix)}</span>' if item.fix else ""
        rows.append(
            f'<tr><td class="mark {item.severity}">{item.severity}</td><td>{escape(item.area)}</td><td>{escape(item.what)}{values}{fix}</td></tr>'
        )
    return [f"<h2>{escape(title)} ({len(items)})</h2>", "<table>", *rows, "</table>"]
