"""Processes that the kernel has killed because memory had run out: its log names them, and it counts them per container.

python3 -m slime.observability.memory_kills SECONDS        a clause about those of the last SECONDS, or nothing
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

BY_THE_KERNEL = " by the kernel, because memory had run out"
_GROUPS = Path("/sys/fs/cgroup")
_KILLED = re.compile(r"^\d+,\d+,(\d+),[^;]*;.*\bKilled process (\d+) \((.*?)\)", re.MULTILINE)
"""A record of /dev/kmsg: microseconds since boot, pid, name."""


def killed_for_memory(pids: Iterable[int], *, since: float) -> dict[int, str]:
    """Pid -> the kernel's name for it, of those that were; none where its log may not be read.

    since: seconds of time.monotonic(), when these processes began: earlier ones had the same numbers.
    """
    named = {pid: name for pid, name in _kills(since)}
    return {pid: named[pid] for pid in pids if pid in named}


def killed_lately(seconds: float) -> str:
    """Of whichever there were on this machine: "; meanwhile the kernel has killed 4242 (python), ..."; "" where none."""
    killed = [f"{pid} ({name})" for pid, name in _kills(time.monotonic() - seconds)]
    return f"; meanwhile the kernel has killed {', '.join(killed)} here, because memory had run out" if killed else ""


def _kills(since: float) -> list[tuple[int, str]]:
    return [(int(pid), name) for at, pid, name in _KILLED.findall(_kernel_log()) if int(at) >= since * 1e6]


def count_in_container() -> int:
    """How many so far, of the container that this process is in; 0 where nobody counts."""
    own = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/")
    for folder in (_GROUPS / own, _GROUPS):
        try:
            events = dict(line.split() for line in (folder / "memory.events").read_text().splitlines())
        except OSError:
            continue
        return int(events.get("oom_kill", 0))
    return 0


def _kernel_log() -> str:
    """Empty where it may not be read."""
    lines: list[str] = []
    try:
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        while True:
            try:
                lines.append(os.read(log, 8192).decode(errors="replace"))
            except BrokenPipeError:  # overwritten meanwhile: reading goes on behind the gap
                continue
    except OSError:  # EAGAIN: its end
        return "".join(lines)
    finally:
        os.close(log)


if __name__ == "__main__":
    sys.stdout.write(killed_lately(float(sys.argv[1])))
