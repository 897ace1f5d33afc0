"""Whether all ranks see one folder under one path: asked before the first rollout, where a save would find out after it."""

from __future__ import annotations

import secrets
import socket
import time
from pathlib import Path

import torch.distributed as dist

_SEEN_WITHIN = 15.0
"""Seconds: a network file system may show a new file late."""


def refuse_unshared(root: Path, flag: str) -> None:
    """Rank 0 puts a file there, and the others look for it. Collective; raises the same ValueError on every rank.

    flag: what named the folder.
    """
    probe: list[str | None] = [_write_probe(root) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(probe, src=0)
    if probe[0] is None:  # what keeps rank 0 from writing, the first save says with the system's reason
        return
    answers: list[tuple[str, bool]] = [("", True)] * dist.get_world_size()
    dist.all_gather_object(answers, (socket.gethostname(), _sees(root / probe[0])))
    if dist.get_rank() == 0:
        (root / probe[0]).unlink(missing_ok=True)
    blind = [f"rank {rank} on {host}" for rank, (host, sees) in enumerate(answers) if not sees]
    if blind:
        more = f" and {len(blind) - 3} more" if len(blind) > 3 else ""
        raise ValueError(
            f"{flag} {root} is not one folder for all ranks: {', '.join(blind[:3])}{more} cannot see what rank 0 on "
            f"{answers[0][0]} writes there; give {flag} a folder on a disk that all nodes share"
        )


def _write_probe(root: Path) -> str | None:
    name = f".seen-by-all-{secrets.token_hex(4)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    except OSError:
        return None
    return name


def _sees(file: Path) -> bool:
    deadline = time.monotonic() + _SEEN_WITHIN
    while True:
        try:
            if file.name in {entry.name for entry in file.parent.iterdir()}:  # a listing is fresher than a look at a name
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
