"""Ports, allocated by binding them and handed over while still bound.

A lease binds without SO_REUSEADDR, which fails if anybody else holds the port, and then sets SO_REUSEADDR on the bound
socket without listening. The server, which sets it too, can then bind and listen while the lease is held; nobody else's
lease can. So no port is taken between the choice and the start.
"""

from __future__ import annotations

import errno
import socket
import time
from dataclasses import dataclass, field

# Below the ephemeral range; slime's base.
FIRST_PORT = 15000
LAST_PORT = 32000
ROUTER_FIRST_PORT = 3000
DIST_INIT_BLOCK = 30


def bind(host: str, port: int) -> socket.socket:
    """Hold `port`. Raises OSError when somebody has it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        held.bind((host.strip("[]"), port))
    except OSError:
        held.close()
        raise
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return held


def bind_when_free(host: str, port: int, *, patience: float) -> socket.socket:
    """Hold the port of a server that is ending, once nobody listens there. Raises ValueError after `patience` seconds.

    Its last connections, which the system keeps for a minute, are no hindrance; another lease of the port is not noticed.
    """
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    deadline = time.monotonic() + patience
    while True:
        try:
            held.bind((host.strip("[]"), port))
            return held
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                held.close()
                raise ValueError(
                    f"port {port} on {host}, which a server of this run had, cannot be taken again ({error.strerror}, "
                    f"for {patience:.0f} s); see who has it: ss -ltnp 'sport = :{port}'"
                ) from None
        time.sleep(0.1)


def require_port(host: str, port: int, flag: str) -> socket.socket:
    """Hold the port that the user asked for. Raises ValueError naming the flag when it cannot be had."""
    try:
        return bind(host, port)
    except OSError as error:
        why = "is already in use" if error.errno == errno.EADDRINUSE else f"cannot be bound ({error.strerror})"
        raise ValueError(
            f"{flag} {port} on {host} {why}; choose another port or stop its owner (ss -ltnp 'sport = :{port}')"
        ) from None


@dataclass
class PortBook:
    """Hands out ports of one host, upward from `cursor`; the next engine starts where the last one ended."""

    host: str
    cursor: int = FIRST_PORT
    held: dict[int, socket.socket] = field(default_factory=dict)

    def take(self, count: int = 1) -> int:
        """The first of `count` consecutive free ports, held until `release`."""
        start = self.cursor
        while start + count <= LAST_PORT:
            block: dict[int, socket.socket] = {}
            for port in range(start, start + count):
                try:
                    block[port] = bind(self.host, port)
                except OSError as error:
                    if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                        raise ValueError(
                            f"cannot bind {self.host}:{port}: {error.strerror}; is it an address of this machine?"
                        ) from None
                    break
            else:
                self.held.update(block)
                self.cursor = start + count
                return start
            failed = start + len(block)
            for sock in block.values():
                sock.close()
            start = failed + 1
        raise ValueError(f"no {count} consecutive free ports on {self.host} between {self.cursor} and {LAST_PORT}")

    def release(self) -> None:
        for sock in self.held.values():
            sock.close()
        self.held.clear()


@dataclass(frozen=True)
class EnginePorts:
    """The ports of one engine on one host."""

    http: int
    nccl: int
    dist_init: int
    bootstrap: int | None = None
    """prefill engines: where decode engines ask for KV transfers"""


def take_engine_ports(book: PortBook, *, prefill: bool, dp_size: int = 1) -> EnginePorts:
    """One engine's ports in slime's order: server, nccl, bootstrap (prefill), then a block of 30 + dp_size."""
    http, nccl = book.take(), book.take()
    bootstrap = book.take() if prefill else None
    return EnginePorts(http, nccl, book.take(DIST_INIT_BLOCK + dp_size), bootstrap)
