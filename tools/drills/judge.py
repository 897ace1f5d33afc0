"""From what was observed of a run after a fault to a verdict. Knows no processes and no clock, so any drill may ask it.

A run may survive a fault, or it ends: with a line that names the process and what happened to it, with a status that is not 0,
within a bound, with nothing left behind; and the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

ENDS_WITHIN = 300.0
"""Seconds from a fault to the end of a run that does not survive it."""

HAPPENED = re.compile(
    r"was killed|was ended by|exited with|exit(?:ed)?[ _]code|is stopped|stopped from outside|has ended|is gone|died|ended with"
    r"|does not answer|has not answered|did not answer|cannot be asked|MemoryError|bad_alloc|[Mm]emory (?:had|has) run out"
    r"|[Cc]annot allocate memory|out of memory|\bended(?:$|[,;:])|no process could be started|lasted|failed while",
)
"""Words for what can become of a process."""
# `07:41:20 [driver] ` and `07:41:20 ERROR slime.train: `: who speaks is not whom the line is about.
_SPEAKER = re.compile(r"^(?:\d\d:\d\d:\d\d )?(?:\[[\w .-]+\] |(?:DEBUG|INFO|WARNING|ERROR) [\w.]+: )?")

NAMES = {
    "launcher": r"the launcher|stopped from outside",
    "head": r"gcs_server|Ray's control process",
    "raylet": r"\braylet\b",
    "driver": r"\bthe (?:job's )?driver\b|stopped from outside",
    "rollout": r"\brollout \(pid|\brollout actor\b|\brollout failed while\b",
    "engine-actor": r"{label} cannot be asked|\b{label}(?:: its actor)? \(pid {pid}",
    "scheduler": r"engine {label}\b|(?:^|, ){label}(?:, \S+)* died\b",
    "router": r"\brouter\b",
    "trainer": r"trainer rank \d+ \(pid {pid}\b|trainer rank \d+ failed while\b",
    "writer": r"process that wrote|\bwriter\b",
    "nursery": r"\bgraders?\b",
    "grader": r"\bgraders?\b",
}
"""Process -> a pattern of how a run calls it; {pid} and {label} are the victim's."""


@dataclass(frozen=True)
class Line:
    at: float
    """Seconds, of the same clock as the fault."""
    text: str


@dataclass(frozen=True)
class Observed:
    """A run from a fault on."""

    process: str
    pid: int
    label: str
    """Of an engine ("default-decode-1"); "" where there is none."""
    fault_at: float
    lines: Sequence[Line]
    ended_at: float | None
    """None: it runs, and has gone on as if nothing had happened, or nothing at all came any more."""
    status: int | None
    went_on: bool
    """Work was done after the fault: rollouts, or all that there were."""
    left: Sequence[str]
    """What was there after its end and should not be: processes, files in shared memory, sockets, records of owners."""
    beside: tuple[str, int, str] | None = None
    """Process, pid and label of a second one with a fault of its own at the same moment: either may be named."""


@dataclass(frozen=True)
class Verdict:
    outcome: str
    """ "survived", "named", "unnamed" or "hung"."""
    cause: str
    """The first line that names the process and what happened; "" if none does."""
    seconds_to_cause: float | None
    seconds_to_end: float | None
    left: tuple[str, ...]
    faults: tuple[str, ...]
    """What is wrong; () for a run that did all it promises."""


def judge(seen: Observed) -> Verdict:
    """What became of the run. A survivor need not say anything; whoever ends must say why, and leave nothing."""
    told = named(seen)
    until = None if seen.ended_at is None else seen.ended_at - seen.fault_at
    survived = seen.went_on and seen.status in (None, 0)
    wrong: list[str] = []
    if survived:
        outcome = "survived"
    elif seen.ended_at is None or until > ENDS_WITHIN:
        outcome = "hung"
        wrong.append(f"neither went on nor ended within {ENDS_WITHIN:.0f} s")
    else:
        outcome = "named" if told else "unnamed"
        if not told:
            wrong.append(f"no line names {seen.process} and what happened to it")
        if seen.status == 0:
            wrong.append("ended with status 0 and work undone")
    if seen.left:
        wrong.append(f"left behind: {', '.join(seen.left)}")
    at = None if told is None else max(0.0, told.at - seen.fault_at)
    return Verdict(outcome, "" if told is None else told.text, at, until, tuple(seen.left), tuple(wrong))


def named(seen: Observed) -> Line | None:
    """The first line after the fault with a victim's name and what became of it."""
    victims = [(seen.process, seen.pid, seen.label), *([] if seen.beside is None else [seen.beside])]
    name = re.compile("|".join(_called(*victim) for victim in victims))
    for line in seen.lines:
        said = _SPEAKER.sub("", line.text)
        if line.at >= seen.fault_at and name.search(said) and HAPPENED.search(said):
            return line
    return None


def _called(process: str, pid: int, label: str) -> str:
    """A pattern."""
    engine = re.escape(label) if label else r"default-\S+"
    return rf"{NAMES[process].format(pid=pid, label=engine)}|\bits process {pid}\b"
