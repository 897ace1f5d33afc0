"""Who works in a folder: one run at a time, named, so that a second one is refused before it overwrites anything.

A folder's owner is a small file in it, `.slime-owner`: pid, host, start, command, and the launch that the process belongs to.
It is put there whole or not at all, and goes with its run. A record whose run is gone does not count: on the same machine the
process must live (or another one of its launch), from another machine the record must have been touched lately. Clocks of two
machines may differ: where the record's time says that nobody touches it any more, it is watched before that is believed.

    with owned("/data/checkpoints", what="--save"): ...                              a Python program
    python3 -m slime.observability.owner take FOLDER --what NAME --pid PID            a launcher; `release` gives it back
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

RECORD = ".slime-owner"
LAUNCH_VARIABLE = "SLIME_LAUNCH"
"""In the environment of every process that a launcher starts: whose it is."""
TOUCH_SECONDS = 30.0
STALE_SECONDS = 180.0
"""A record from another machine that was not touched for so long is of a run that ended without a word."""
WATCH_SECONDS = 45.0
"""Within which a run that lives has touched its record."""
_CLOCK_SECONDS = 5.0
"""Between a clock that agrees and one that does not."""


@dataclass(frozen=True)
class Record:
    launch: str
    pid: int
    ticks: int
    """Start of the process in the kernel's clock: a process number is used again."""
    host: str
    machine: str
    """Boot and process namespace: where a process number means something."""
    since: str
    command: str

    def told(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since}: {self.command}"


class Owned(ValueError):
    """The folder belongs to a run that lives; the message names it."""


def this_process(pid: int | None = None) -> Record:
    """The record of a process of this machine (None: this one)."""
    pid = pid or os.getpid()
    return Record(
        launch=os.environ.get(LAUNCH_VARIABLE) or uuid.uuid4().hex,
        pid=pid,
        ticks=_ticks(pid) or 0,
        host=socket.gethostname(),
        machine=_machine(),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        command=_command(pid),
    )


def take(folder: str | Path, mine: Record, *, what: str) -> None:
    """Make the folder ours. Raises Owned if a living run has it; a folder that our own launch has is shared with it."""
    folder = Path(folder)
    file, part = folder / RECORD, folder / f"{RECORD}.{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(asdict(mine)) + "\n")
    except OSError as error:
        raise ValueError(f"{what} {folder} cannot be written ({error.strerror}); name a folder of your own") from None
    try:
        while True:
            if _put(part, file):
                return
            holder = read(file)
            if holder is not None and holder.launch == mine.launch:
                return
            if why := _lives(holder, file, probe=part):
                raise Owned(_refusal(what, folder, holder, why))
            _put_aside(file, holder)
    finally:
        part.unlink(missing_ok=True)


def release(folder: str | Path, mine: Record) -> None:
    """Give the folder back, if it is this process's."""
    file = Path(folder) / RECORD
    holder = read(file)
    if holder is not None and (holder.launch, holder.pid) == (mine.launch, mine.pid):
        file.unlink(missing_ok=True)


@contextmanager
def owned(folder: str | Path | None, *, what: str) -> Iterator[None]:
    """The folder is ours inside the block. None: there is nothing to own. Raises Owned."""
    if folder is None:
        yield
        return
    mine = this_process()
    take(folder, mine, what=what)
    leave = threading.Event()
    threading.Thread(target=_keep_touching, args=(Path(folder) / RECORD, leave), name="owner", daemon=True).start()
    try:
        yield
    finally:
        leave.set()
        release(folder, mine)


