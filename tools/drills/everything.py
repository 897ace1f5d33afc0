"""Everything that a cluster in a box shows: launches in each layout, each node that does not fit, and every drill.

Each part is a command of its own, so that one which fails holds no other up. It takes hours (tools/box_drill.py all).
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools import box_fitness, box_layouts
from tools.box_drill import FAULTS, read, table
from tools.drills.draw import PHASES

_TOOLS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Part:
    what: str
    command: tuple[str, ...]
    drills: Path | None = None
    """The folder that it writes drills into."""

    def __str__(self) -> str:
        return f"{self.what}: {' '.join(self.command)}"


@dataclass(frozen=True)
class Done:
    part: Part
    status: int
    seconds: float


def parts(folder: Path) -> list[Part]:
    """What is run, in order."""
    found = [_part(f"layout {name}", "box_layouts.py", folder / "layouts", name) for name in box_layouts.LAYOUTS]
    found += [_part(f"misfit {name}", "box_fitness.py", name) for name in box_fitness.MISFITS]
    for nodes in sorted({fault.num_nodes for fault in FAULTS.values()}):
        where = folder / f"drills-{nodes}"
        names = [f"{name}/{phase}" for name, fault in FAULTS.items() if fault.num_nodes == nodes for phase in PHASES]
        found.append(_part(f"{len(names)} drills of {nodes} nodes", "box_drill.py", "run", where, *names, drills=where))
        found.append(_part(f"the launch after them, of {nodes} nodes", "box_drill.py", "run", where, "--nodes", nodes))
    return found


def _part(what: str, tool: str, *words: object, drills: Path | None = None) -> Part:
    return Part(what, (sys.executable, str(_TOOLS / tool), *map(str, words)), drills)


def run(wanted: Sequence[Part]) -> int:
    """One after another, then the tables; 1 where one failed."""
    done = []
    for part in wanted:
        sys.stdout.write(f"--- {part.what}\n")
        sys.stdout.flush()
        began = time.monotonic()
        status = subprocess.run(part.command).returncode
        done.append(Done(part, status, time.monotonic() - began))
    sys.stdout.write("\n".join(["", summary(done), *(table(read(one.drills)) for one in wanted if one.drills is not None)]))
    return 1 if any(one.status for one in done) else 0


def summary(done: Sequence[Done]) -> str:
    lines = ["| part | outcome | minutes |", "|---|---|---|"]
    for one in done:
        outcome = "as wanted" if one.status == 0 else f"failed (status {one.status})"
        lines.append(f"| {one.part.what} | {outcome} | {one.seconds / 60:.1f} |")
    return "\n".join([*lines, ""])
