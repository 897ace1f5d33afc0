"""The last word on a run whose head is gone with launcher and driver: a node that is left writes it into the run's logs.

    python3 -m slime.ray.head_lost ADDRESS LOGS        (started by scripts/lib/keeper.sh, on the other nodes)

LOGS/.launched is there while nobody has ended the launch, and goes with the word: of many nodes one speaks.
"""

from __future__ import annotations

import argparse
import re
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from slime.ray.phases import RESUMES, phase_of

_WAITS = re.compile(r"slime\.ray\.standstill: waits for: (.*)$", re.MULTILINE)
_LAST_BYTES = 1 << 20


def last_word(address: str, logs: Path, *, launched: float) -> str:
    """One line: the node, what the run was doing, what to do. launched: when LOGS/.launched was written, by the clock that the
    driver's log has, whatever this node's says; a log that is older is of a run before."""
    log = logs / "driver.log"
    waits = _WAITS.findall(_end_of(log)) if log.exists() and log.stat().st_mtime >= launched else []
    return (
        f"node {address} is gone or out of reach, and with it Ray's head, {phase_of(waits[-1] if waits else '')}: bring it "
        f"back or replace it, and run the same command again; {RESUMES}"
    )


def _end_of(file: Path) -> str:
    with file.open("rb") as text:
        text.seek(max(0, file.stat().st_size - _LAST_BYTES))
        return text.read().decode(errors="replace")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m slime.ray.head_lost", description="Tell that the head is gone.")
    parser.add_argument("address", help="of the head's node")
    parser.add_argument("logs", type=Path, help="the run's folder of logs")
    given = parser.parse_args(argv)
    try:
        launched = (given.logs / ".launched").stat().st_mtime
        (given.logs / ".launched").unlink()
    except OSError:  # another node was first, or nobody can write there
        return 0
    word = last_word(given.address, given.logs, launched=launched)
    with (given.logs / "console.log").open("a") as log:
        log.write(f"{time.strftime('%H:%M:%S')} [{socket.gethostname()}] {word}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
