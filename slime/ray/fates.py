"""What became of the process behind an actor, as its own node sees it: Ray says only that the connection has ended."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from slime.observability.memory_kills import BY_THE_KERNEL, count_in_container, killed_for_memory
from slime.ray import witness
from slime.ray.keeper import keep
from slime.ray.machines import alive_nodes, lost_nodes

logger = logging.getLogger(__name__)

# A look needs a worker process on that node, which a busy machine starts in some seconds.
_LOOK_SECONDS = 30.0
# A keeper writes its note within milliseconds of the end.
_NOTE_SECONDS = 2.0
_SAID = 400
_STOPPED = "is stopped (SIGSTOP, or a debugger; kill -CONT {} there lets it go on)"


@dataclass(frozen=True)
class Process:
    node_ip: str
    pid: int
    born: int | None = None
    """Clock ticks since boot, which tell it from a later process of the same number; None: any of that number."""

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.node_ip}"


def this_process(*, world: str = "") -> Process:
    """For actors: who this is. From now on a keeper watches how it ends, and a witness tells where it is.

    world: as of `stand`.
    """
    note = _note(os.getpid())
    if not note.parent.exists():
        note.parent.mkdir(mode=0o700, exist_ok=True)
    keep(os.getpid(), str(note))
    witness.stand(witness_path(os.getpid()), world=world)
    return Process(ray.util.get_node_ip_address(), os.getpid(), _stat(os.getpid())[-1])


def _note(pid: int) -> Path:
    """Where the keeper of a process of this node writes: in Ray's own folder, which goes when the cluster goes."""
    return Path(ray._private.worker._global_node.get_session_dir_path()) / "fates" / str(pid)


def witness_path(pid: int) -> Path:
    """Where a process of this node can be asked where it is (slime.ray.witness)."""
    return _note(pid).with_name(f"{pid}.sock")


def process_in(error: Exception) -> Process | None:
    """The one that an ActorDiedError names in its text."""
    found = {name: re.search(rf"^\s*{name}: (\S+)$", str(error), re.MULTILINE) for name in ("pid", "ip")}
    return Process(found["ip"][1], int(found["pid"][1])) if all(found.values()) else None


def death(error: Exception, process: Process | None) -> str:
    """A clause for an actor of which Ray says that it is gone: by the fate of its process where that can be read."""
    said = " ".join(str(error).split())  # long names and ids come first, what happened last
    if "low on memory" in said:
        return f"was killed by Ray's memory monitor: {said[:_SAID]}"
    if "receives a SIGTERM" in said:  # Ray's own handler then leaves with 1, which says less
        return "was ended by a SIGTERM that somebody sent"
    fate = fates({"": process})[""] if process is not None else None
    return fate if fate not in (None, "is gone") else f"died ({type(error).__name__}: {said[:_SAID]})"


def fates(processes: Mapping[str, Process]) -> dict[str, str | None]:
    """name -> a clause ("was killed by signal 9 (SIGKILL)", "is stopped", ...); None for a process that runs, or where looking
    fails: whoever asks has an error of his own to tell."""
    try:
        return _fates(processes)
    except Exception as error:
        logger.warning("cannot see what became of %s: %s: %s", ", ".join(processes), type(error).__name__, error)
        return dict.fromkeys(processes)


def _fates(processes: Mapping[str, Process]) -> dict[str, str | None]:
    gone = set(lost_nodes({process.node_ip for process in processes.values()}))
    alive = {address: node["NodeID"] for address, node in alive_nodes().items()}
    found: dict[str, str | None] = {
        name: f"was on node {process.node_ip}, which is gone" for name, process in processes.items() if process.node_ip in gone
    }
    looks = {
        _read_fate.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=alive[process.node_ip], soft=False)
        ).remote(process): name
        for name, process in processes.items()
        if name not in found
    }
    done, late = ray.wait(list(looks), num_returns=len(looks), timeout=_LOOK_SECONDS) if looks else ([], [])
    for look in done:
        try:
            found[looks[look]] = ray.get(look)
        except ray.exceptions.RayError as error:
            found[looks[look]] = f"cannot be looked at ({type(error).__name__})"
    found |= {looks[look]: f"is on node {processes[looks[look]].node_ip}, which does not answer" for look in late}
    return {name: found[name] for name in processes}


