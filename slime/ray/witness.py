"""In every actor's process: a thread that tells, to whoever asks on this node, where the process is and what it waits for.

It needs nothing of the process but the interpreter, which a rank that waits in a collective has let go. The socket lies in
Ray's own folder, which is the run's owner's alone.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import sysconfig
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

_ANSWER_SECONDS = 5.0
_OWN_FRAMES = 4
_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
_SILENT = {"witness"}
_also: list[Callable[[], Sequence[str]]] = []
_world = ""


@dataclass(frozen=True)
class GroupState:
    """A process group as one of its ranks has it."""

    name: str
    """The same on all its ranks."""
    title: str
    rank: int
    """Of the whole world."""
    ranks: tuple[int, ...]
    num_begun: int
    """Collectives that this rank has begun in it. Sends and receives are not counted."""


@dataclass(frozen=True)
class Testimony:
    """What one process says of itself."""

    lines: tuple[str, ...]
    """A thread each: the innermost function, then those of the project and of the user's."""
    groups: tuple[GroupState, ...]


def tell_also(lines: Callable[[], Sequence[str]]) -> None:
    """What this process has to say beyond its stacks; called in the witness's thread."""
    _also.append(lines)


def stand(path: Path, *, world: str = "") -> None:
    """Begin to listen at `path`; one of an earlier process of the same number is replaced.

    world: which processes have this one's default group, where they are not the trainer's: torch counts the groups of each
    world from 0, and those of two worlds are not to be compared.
    """
    global _world
    _world = world
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    threading.Thread(target=_answer, args=(listener,), name="witness", daemon=True).start()


def _answer(listener: socket.socket) -> None:
    while True:
        asker, _ = listener.accept()
        with asker:
            try:
                asker.sendall(json.dumps(asdict(testimony())).encode())
            except OSError:  # the asker has gone
                continue


def ask(path: Path) -> Testimony | None:
    """What the process behind `path` says; None where it does not answer within seconds."""
    parts = []
    try:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(_ANSWER_SECONDS)
            asking.connect(str(path))
            while part := asking.recv(65536):
                parts.append(part)
        said = json.loads(b"".join(parts))
    except (OSError, ValueError):
        return None
    groups = tuple(GroupState(**{**group, "ranks": tuple(group["ranks"])}) for group in said["groups"])
    return Testimony(tuple(said["lines"]), groups)


def testimony() -> Testimony:
    """Of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate() if thread.name not in _SILENT}
    frames = [frame for thread, frame in sys._current_frames().items() if thread in names]
    lines = [line for line in map(where, frames) if line]
    for tell in _also:
        lines += tell()
    return Testimony(tuple(lines), tuple(_groups()))


def where(frame: FrameType | None) -> str:
    """As "all_reduce (distributed_c10d.py:3012) < _step (trainer.py:231)"; "" for a thread in which no code of ours runs."""
    told, own = [], 0
    while frame is not None and own < _OWN_FRAMES:
        file = frame.f_code.co_filename
        is_own = not file.startswith((*_LIBRARIES, "<")) and "/site-packages/" not in file
        if is_own or not told:
            told.append(f"{frame.f_code.co_name} ({os.path.basename(file)}:{frame.f_lineno})")
        own += is_own
        frame = frame.f_back
    return " < ".join(told) if own else ""


def _groups() -> list[GroupState]:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return []
    found, rank, of = [], distributed.get_rank(), f" of the {_world}" if _world else ""
    for group in list(distributed.distributed_c10d._world.pg_map):
        ranks = tuple(distributed.get_process_group_ranks(group))
        if len(ranks) > distributed.get_world_size():
            continue  # with processes of another world (slime.compat.joint_group): it has none of the ranks' numbers
        name, title = f"{group.group_name}{of}", f"{group.group_desc}{of}"
        found.append(GroupState(name, title, rank, ranks, group._get_sequence_number_for_group()))
    return found
