"""The process group of a server: who of it lives, and its files in shared memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

# Names of SGLang's own (managers/load_snapshot.py, utils/stale_shm_cleanup.py): a user's checkpoint may lie in /dev/shm too,
# and servers map it. A name that is gone already ends in " (deleted)".
_SHARED = re.compile(r"/dev/shm/(?:sglang_|sgl_shm_)\S+$", re.MULTILINE)


def group_exists(group: int) -> bool:
    """Is any process of the group alive (a zombie is not)?"""
    return any(True for _ in members(group))


def members(group: int) -> Iterator[int]:
    """Its processes that are alive."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # After the command in parentheses: state, parent, group.
            state, _, pgrp = entry.joinpath("stat").read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if int(pgrp) == group and state != "Z":
            yield int(entry.name)


def shared_files(group: int) -> set[Path]:
    """SGLang's files in shared memory that processes of the group map; being killed, they do not remove them."""
    found: set[Path] = set()
    for pid in members(group):
        try:
            found |= {Path(name) for name in _SHARED.findall(Path(f"/proc/{pid}/maps").read_text())}
        except OSError:
            continue
    return found


def write_list(file: Path, shared: set[Path]) -> None:
    """For whoever clears up after an actor that was killed, and with it everybody who knew: its successor, or the launcher."""
    part = file.with_name(f"{file.name}.part")
    part.write_text("".join(f"{name}\n" for name in sorted(map(str, shared))))
    part.replace(file)


def remove_listed(file: Path) -> None:
    """The files of a list that nobody cleared up after, and the list."""
    for name in _SHARED.findall(file.read_text()) if file.exists() else ():
        Path(name).unlink(missing_ok=True)
    file.unlink(missing_ok=True)