def end(processes: Mapping[str, Process]) -> None:
    """SIGKILL to those that are still there: a stopped process does not hear Ray's request to leave."""
    gone = set(lost_nodes({process.node_ip for process in processes.values()}))
    alive = {address: node["NodeID"] for address, node in alive_nodes().items() if address not in gone}
    kills = [
        _kill.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=alive[process.node_ip], soft=False)).remote(
            process
        )
        for process in processes.values()
        if process.node_ip in alive
    ]
    if kills:
        ray.wait(kills, num_returns=len(kills), timeout=_LOOK_SECONDS)


def until_gone(processes: Mapping[str, Process], seconds: float = 60.0) -> None:
    """Wait for processes that were ended; a warning names those that are still there."""
    deadline, left = time.monotonic() + seconds, dict(processes)
    while left := {name: processes[name] for name, fate in fates(left).items() if fate is None}:
        if time.monotonic() > deadline:
            logger.warning("%s have not ended within %.0f s", ", ".join(left), seconds)
            return
        time.sleep(0.2)


@ray.remote(num_cpus=0, max_retries=0)
def _kill(process: Process) -> None:
    stat = _stat(process.pid)
    if stat is not None and stat[-1] == process.born:
        os.kill(process.pid, signal.SIGKILL)


@ray.remote(num_cpus=0, max_retries=0)
def _read_fate(process: Process) -> str | None:
    return read_fate(process)


def read_fate(process: Process) -> str | None:
    """On the process's own node."""
    stat, since = _stat(process.pid), (process.born or 0) / os.sysconf("SC_CLK_TCK")
    if stat is None or (process.born is not None and stat[-1] != process.born):
        return _read_note(process.pid, since)
    state, status, _ = stat
    if state in "tT":
        return _STOPPED.format(process.pid)
    return _how(process.pid, status, since) if state in "ZX" else None


def _read_note(pid: int, since: float) -> str:
    note, deadline = _note(pid) if ray.is_initialized() else None, time.monotonic() + _NOTE_SECONDS
    while note is not None and time.monotonic() < deadline:
        if note.exists():
            return _how(pid, int(note.read_text()), since)
        time.sleep(0.05)
    # An actor that is being made has no keeper yet.
    return f"was killed{BY_THE_KERNEL}" if killed_for_memory([pid], since=since) else "is gone"


def stopped(pid: int) -> str | None:
    """A clause for a process of this machine that is stopped; None for any other."""
    stat = _stat(pid)
    return _STOPPED.format(pid) if stat is not None and stat[0] in "tT" else None


def stopped_below(pid: int) -> list[str]:
    """On the process's own node: a clause for each of its descendants that is stopped. Nobody else sees that, and whoever waits
    for one waits on: a server for its scheduler, a rank for the writer of its checkpoint."""
    parents, states = {}, {}
    for entry in Path("/proc").iterdir():
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2] if entry.name.isdigit() else ("", "")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent:
            parents[int(entry.name)], states[int(entry.name)] = int(parent), state
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return [f"its process {one} ({_title(one)}) {_STOPPED.format(one)}" for one in sorted(below - {pid}) if states[one] in "tT"]


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    except OSError:
        return "?"


def _how(pid: int, status: int, since: float) -> str:
    """status: as wait(2) gives it. since: its birth, in seconds since the machine's."""
    if number := status & 0x7F:
        how = f"was killed by signal {number} ({signal.Signals(number).name})"
        return how + (_who_killed(pid, since) if number == signal.SIGKILL else "")
    return f"exited with {status >> 8}"


def _stat(pid: int) -> tuple[str, int, int] | None:
    """(state, exit status as wait(2) gives it, birth) from /proc/PID/stat; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[49]), int(fields[19])


def _who_killed(pid: int, since: float) -> str:
    """What the kernel says of a SIGKILL."""
    if killed_for_memory([pid], since=since):
        return BY_THE_KERNEL
    if count := count_in_container():
        return f"; memory is the likely reason, the kernel has killed {count} processes of this container for it"
    return "; somebody sent it, or the kernel for want of memory (dmesg on that node tells)"
