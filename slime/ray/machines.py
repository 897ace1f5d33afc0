"""Machines that a run has lost: named at once, where Ray takes up to a minute to say so, and with what to do about them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import ray

from slime.ray.interfaces import has_carrier
from slime.ray.phases import RESUMES, phase_of

KNOCK_SECONDS = 6.0
"""A machine that nobody can connect to for so long is out of reach. A link that flaps may be down for some seconds."""
_AGAIN_SECONDS = 0.5
WATCH_SECONDS = 5.0


def alive_nodes() -> dict[str, Mapping[str, object]]:
    """Address -> what Ray says of the node there, of the nodes that it counts as alive."""
    return {str(node["NodeManagerAddress"]): node for node in ray.nodes() if node["Alive"]}


def watched(addresses: set[str]) -> Callable[[], list[str]]:
    """A call that says at once which of the addresses Ray counted as dead at its last look, for as long as Ray runs.

    A thread of its own looks, because a control process of Ray's that is stopped does not answer.
    """
    gone: list[str] = []

    def look() -> None:
        while ray.is_initialized():
            try:
                gone[:] = sorted(addresses - alive_nodes().keys())
            except Exception:  # Ray ends, or is out of reach: others tell
                gone.clear()
            time.sleep(WATCH_SECONDS)

    threading.Thread(target=look, name="machines", daemon=True).start()
    return lambda: list(gone)


def lost_nodes(addresses: set[str]) -> list[str]:
    """Those of the addresses where no node of the cluster is alive, or none that can be connected to from here."""
    alive = alive_nodes()
    doors = {address: int(alive[address]["NodeManagerPort"]) for address in addresses & alive.keys()}
    return sorted((addresses - alive.keys()) | silent(doors))


def silent(doors: Mapping[str, int], *, seconds: float = KNOCK_SECONDS) -> set[str]:
    """The addresses whose port cannot be connected to, tried side by side again and again for so long."""
    with ThreadPoolExecutor(max(len(doors), 1)) as pool:
        opened = pool.map(lambda door: _opens(*door, seconds), doors.items())
        return {address for address, opens in zip(doors, opened, strict=True) if not opens}


def _opens(address: str, port: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((address, port), timeout=left).close()
        except OSError:
            time.sleep(min(_AGAIN_SECONDS, max(0.0, deadline - time.monotonic())))
        else:
            return True
    return False


@contextmanager
def lost_machines_named(where: Callable[[], tuple[set[str], str]]) -> Iterator[None]:
    """An exception that leaves the block while machines are lost says so first. where: (the run's addresses, what it does)."""
    try:
        yield
    except Exception as error:
        addresses, doing, lost = _lost(where)
        if not lost:
            raise
        linked = has_carrier(ray.util.get_node_ip_address())
        raise RuntimeError(f"{verdict(lost, addresses, doing, linked=linked)}. It was missed first by this: {error}") from error


def _lost(where: Callable[[], tuple[set[str], str]]) -> tuple[set[str], str, list[str]]:
    """Nobody of one machine, where nobody else could tell, and nobody where the cluster cannot be asked."""
    try:
        addresses, doing = where()
        return addresses, doing, lost_nodes(addresses) if len(addresses) > 1 else []
    except Exception:
        return set(), "", []


def verdict(lost: list[str], addresses: set[str], doing: str, *, linked: bool = True) -> str:
    """The line that a run ends with: which machine, in which phase, what to do. linked: whether this machine's cable is in."""
    phase, here = phase_of(doing), addresses - set(lost)
    if len(here) == 1 and (len(lost) > 1 or not linked):
        why = "" if linked else "; its own link is down"
        who = f"no other node can be reached from {here.pop()} ({', '.join(lost)} cannot{why})"
        return f"{who}, {phase}: mend this node's network, and run the same command again; {RESUMES}"
    who, them = (f"node {lost[0]} is", "it") if len(lost) == 1 else (f"nodes {', '.join(lost)} are", "them")
    return f"{who} gone, {phase}: bring {them} back or replace {them}, and run the same command again; {RESUMES}"
