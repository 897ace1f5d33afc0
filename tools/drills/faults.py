"""What is done to a process, and how it is undone."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path

_ROOM_BYTES = 1 << 20


def inflict(fault: str, pid: int, *, stop_seconds: float) -> Callable[[], None]:
    """Do it now. What is returned undoes what of it lasts; it may be called when the process has gone."""
    if fault == "kill":
        os.kill(pid, signal.SIGKILL)
    elif fault == "term":
        os.kill(pid, signal.SIGTERM)
    elif fault == "stop":
        os.kill(pid, signal.SIGSTOP)
        later = threading.Timer(stop_seconds, _quietly, [lambda: os.kill(pid, signal.SIGCONT)])
        later.daemon = True
        later.start()
        return later.cancel
    elif fault == "memory":
        size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = before = resource.prlimit(pid, resource.RLIMIT_AS)  # a grader has a hard limit, which only grows by privilege
        room = size + _ROOM_BYTES if hard == resource.RLIM_INFINITY else min(size + _ROOM_BYTES, hard)
        resource.prlimit(pid, resource.RLIMIT_AS, (room, hard))
        return lambda: _quietly(lambda: resource.prlimit(pid, resource.RLIMIT_AS, before))
    else:
        raise ValueError(f"no fault {fault!r}")
    return lambda: None


def _quietly(do: Callable[[], object]) -> None:
    try:
        do()
    except ProcessLookupError:
        pass
