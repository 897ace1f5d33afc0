"""mooncake's listeners, at the engine's own address and for the run's own nodes.

Its TCP transfer engine listens on every interface and has no option against it (MC_TCP_BIND_ADDRESS is what it tells others),
and whoever connects reads and writes the KV memory of the engine. Its libraries call `bind` through their table of imported
functions (ELF .rela.plt); the entry is pointed at a function here, which puts the engine's address in the place of "every
address" and, where that is not loopback, attaches a filter for the run's nodes before anybody can connect.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
import sys
from pathlib import Path

_WORD = struct.Struct("<Q")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_DYNSYM, _RELA = 11, 4
# R_X86_64_GLOB_DAT, R_X86_64_JUMP_SLOT, R_AARCH64_GLOB_DAT, R_AARCH64_JUMP_SLOT
_IMPORTED = (6, 7, 1025, 1026)
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_KEPT: list[object] = []  # a callback that is collected would be called all the same


def keep_at(address: str, peers: tuple[str, ...], libraries: tuple[str, ...]) -> int:
    """A later bind of these libraries to "every address" goes to `address`. Returns how many entries were changed."""
    system = ctypes.CDLL(None, use_errno=True)
    prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32, use_errno=True)

    def bind(fd: int, name: int, length: int) -> int:
        wanted = bytearray(ctypes.string_at(name, length))
        if narrow(wanted, address) and peers:
            _restrict(fd, peers)
        return system.bind(fd, (ctypes.c_char * length).from_buffer(wanted), length)

    callback = prototype(bind)
    _KEPT.append(callback)
    changed = 0
    for base, path in _loaded(libraries):
        for offset in imported(path, "bind"):
            slot = base + offset
            # Some libraries are linked so that the table is read-only once it is filled.
            page = slot & ~(mmap.PAGESIZE - 1)
            system.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), _READ_WRITE)
            ctypes.c_void_p.from_address(slot).value = ctypes.cast(callback, ctypes.c_void_p).value
            changed += 1
    return changed


def narrow(name: bytearray, address: str) -> bool:
    """A sockaddr of "every address" becomes `address` (IPv4, mapped for IPv6 sockets), in place. Whether it is that now."""
    (family,) = struct.unpack_from("=H", name)
    own = socket.inet_aton(address)
    if family == socket.AF_INET and name[4:8] in (bytes(4), own):
        name[4:8] = own
        return True
    if family == socket.AF_INET6 and name[8:24] == bytes(16):
        name[8:24] = bytes(10) + b"\xff\xff" + own
        return True
    return False


def _restrict(fd: int, peers: tuple[str, ...]) -> None:
    from slime.compat.peers import only_from

    with socket.socket(fileno=os.dup(fd)) as listener:
        only_from(listener, peers)


def _loaded(names: tuple[str, ...]) -> list[tuple[int, Path]]:
    """(address where it begins, file) of libraries whose file names begin so, from this process's memory map."""
    found: dict[str, int] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, _, _, *path = line.split(maxsplit=5)
        if path and os.path.basename(path[0]).startswith(names) and int(offset, 16) == 0:
            found.setdefault(path[0], int(span.partition("-")[0], 16))
    return [(base, Path(path)) for path, base in found.items()]


def imported(path: Path, function: str) -> list[int]:
    """Where a shared library (64-bit, little-endian ELF) keeps the address of a function that it imports."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        return []
    table, size, count = _WORD.unpack_from(data, 0x28)[0], *struct.unpack_from("<HH", data, 0x3A)
    sections = [_SECTION.unpack_from(data, table + at * size) for at in range(count)]
    found = []
    for _, kind, _, _, start, length, symbols, *_ in sections:
        if kind != _RELA or sections[symbols][1] != _DYNSYM:
            continue
        names = sections[sections[symbols][6]][4]
        for offset, info, _ in _RELOCATION.iter_unpack(data[start : start + length]):
            if info & 0xFFFFFFFF not in _IMPORTED:
                continue
            text = names + _SYMBOL.unpack_from(data, sections[symbols][4] + (info >> 32) * _SYMBOL.size)[0]
            if data[text : data.index(0, text)] == function.encode():
                found.append(offset)
    return found


def after_import(module: object) -> None:
    """Run once mooncake's libraries are in memory. An engine that cannot be kept to its address does not start."""
    _keep(("engine.so", "libasio.so"))


def keep_announcements() -> None:
    """The same for ZeroMQ, over which decode engines tell prefill engines where to write: it binds the engine's address
    itself, so it matters only where other nodes reach that."""
    if os.environ.get("SLIME_ENGINE_PEERS"):
        _keep(("libzmq",))


def _keep(libraries: tuple[str, ...]) -> None:
    peers = tuple(filter(None, os.environ.get("SLIME_ENGINE_PEERS", "").split(",")))
    if not keep_at(os.environ["MC_TCP_BIND_ADDRESS"], peers, libraries):
        sys.exit(f"{', '.join(libraries)} import no `bind` that could be kept to this engine's nodes; see slime/compat/sglang")
