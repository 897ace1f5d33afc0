"""Where weights go, as inline SVG: no script, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from itertools import groupby

from slime.engine.spec import EngineSpec
from slime.rehearse.report.bars import amount
from slime.rehearse.result import Rehearsal

WIDTH = 740
"""As wide as the page on a narrow screen, so that words keep their size."""
LEFT, MIDDLE, RIGHT = 190, (330, 450), 540
STAGE_HEIGHT, GROUP_HEIGHT = 40, 56


def weight_flow(done: Rehearsal) -> str:
    """Stages send, engines keep: in the middle, widths follow bytes. Engines of one kind are one box."""
    grid, weights = done.reading.grid, done.weights
    by_stage = [[0, 0] for _ in range(grid.pp)]
    for row in weights.rows:
        by_stage[row.stage][".mlp.experts." in row.name] += row.nbytes
    groups = _groups([engine for engine in done.engines.specs if engine.update_weights])
    height = 44 + max(STAGE_HEIGHT * grid.pp, GROUP_HEIGHT * len(groups), 120)
    top, flow = 34.0, (height - 60) / max(weights.nbytes, 1)
    body, point = [_text(0, 16, "trainer stages", soft=True)], top
    for stage, (rest, experts) in enumerate(by_stage):
        y = 30 + stage * (height - 44) / grid.pp
        sources = sum(1 for rank in weights.made_bytes if rank // grid.ranks_per_stage == stage)
        body.append(_box(0, y, LEFT, STAGE_HEIGHT - 6, f"dense {rest / 1e9:.2f} GB, experts {experts / 1e9:.2f} GB"))
        body.append(_text(8, y + 14, f"stage {stage}: {amount((rest + experts) / 1e9)} GB"))
        body.append(_text(8, y + 28, f"from {sources} {'rank' if sources == 1 else 'ranks'}", soft=True))
        thick = (rest + experts) * flow
        body.append(_ribbon((LEFT, y, STAGE_HEIGHT - 6), (MIDDLE[0], point, thick), "k0"))
        point += thick
    deep, centre = weights.nbytes * flow, sum(MIDDLE) / 2
    half = top + deep / 2
    body.append(_box(MIDDLE[0], top, MIDDLE[1] - MIDDLE[0], deep, f"digest {weights.digest}"))
    rounds = done.sync.carried_out.rounds if done.sync else 0
    for place, words in enumerate((f"{rounds:,} rounds", f"{amount(weights.nbytes / 1e9)} GB")):
        body.append(_text(centre, half - 2 + 18 * place, words, middle=True))
    body.append(_text(RIGHT, 16, "engines: what each rank serves", soft=True))
    per_gpu = done.cost.sync.lands_per_gpu if done.cost and done.cost.sync else 0
    for number, group in enumerate(groups):
        y = 30 + number * (height - 44) / len(groups)
        first = group[0]
        count = "" if len(group) == 1 else f"{len(group)} x "
        body.append(_ribbon((MIDDLE[1], half - 5, 10), (RIGHT, y + 17, 10), "k5"))
        body.append(_box(RIGHT, y, WIDTH - RIGHT, GROUP_HEIGHT - 12, ", ".join(engine.label for engine in group)))
        body.append(_text(RIGHT + 8, y + 17, f"{count}{first.role}, {first.num_gpus} GPU{'s' * (first.num_gpus > 1)}"))
        body.append(_text(RIGHT + 8, y + 34, f"EP {first.ep_size}, {amount(per_gpu / 1e9)} GB per GPU", soft=True))
    return _svg(WIDTH, int(height), body, "weight flow")


def _groups(engines: Iterable[EngineSpec]) -> list[list[EngineSpec]]:
    return [list(same) for _, same in groupby(engines, lambda one: (one.model, one.role, one.num_gpus, one.ep_size))]


def _svg(width: int, height: int, body: Iterable[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )


def _text(x: float, y: float, words: str, *, soft: bool = False, middle: bool = False) -> str:
    more = (' class="soft" font-size="11"' if soft else ' font-size="12"') + (' text-anchor="middle"' if middle else "")
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{escape(words)}</text>'


def _box(x: float, y: float, width: float, height: float, hint: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3" '
        f'style="fill:var(--inset);stroke:var(--line)"><title>{escape(hint)}</title></rect>'
    )


def _ribbon(left: tuple[float, float, float], right: tuple[float, float, float], colour: str) -> str:
    """From one upright edge (x, top, height) to another."""
    (x1, top1, height1), (x2, top2, height2) = left, right
    middle = (x1 + x2) / 2
    return (
        f'<path d="M{x1:.1f},{top1:.1f} C{middle:.1f},{top1:.1f} {middle:.1f},{top2:.1f} {x2:.1f},{top2:.1f} '
        f'v{height2:.1f} C{middle:.1f},{top2 + height2:.1f} {middle:.1f},{top1 + height1:.1f} {x1:.1f},{top1 + height1:.1f} z" '
        f'style="fill:var(--{colour})" fill-opacity="0.45"/>'
    )
