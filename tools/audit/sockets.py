"""Every listening socket of some processes, read from /proc: TCP, UDP and Unix ones, in whatever network they live."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_LISTENS = "0A"
_ACCEPTS = 0x10000
"""__SO_ACCEPTCON of /proc/net/unix."""


@dataclass(frozen=True)
class Listener:
    kind: str
    """tcp, udp or unix."""
    address: str
    """IPv4 or IPv6; of a Unix socket the path, with @ first where it is abstract."""
    port: int
    """0 for a Unix socket."""
    pids: tuple[int, ...]
    who: str
    """What the first of these processes is."""
    network: int
    """A process in whose network namespace it listens."""

    @property
    def place(self) -> str:
        if self.kind == "unix":
            return self.address
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        return self.kind != "unix" and ipaddress.ip_address(self.address).is_loopback

    @property
    def is_everywhere(self) -> bool:
        return self.kind != "unix" and ipaddress.ip_address(self.address).is_unspecified


def with_descendants(pids: Sequence[int]) -> list[int]:
    """These processes and all that they started, as far as the parents still live."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _read(entry / "stat")):
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, todo = set(), list(pids)
    while todo:
        pid = todo.pop()
        if pid not in found:
            found.add(pid)
            todo += children.get(pid, [])
    return sorted(found)


def listeners(pids: Sequence[int]) -> list[Listener]:
    """Those of all these processes, each once, by network and address."""
    holders: dict[str, list[int]] = {}
    networks: dict[str, int] = {}
    for pid in pids:
        try:
            networks.setdefault(os.readlink(f"/proc/{pid}/ns/net"), pid)
            targets = {os.readlink(fd.path) for fd in os.scandir(f"/proc/{pid}/fd")}
        except OSError:  # it has ended
            continue
        for target in targets:
            if target.startswith("socket:["):
                holders.setdefault(target[8:-1], []).append(pid)
    found = []
    for member in networks.values():
        for kind, address, port, inode in _table(member):
            if owners := holders.get(inode):
                found.append(Listener(kind, address, port, tuple(owners), who(owners[0]), member))
    return sorted(found, key=lambda one: (one.network, one.kind, one.address, one.port))


def _table(pid: int) -> Iterator[tuple[str, str, int, str]]:
    """(kind, address, port, inode) of what listens in the network of that process."""
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        for line in _read(Path(f"/proc/{pid}/net/{kind}")).splitlines()[1:]:
            fields = line.split()
            # A UDP socket that has a peer answers nobody else.
            if fields[3] == _LISTENS or (kind.startswith("udp") and set(fields[2]) == set("0:")):
                address, _, port = fields[1].partition(":")
                yield kind.removesuffix("6"), _address(address), int(port, 16), fields[9]
    for line in _read(Path(f"/proc/{pid}/net/unix")).splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if int(fields[3], 16) & _ACCEPTS:
            yield "unix", fields[7] if len(fields) > 7 else "", 0, fields[6]


def _address(text: str) -> str:
    """From words of the machine's byte order, in hexadecimal; an IPv4 address that is mapped to IPv6 as IPv4."""
    words = [int(text[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(words))
    return str(getattr(address, "ipv4_mapped", None) or address)


def who(pid: int) -> str:
    """A short name from the command line: ray::Actor, gcs_server, python -m slime.engine.serve."""
    words = _read(Path(f"/proc/{pid}/cmdline")).rstrip("\0").split("\0")
    if "-m" in words[:4]:
        return words[words.index("-m") + 1]
    if len(words) == 1:  # a title that the process gave itself; an actor's names the method while one runs
        name = words[0].split(" (")[0].strip()
        return name.split(".")[0] if name.startswith("ray::") else name or "?"
    scripts = [word for word in words[1:4] if word.endswith((".py", ".sh"))]
    return Path(scripts[0] if scripts else words[0]).name


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
