"""Where a run's secrets could be read: command lines, environments, logs and other files, Ray's description of the job."""

from __future__ import annotations

import os
import re
import stat
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.audit.probes import Stranger, become, in_a_child
from tools.audit.sockets import who

RAY, ENGINES = "Ray's token", "the engines' token"
_KEY_IN_MEMORY = re.compile(rb"--api-key=([0-9a-f]{32})\b")
_SERVER = "slime.engine.serve"
_DESCRIPTIONS = (
    "/api/jobs/", "/api/v0/actors?detail=1", "/api/v0/workers?detail=1", "/api/v0/tasks?detail=1",
    "/api/v0/runtime_envs?detail=1",
)  # fmt: skip
_LARGEST_REGION = 1 << 28
_LARGEST_FILE = 1 << 26
_OTHERS_READ, _OTHERS_WRITE = stat.S_IROTH, stat.S_IWOTH


@dataclass(frozen=True)
class Leak:
    secret: str
    """Its name, never its value."""
    where: str


def secrets_of(pids: Sequence[int]) -> dict[str, str]:
    """name -> value: Ray's token, from the file that processes name, and that of engines and router, from the memory of one.

    As root or as the run's own user, who may read all of this: it is what nobody else may find.
    """
    found = {}
    for path in token_files(pids):
        found[RAY] = path.read_text()
    for pid in pids:
        if token := environment_of(pid).get("RAY_AUTH_TOKEN"):
            found.setdefault(RAY, token)
    for pid in pids:
        if who(pid) == _SERVER and (token := _token_in_memory(pid)):
            found[ENGINES] = token
            break
    return found


def in_processes(pids: Sequence[int], secrets: Mapping[str, str], *, environment: bool = True) -> list[Leak]:
    """Secrets in command lines and, unless they were put there on purpose, in environments."""
    leaks = []
    for pid in pids:
        places = {"arguments": _bytes(Path(f"/proc/{pid}/cmdline"))}
        if environment:
            places["environment"] = _bytes(Path(f"/proc/{pid}/environ"))
        for place, text in places.items():
            where = f"{place} of {who(pid)} ({pid})"
            leaks += [Leak(name, where) for name, value in secrets.items() if value.encode() in text]
    return leaks


def in_files(folders: Sequence[Path], secrets: Mapping[str, str], *, kept: Sequence[Path] = ()) -> list[Leak]:
    """Secrets in regular files below the folders, but for the files where they are kept."""
    leaks = []
    for path in _files(folders):
        if path not in kept:
            text = _bytes(path, _LARGEST_FILE)
            leaks += [Leak(name, str(path)) for name, value in secrets.items() if value.encode() in text]
    return leaks


def in_jobs(token: str, url: str, secrets: Mapping[str, str], *, network: int | None) -> list[Leak]:
    """Secrets in what Ray tells those that have its token of jobs, actors, workers and their environments.

    network: a process of the head's network. Raises RuntimeError where Ray does not answer.
    """

    def read() -> list[str]:
        become(Stranger(network=network))
        told = []
        for path in _DESCRIPTIONS:
            asked = urllib.request.Request(f"{url}{path}", headers={"Authorization": f"Bearer {token}"})
            # No proxy of this shell's between here and a node of the run.
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=60) as answer:
                told.append(answer.read().decode())
        return told

    told = zip(_DESCRIPTIONS, in_a_child(read), strict=True)
    return [Leak(name, f"Ray's {path}") for path, text in told for name, value in secrets.items() if value in text]


def token_files(pids: Sequence[int]) -> list[Path]:
    """Where Ray's token is kept on each node, as seen from here: nodes of one machine may have mounts of their own."""
    found: dict[str, Path] = {}
    for pid in pids:
        if path := environment_of(pid).get("RAY_AUTH_TOKEN_PATH"):
            try:
                found.setdefault(os.readlink(f"/proc/{pid}/ns/mnt"), Path(f"/proc/{pid}/root{path}"))
            except OSError:  # it has ended
                continue
    return [path for path in found.values() if path.is_file()]


def open_to_others(folders: Sequence[Path]) -> list[str]:
    """Files and folders that every user of the machine may write, where each folder above lets them through."""
    found = []
    for folder in folders:
        # Not resolved: /proc/PID/root is a link that leads back here.
        todo = [folder] if all(parent.stat().st_mode & stat.S_IXOTH for parent in folder.absolute().parents) else []
        while todo:
            path = todo.pop()
            mode = _mode(path)
            if mode & _OTHERS_WRITE and not stat.S_ISLNK(mode):
                found.append(str(path))
            if stat.S_ISDIR(mode) and mode & stat.S_IXOTH:
                todo += path.iterdir()
    return sorted(found)


def shared_memory(pids: Sequence[int]) -> list[str]:
    """Files of shared memory that these processes map and that another user may open: `path (mode)`."""
    found = set()
    for pid in pids:
        maps = _bytes(Path(f"/proc/{pid}/maps")).decode(errors="replace")
        for name in re.findall(r"(/dev/shm/\S+)$", maps, flags=re.MULTILINE):
            mode = _mode(Path(f"/proc/{pid}/root{name}"))
            if mode & (_OTHERS_READ | _OTHERS_WRITE):
                found.add(f"{name} ({stat.filemode(mode)})")
    return sorted(found)


def environment_of(pid: int) -> dict[str, str]:
    words = _bytes(Path(f"/proc/{pid}/environ")).decode(errors="replace").split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def _token_in_memory(pid: int) -> str:
    """The key that a server was given; "" where it is not found. Writable memory without a file behind it is searched."""
    try:
        regions = Path(f"/proc/{pid}/maps").read_text().splitlines()
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for region in regions:
                bounds, mode, *rest = region.split()
                first, last = (int(bound, 16) for bound in bounds.split("-"))
                if not mode.startswith("rw") or len(rest) > 3 and rest[3] != "[heap]" or last - first > _LARGEST_REGION:
                    continue
                try:
                    memory.seek(first)
                    text = memory.read(last - first)
                except OSError:
                    continue
                if found := _KEY_IN_MEMORY.search(text):
                    return found[1].decode()
    except OSError:
        return ""
    return ""


def _files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        for above, _, names in os.walk(folder):
            for name in names:
                path = Path(above, name)
                if stat.S_ISREG(_mode(path)):
                    yield path


def _mode(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except OSError:
        return 0


def _bytes(path: Path, most: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError:
        return b""
