"""What is done to a process, and how it is undone."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

_ROOM_BYTES = 1 << 20
_GROUP_BYTES = 0
_GROUP_SECONDS = 10.0
_GROUPS = Path("/sys/fs/cgroup")


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
    elif fault == "oom":
        return _confine(pid)
    else:
        raise ValueError(f"no fault {fault!r}")
    return lambda: None


def memory_groups() -> Path | None:
    """Where this user may make groups of processes whose memory the kernel limits (cgroups, 1 or 2); None: nowhere."""
    one, two = _GROUPS / "memory", _GROUPS / "cgroup.subtree_control"
    folder = one if one.is_dir() else _GROUPS if two.is_file() and "memory" in two.read_text().split() else None
    return folder if folder is not None and os.access(folder, os.W_OK) else None


def _confine(pid: int) -> Callable[[], None]:
    """What it and its later children take from now on is limited: whoever takes more is killed by the kernel."""
    folder = memory_groups()
    if folder is None:
        raise ValueError("no fault 'oom' here: it needs root, and cgroups with a memory controller")
    group = folder / f"slime-drill-{uuid.uuid4().hex[:8]}"
    group.mkdir()
    limit = next(group / name for name in ("memory.limit_in_bytes", "memory.max") if (group / name).exists())

    def undo() -> None:
        for one in (group / "cgroup.procs").read_text().split():
            _quietly(lambda one=one: (folder / "cgroup.procs").write_text(one))
        deadline = time.monotonic() + _GROUP_SECONDS
        while True:
            try:
                return group.rmdir()
            except OSError:  # somebody in it is not gone yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    try:
        limit.write_text(str(_GROUP_BYTES))
        (group / "cgroup.procs").write_text(str(pid))
    except OSError:
        undo()
        raise
    return undo


def _quietly(do: Callable[[], object]) -> None:
    try:
        do()
    except ProcessLookupError:
        pass
