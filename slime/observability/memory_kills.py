"""Processes that the kernel has killed because memory had run out: its log names them, and it counts them per container."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

BY_THE_KERNEL = " by the kernel, because memory had run out"
_GROUPS = Path("/sys/fs/cgroup")


def killed_for_memory(pids: Iterable[int]) -> dict[int, str]:
    """Pid -> the kernel's name for it, of those that were; none where its log may not be read."""
    named = dict(re.findall(r"Killed process (\d+) \((.*?)\)", _kernel_log()))
    return {pid: named[str(pid)] for pid in pids if str(pid) in named}


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
