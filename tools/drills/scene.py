"""The processes of one launch and what each is, and what the launch has left behind: read from /proc, on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

MARK = "SLIME_DRILL"
"""Environment variable that every process of a drilled launch inherits."""
_SHARED = re.compile(r"/dev/shm/\S+")
OWNER = ".slime-owner"


@dataclass(frozen=True)
class Seen:
    """A process as it was seen once."""

    pid: int
    ticks: int
    """Start in the kernel's clock: numbers are used again."""
    parent: int
    state: str
    words: tuple[str, ...]

    @property
    def title(self) -> str:
        return self.words[0] if self.words else ""

    def __str__(self) -> str:
        return f"{self.pid} {' '.join(self.words)[:60]}"


def look() -> dict[int, Seen]:
    """Every process of this machine that may be read."""
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (seen := look_at(int(entry.name))) is not None:
            found[seen.pid] = seen
    return found


def look_at(pid: int) -> Seen | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
    except OSError:
        return None
    return Seen(pid, int(fields[19]), int(fields[1]), fields[0], tuple(words))


class Scene:
    """One launch: everything that it ever had, as often as `update` was called."""

    def __init__(self, launcher: int, mark: str):
        self._launcher, self._mark = launcher, f"{MARK}={mark}".encode()
        self.ever: dict[tuple[int, int], Seen] = {}
        self.shared: set[str] = set()

    def update(self, *, maps: bool = False) -> dict[int, Seen]:
        """The launch's processes now. maps: note their files in shared memory too, which takes a tenth of a second."""
        everybody = look()
        ours = {pid for pid, seen in everybody.items() if (pid, seen.ticks) in self.ever or self._is_marked(pid)}
        ours = _with_children(ours, everybody)
        now = {pid: everybody[pid] for pid in ours if everybody[pid].state not in "ZX"}
        self.ever |= {(seen.pid, seen.ticks): seen for seen in now.values()}
        for pid in now if maps else ():
            self.shared |= _mapped(pid)
        return now

    def _is_marked(self, pid: int) -> bool:
        try:
            return self._mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False

    def alive(self) -> list[Seen]:
        now = {pid: look_at(pid) for pid, _ in self.ever}
        return [
            seen for seen in self.ever.values() if (one := now[seen.pid]) and one.ticks == seen.ticks and one.state not in "ZX"
        ]

    def of(self, role: str) -> list[Seen]:
        """The launch's processes of that kind, oldest first."""
        if role == "launcher":
            return [seen for seen in [look_at(self._launcher)] if seen is not None]
        return sorted(by_role(self.update())[role], key=lambda seen: seen.ticks)

    def left(self, folders: Iterable[Path], ray_folder: Path | None) -> list[str]:
        """What should not be there after the end. folders: that the run owned."""
        found = [f"process {seen}" for seen in self.alive()]
        found += [file for file in sorted(self.shared) if Path(file).exists()]
        found += [str(folder / OWNER) for folder in folders if (folder / OWNER).exists()]
        if ray_folder is not None and ray_folder.exists():
            found += [str(ray_folder / "tmp")] if (ray_folder / "tmp").exists() else []
            sockets = [path for path in ray_folder.rglob("*") if path.is_socket()]
            found += [f"{len(sockets)} sockets in {ray_folder}"] if sockets else []
        return found


def _with_children(pids: set[int], everybody: Mapping[int, Seen]) -> set[int]:
    """Ray's agents wipe their environment."""
    found = set(pids)
    while more := {pid for pid, seen in everybody.items() if seen.parent in found} - found:
        found |= more
    return found


def _mapped(pid: int) -> set[str]:
    try:
        text = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return set()
    return set(_SHARED.findall(text))


def by_role(processes: Mapping[int, Seen]) -> dict[str, list[Seen]]:
    """Role -> processes, of those whose command line or title says it."""
    found: dict[str, list[Seen]] = {role: [] for role in (*_TITLES, "driver", "nursery", "grader", "writer")}
    for seen in processes.values():
        parent = processes.get(seen.parent)
        if (role := _role(seen, parent)) is not None:
            found[role].append(seen)
    return found


_TITLES = {
    "head": r"/gcs_server$",
    "raylet": r"/raylet$",
    "rollout": r"^ray::RolloutActor",
    "engine-actor": r"^ray::EngineActor",
    "scheduler": r"^sglang::scheduler",
    "router": r"^sglang::router|serve_router",
    "trainer": r"^ray::TrainActor",
}


def _role(seen: Seen, parent: Seen | None) -> str | None:
    if seen.words[1:3] == ("-m", "slime.train"):
        return "driver"
    if any(word.endswith("/nursery.py") for word in seen.words):
        return "grader" if parent is not None and any(word.endswith("/nursery.py") for word in parent.words) else "nursery"
    if seen.words[2:4] == ("-m", "slime.engine.serve_router"):
        return "router"
    for role, pattern in _TITLES.items():
        if re.search(pattern, seen.title):
            forked = role == "trainer" and parent is not None and re.search(pattern, parent.title)
            return "writer" if forked else role
    return None


def forks_of(parents: Iterable[Seen]) -> list[Seen]:
    """Children that still have their parent's title; in a millisecond, for a writer lives for some hundredths of a second."""
    found = []
    for parent in parents:
        for file in Path(f"/proc/{parent.pid}/task").glob("*/children"):
            try:
                children = [look_at(int(pid)) for pid in file.read_text().split()]
            except OSError:  # a thread that has ended
                continue
            found += [child for child in children if child is not None and child.title[:15] == parent.title[:15]]
    return found


def label_of(seen: Seen) -> str:
    """Of an engine's process or actor: "default-decode-1", as its log is called; "" for others."""
    children = [one for one in look().values() if one.parent == seen.pid]
    for pid in (seen.pid, *(one.pid for one in children)):
        try:
            log = os.readlink(f"/proc/{pid}/fd/1")
        except OSError:
            continue
        if found := re.search(r"/(\w+-(?:prefill|decode|regular)-\d+)-\d+\.log$", log):
            return found[1]
    return ""
