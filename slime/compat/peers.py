"""A socket of another package's that listens too widely: the kernel drops what does not come from the run's own nodes.

A classic BPF program on the socket itself needs no privileges and no firewall; accepted connections inherit it. It is for
sockets that ask for no secret and must be reached from other nodes; one that serves a single node is bound to loopback instead.
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
import socket
import stat
import struct
from collections.abc import Container, Sequence

SO_ATTACH_FILTER = getattr(socket, "SO_ATTACH_FILTER", 26)

# linux/filter.h: offsets from here on count from the IP header, which a TCP socket's filter would else not see.
_NETWORK_HEADER = -0x100000
_SOURCE_IPV4 = 12
_SYSCALL_PIDFD_GETFD = 438
"""The same number on every architecture (since Linux 5.6)."""
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06


def only_from(listener: socket.socket, peers: Sequence[str]) -> None:
    """Accept TCP connections from these IPv4 addresses only. Raises ValueError for none, or for one of another kind."""
    program = source_filter(peers)
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", len(program), ctypes.addressof(code)))


def peers_of(nodes: Sequence[str]) -> list[str]:
    """The nodes' addresses, and those of SLIME_PEERS (comma-separated: other addresses from which nodes reach each other).

    Empty, which restricts nobody, where a node has an IPv6 address: the filter reads IPv4 headers.
    """
    peers = sorted({*nodes, *filter(None, os.environ.get("SLIME_PEERS", "").split(","))})
    return [] if any(":" in peer for peer in peers) else peers


def source_filter(peers: Sequence[str]) -> list[tuple[int, int, int, int]]:
    """(operation, jump if true, jump if false, value): load the packet's source; any that is listed is let through."""
    addresses = sorted({ipaddress.ip_address(peer) for peer in peers}, key=int)
    if not addresses or any(address.version != 4 for address in addresses):
        raise ValueError(f"a listener is kept to the IPv4 addresses of the run's nodes, got {list(peers)}")
    if len(addresses) > 250:
        raise ValueError(f"a socket's filter tells 250 addresses apart, got {len(addresses)}")
    steps = [(_LOAD_WORD, 0, 0, (_NETWORK_HEADER + _SOURCE_IPV4) & 0xFFFFFFFF)]
    for at, address in enumerate(addresses):
        steps.append((_JUMP_IF_EQUAL, len(addresses) - at, 0, int(address)))
    return [*steps, (_RETURN, 0, 0, 0), (_RETURN, 0, 0, 0xFFFFFFFF)]


def keep_listeners(pids: Sequence[int], ports: Container[int], peers: Sequence[str]) -> int:
    """What these processes of ours listen on at these ports takes connections of the peers alone, from now on.

    For a program that cannot be told where to listen, after it has begun; connections that are there stay. Returns how many
    sockets it was. Raises OSError where the kernel lets nobody at another process's sockets (a container without ptrace).
    """
    num_kept = 0
    for pid in pids:
        try:
            process = os.pidfd_open(pid)
            descriptors = [int(name) for name in os.listdir(f"/proc/{pid}/fd")]
        except (ProcessLookupError, FileNotFoundError):
            continue
        try:
            num_kept += sum(_keep(process, descriptor, ports, peers) for descriptor in descriptors)
        finally:
            os.close(process)
    return num_kept


def _keep(process: int, descriptor: int, ports: Container[int], peers: Sequence[str]) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    mine = libc.syscall(_SYSCALL_PIDFD_GETFD, process, descriptor, 0)
    if mine < 0:
        code = ctypes.get_errno()
        if code in (errno.EBADF, errno.ESRCH):  # closed meanwhile
            return False
        raise OSError(code, os.strerror(code))
    if not stat.S_ISSOCK(os.fstat(mine).st_mode):
        os.close(mine)
        return False
    with socket.socket(fileno=mine) as one:
        if one.family not in (socket.AF_INET, socket.AF_INET6) or not one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return False
        if one.getsockname()[1] not in ports:
            return False
        only_from(one, peers)
    return True