def read(file: Path) -> Record | None:
    """What the file says; None where there is none, or nothing that we wrote."""
    try:
        return Record(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _keep_touching(file: Path, leave: threading.Event) -> None:
    while not leave.wait(TOUCH_SECONDS):
        try:
            os.utime(file)
        except OSError:  # the disk's trouble is told by whoever writes checkpoints
            continue


def _lives(holder: Record | None, file: Path, *, probe: Path) -> str:
    """Why the record counts; "" where its run is gone. probe: a file made just now, whose time is the same clock's."""
    if holder is None:
        return ""
    if holder.machine == _machine():
        if _ticks(holder.pid) == holder.ticks:
            return "it runs"
        left = members(holder.launch)
        return f"it has ended, but processes of it live: {' '.join(map(str, left))}" if left else ""
    try:
        return _touched(file, probe, same_clock=holder.host == socket.gethostname())
    except FileNotFoundError:
        return ""


def _touched(file: Path, probe: Path, *, same_clock: bool) -> str:
    """When the record's machine said last that its run lives; "" where it says so no more. Raises FileNotFoundError.

    Some file systems stamp a file by the clock of the machine that writes: then the two times are of two clocks, unless it is
    this machine (same_clock), started anew.
    """
    stamp = file.stat().st_mtime_ns
    age = (probe.stat().st_mtime_ns - stamp) / 1e9
    if -_CLOCK_SECONDS < age < STALE_SECONDS:
        return f"it said so {max(age, 0):.0f} s ago"
    if same_clock and age > 0:
        return ""
    until = time.monotonic() + (WATCH_SECONDS if age > 0 else STALE_SECONDS)
    while time.monotonic() < until:
        time.sleep(0.5)
        if file.stat().st_mtime_ns != stamp:
            return f"it said so just now, by a clock that is about {age / 60:+.0f} min off this machine's: set the clocks"
    return ""


def _refusal(what: str, folder: Path, holder: Record, why: str) -> str:
    end = f"kill {holder.pid}" if why == "it runs" else f"kill {why.rpartition(': ')[2]}"
    elsewhere = holder.machine != _machine()
    way = f"on {holder.host}, or remove {shlex.quote(str(folder / RECORD))} if it is gone" if elsewhere else f"({end})"
    return (
        f"{what} {folder} belongs to another run, {holder.told()} ({why}); wait for it, end it {way}, or choose another folder"
    )


def _put_aside(file: Path, stale: Record | None) -> None:
    """Remove a record that no longer counts; one that somebody put there meanwhile goes back."""
    aside = file.with_name(f"{RECORD}.{uuid.uuid4().hex[:8]}")
    try:
        os.rename(file, aside)
    except FileNotFoundError:
        return
    if read(aside) != stale:
        _put(aside, file)
    aside.unlink(missing_ok=True)


def _put(part: Path, file: Path) -> bool:
    """Give `part` the name `file` as well, unless something has it: whether that was so."""
    try:
        os.link(part, file)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with file.open("x") as out:
                out.write(part.read_text())
        except FileExistsError:
            return False
    return True


def members(launch: str) -> list[int]:
    """This user's processes here that carry the launch in their environment; this one and its parents excepted."""
    wanted, mine = f"{LAUNCH_VARIABLE}={launch}".encode(), _with_parents(os.getpid())
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in mine:
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return sorted(found)


def _with_parents(pid: int) -> set[int]:
    found: set[int] = set()
    while pid > 0 and pid not in found:
        found.add(pid)
        fields = _stat(pid)
        pid = int(fields[1]) if fields else 0
    return found


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; [] for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _ticks(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] != "Z" else None


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return "?"
    text = " ".join(shlex.join(words).split())
    return text if len(text) <= 120 else text[:117] + "..."


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m slime.observability.owner", description="Take a folder, or give it back.")
    parser.add_argument("verb", choices=("take", "release"))
    parser.add_argument("folder")
    parser.add_argument("--what", default="the folder", help="the setting that names it")
    parser.add_argument("--pid", type=int, default=os.getppid(), help="process that owns it (default: the caller)")
    words = parser.parse_args(argv)
    mine = this_process(words.pid)
    if words.verb == "release":
        release(words.folder, mine)
        return 0
    try:
        take(words.folder, mine, what=words.what)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
