"""How the page looks: light, dark and on paper, between a phone's width and a wide screen. Nothing is loaded from anywhere."""

from __future__ import annotations

KINDS: dict[str, tuple[str, ...]] = {
    "weights": ("weights", "sleeping weights"),
    "gradients": ("gradients", "float32 gradients"),
    "optimizer": (
        "optimizer",
        "optimizer on GPU",
        "optimizer and copies for the disk",
        "snapshots of the ranks there",
        "snapshots of another node's ranks",
    ),
    "activations": (),
    "on the way": (
        "bucket, as trained and on the wire",
        "one layer being read",
        "weights copied",
        "staging of one shard",
        "gathered parameters",
    ),
    "engine weights": ("engine weights", "draft weights", "engines' draft weights"),
    "KV cache": ("KV cache",),
    "overhead": (
        "overhead",
        "process",
        "libraries in use",
        "engine overhead",
        "sleeping trainer",
        "sleeping engine",
        "DeepEP buffers",
    ),
}
"""What a colour stands for -> the parts of the memory model; every part that is named nowhere is an activation."""

_KIND_OF = {part: kind for kind, parts in KINDS.items() for part in parts}


def kind_of(part: str) -> str:
    return _KIND_OF.get(part, "activations")


def colour_class(kind: str) -> str:
    return f"k{list(KINDS).index(kind)}"


# Blues are the trainer's, greens the engines', what moves is violet, what is worked on orange.
_LIGHT = ("#1f5a96", "#5b92c9", "#a9c7e6", "#d9893b", "#8568ad", "#2f8559", "#8cc4a0", "#a3a8ae")
_DARK = ("#4d8fd1", "#7fb0e0", "#33597f", "#d9893b", "#9c82c4", "#3d9a6b", "#255f43", "#6d737a")

_LIGHT_PAGE = {
    "ink": "#1f2328",
    "soft": "#59636e",
    "line": "#d8dee4",
    "paper": "#ffffff",
    "inset": "#f3f5f7",
    "bad": "#b3261e",
    "badpaper": "#fbe6e4",
    "open": "#8a5a00",
    "openpaper": "#fdf1d6",
    "good": "#1f7a3f",
    "goodpaper": "#e0f3e5",
    "link": "#0b57a4",
}
_DARK_PAGE = {
    "ink": "#e3e7ec",
    "soft": "#9aa4af",
    "line": "#343b44",
    "paper": "#14181d",
    "inset": "#20262d",
    "bad": "#ff8f85",
    "badpaper": "#48201d",
    "open": "#f0bc5e",
    "openpaper": "#43330f",
    "good": "#74cf8f",
    "goodpaper": "#173a23",
    "link": "#7db8f5",
}


def _variables(page: dict[str, str], kinds: tuple[str, ...]) -> str:
    named = page | {f"k{number}": colour for number, colour in enumerate(kinds)}
    return ":root { " + "; ".join(f"--{name}: {value}" for name, value in named.items()) + " }"


STYLE = (
    f"""
{_variables(_LIGHT_PAGE, _LIGHT)}
@media screen and (prefers-color-scheme: dark) {{ {_variables(_DARK_PAGE, _DARK)} }}
:root {{ color-scheme: light dark }}
{" ".join(f".k{number} {{ background: var(--k{number}) }}" for number in range(len(KINDS)))}
"""
    + """
* { box-sizing: border-box; print-color-adjust: exact; -webkit-print-color-adjust: exact }
body { font: 14px/1.45 system-ui, "DejaVu Sans", sans-serif; color: var(--ink); background: var(--paper);
  margin: 24px auto; max-width: 1080px; padding: 0 20px; overflow-wrap: anywhere }
h1 { font-size: 22px; margin: 0 0 4px }
h2 { font-size: 17px; margin: 32px 0 8px; border-bottom: 1px solid var(--line) }
h3 { font-size: 14px; margin: 14px 0 2px }
p { margin: 6px 0; max-width: 80ch }
.note { max-width: none }
.verdict { padding: 10px 14px; border-radius: 6px; margin: 12px 0; max-width: none }
.verdict strong { font-size: 18px; display: block }
.good { background: var(--goodpaper); color: var(--good) }
.bad { background: var(--badpaper); color: var(--bad) }
.open { background: var(--openpaper); color: var(--open) }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 12px 0 }
.tile { flex: 1 1 190px; background: var(--inset); border-radius: 6px; padding: 8px 12px }
.tile strong { display: block; font-size: 17px } .tile, .note, .values { color: var(--soft) } .tile strong { color: var(--ink) }
table { border-collapse: collapse; width: 100% }
td, th { padding: 3px 8px; vertical-align: top; border-bottom: 1px solid var(--line); text-align: left }
table.numbers { width: auto }
table.numbers td, table.numbers th { text-align: right; font-variant-numeric: tabular-nums; padding: 2px 10px }
th { font-weight: 600; color: var(--soft) } td.off { color: var(--bad); font-weight: 600 }
table.findings td:nth-child(-n+2), table.phases td:nth-child(-n+2) { white-space: nowrap; width: 1% }
td.violation { color: var(--bad); font-weight: 600 } td.unproven { color: var(--open); font-weight: 600 }
td.unchecked { color: var(--open) } td.ok { color: var(--good) }
.fix { color: var(--link) } code { overflow-wrap: anywhere }
pre { background: var(--inset); padding: 10px; font-size: 12px; white-space: pre-wrap }
summary { cursor: pointer; font-size: 17px; font-weight: bold; margin: 32px 0 8px }
.row { display: flex; align-items: center; gap: 8px; margin: 2px 0; font-size: 12px; break-inside: avoid }
.row .name { flex: 0 0 132px; color: var(--soft); line-height: 1.2 }
.row .track { flex: 1 1 auto; min-width: 0; position: relative; display: flex; height: 13px; background: var(--inset) }
.row .track i { display: block; height: 100% }
.row .track .mark { position: absolute; top: -2px; bottom: -2px; height: auto; width: 2px; background: var(--bad) }
.row .value { flex: 0 0 118px; font-variant-numeric: tabular-nums; line-height: 1.2 }
.row.wide .name { flex-basis: 150px } .row.wide .value { flex-basis: 150px } .ranks .row.wide .name { flex-basis: 200px }
.over { color: var(--bad); font-weight: 600 } .over::after { content: ", too much" }
.ranks .track { height: 20px; gap: 1px; background: none } .ranks .track i { flex: 1 1 0; min-width: 0 }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 8px 0; font-size: 12px }
.swatch { display: inline-block; width: 11px; height: 11px; margin-right: 5px; vertical-align: -1px }
.limit { background: var(--bad) }
svg { max-width: 100%; height: auto; display: block; margin: 6px 0 } svg text { fill: var(--ink) }
svg .soft { fill: var(--soft) }
@media print {
  body { margin: 0; max-width: none } tr, svg { break-inside: avoid } h2, h3 { break-after: avoid }
}
"""
)
