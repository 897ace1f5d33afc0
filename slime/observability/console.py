"""What a person reads of a job: its own lines, without those of Ray's client. Everything goes to a file.

ray job submit ... 2>&1 | python3 -m slime.observability.console --log FILE
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

from slime.observability.memory_kills import killed_lately

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RAY_LINE = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\t(?P<level>\w+) (?P<file>\w+)\.py:\d+ -- (?P<text>.*)")
_CLIENT = frozenset({"cli", "sdk", "job_manager"})
_ACTOR = re.compile(r"^\(\w+ pid=\d+(?:, ip=[^)]*)?\) (?=\d\d:\d\d:\d\d \[)")
"""The address of an actor before a line of ours, which says who speaks; indented lines that go on with it have it too."""
_TRACEBACK = "Traceback (most recent call last):"
_CLIENT_FRAME = re.compile(r'^  File "[^"]*/bin/ray", line ')
"""The client lost its cluster: why is the launcher's to say."""
_REPEATED = re.compile(r"Status message: Job entrypoint command failed with exit code (-?\d+)")


def readable(lines: Iterable[str], kills: Callable[[], str] = lambda: "") -> Iterator[str]:
    """The lines that are for a person, without colours and without the addresses of actors that name themselves.

    Ray's client announces a job in 17 lines, and repeats the end of its output when it fails: that has been read by then.
    kills: a clause about processes that the kernel has killed meanwhile, for a driver that was killed so itself.
    """
    held = speaker = ""
    for raw in lines:
        line = _COLOUR.sub("", raw.rstrip("\n"))
        if held:
            if _CLIENT_FRAME.match(line):
                return
            yield held
            held = ""
        if line == _TRACEBACK:
            held = line
            continue
        if line.startswith("Running entrypoint for job "):
            continue
        found = _RAY_LINE.match(line)
        if failed := _REPEATED.match(found["text"] if found else line):
            if killed := _signal_of(int(failed[1])):
                how = f"killed by signal {killed} ({signal.Signals(killed).name})"
                yield f"the job's driver (python -m slime.train) was {how}{kills() if killed == signal.SIGKILL else ''}"
            return
        if not found or found["file"] not in _CLIENT:
            if ours := _ACTOR.match(line):
                speaker = ours[0]
            yield line.removeprefix(speaker) if ours or line.startswith(speaker + " ") else line
        elif found["level"] not in ("INFO", "SUCC") and not _is_frame(found["text"]):
            yield found["text"]
    if held:
        yield held


def _signal_of(status: int) -> int | None:
    """Which one ended the driver, so that it could not say anything itself; None where it left by a status of its own.

    Ray starts it through a shell, which gives 128 more; 143 is also what a driver leaves with that heard SIGTERM and said so.
    """
    number = -status if status < 0 else status - 128
    return number if number in set(signal.Signals) and number != signal.SIGTERM else None


def _is_frame(text: str) -> bool:
    """A ruler, or the sentence between two, which the launcher's status says as well."""
    return not text.strip("-") or bool(re.fullmatch(r"Job '.*' (failed|was stopped)", text))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m slime.observability.console", description="Reads standard input.")
    parser.add_argument("--log", required=True, help="file that gets every line as it is")
    words = parser.parse_args(argv)
    # Ctrl-C is for the launcher, whose job says more before it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.reconfigure(errors="replace")
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    log = None
    try:
        Path(words.log).parent.mkdir(parents=True, exist_ok=True)
        log = Path(words.log).open("a", buffering=1, errors="replace")
    except OSError as error:
        sys.stderr.write(f"the job's output is not kept: {words.log}: {error.strerror}\n")
    lines = _kept(sys.stdin, log)
    began = time.monotonic()
    for line in readable(lines, lambda: killed_lately(time.monotonic() - began)):
        sys.stdout.write(line + "\n")
    for _ in lines:  # what repeats goes to the file alone
        pass
    return 0


def _kept(lines: Iterable[str], log: TextIO | None) -> Iterator[str]:
    for line in lines:
        if log is not None:
            try:
                log.write(line)
            except OSError:  # a full disk ends no run
                log = None
        yield line


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
