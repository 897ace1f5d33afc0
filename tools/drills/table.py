"""Verdicts of many drills as markdown: counts, the longest times, and a row for each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """A drill and its verdict, as in a line of the results file."""

    seed: int
    number: int
    process: str
    fault: str
    phase: str
    tolerant: bool
    outcome: str
    cause: str
    seconds_to_cause: float | None
    seconds_to_end: float | None
    left: Sequence[str]
    faults: Sequence[str]
    resumed: bool | None
    """The next launch began with the rollout behind the newest checkpoint; None: it survived, or nothing followed yet."""
    exact: bool | None
    """The checkpoint behind it was that of the undisturbed run, to the bit; None: there was none yet."""
    revision: str = ""
    """Of the project, when the drill was made."""
    hit: str = ""
    """The phase in which the fault came: a drawn one may be over by then."""
    engines: bool = True
    """False for a run on recorded rollouts that starts none."""
    flags: str = ""
    """That the launch had besides, e.g. "--snapshot-interval 1"."""
    second: str = ""
    """What befell another process at the same moment, e.g. "stop of router"."""


def read(file: Path) -> list[Row]:
    """The last verdict of each drill: one that was made again counts once."""
    rows: dict[tuple[bool, int, int, str, str], Row] = {}
    for line in file.read_text().splitlines():
        row = Row(**json.loads(line))
        rows[not row.engines, row.seed, row.number, row.flags, row.second] = row
    return [rows[key] for key in sorted(rows)]


def counts(rows: Sequence[Row]) -> dict[str, int]:
    tally = {"drawn": len(rows)}
    for outcome in ("survived", "named", "unnamed", "hung"):
        tally[outcome] = sum(row.outcome == outcome for row in rows)
    tally["leaked"] = sum(bool(row.left) for row in rows)
    tally["not resumed"] = sum(row.resumed is False for row in rows)
    tally["not equal"] = sum(row.exact is False for row in rows)
    return tally


def markdown(rows: Sequence[Row]) -> str:
    tally = counts(rows)
    head = _table([tuple(tally), tuple(map(str, tally.values()))])
    lines = [head, "", *_longest(rows), ""]
    told = [("drill", "fault", "process", "phase", "ft", "outcome", "cause after", "end after", "resumed", "equal", "left")]
    for row in rows:
        told.append((
            _number(row), row.fault, f"{row.process}{row.second and f', {row.second}'}", row.hit or row.phase,
            "yes" if row.tolerant else "no", row.outcome,
            _seconds(row.seconds_to_cause), _seconds(None if row.outcome == "survived" else row.seconds_to_end),
            _yes(row.resumed), _yes(row.exact),
            ", ".join(row.left) or "-",
        ))  # fmt: skip
    starred = [] if all(row.engines for row in rows) else ["", "\\* without engines, on recorded rollouts"]
    return "\n".join([*lines, _table(told), *starred]) + "\n"


def _longest(rows: Sequence[Row]) -> Iterable[str]:
    for title, field in (("named cause", "seconds_to_cause"), ("end of the run", "seconds_to_end")):
        ended = [row for row in rows if getattr(row, field) is not None and row.outcome != "survived"]
        if ended:
            row = max(ended, key=lambda one: getattr(one, field))
            what = f"{row.fault} of {row.process} in {row.phase}"
            yield f"Longest time from a fault to the {title}: {getattr(row, field):.0f} s ({row.seed}/{row.number}, {what})."


def _number(row: Row) -> str:
    return f"{row.seed}/{row.number}{'' if row.engines else ' *'}{f' `{row.flags}`' if row.flags else ''}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} s"


def _yes(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "**no**"


def _table(rows: Sequence[Sequence[str]]) -> str:
    first, *others = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (first, ["---"] * len(first), *others))
