"""Network interfaces of this machine, asked of the kernel: also right where /sys shows another network's."""

from __future__ import annotations

import fcntl
import socket
import struct

_ADDRESS, _FLAGS = 0x8915, 0x8913
"""SIOCGIFADDR, SIOCGIFFLAGS of Linux."""
_RUNNING = 0x40
"""IFF_RUNNING: the interface is up and has a carrier."""


def ipv4_of(interface: str) -> str:
    """Its IPv4 address; "" without one."""
    answer = _ask(_ADDRESS, interface)
    return socket.inet_ntoa(answer[20:24]) if answer else ""


def has_carrier(address: str) -> bool:
    """Whether the interface with that IPv4 address has a carrier: a cable, and somebody at its other end. True where none has
    the address."""
    for _, interface in socket.if_nameindex():
        if ipv4_of(interface) == address and (answer := _ask(_FLAGS, interface)):
            return bool(struct.unpack("H", answer[16:18])[0] & _RUNNING)
    return True


def _ask(what: int, interface: str) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            return fcntl.ioctl(any_socket.fileno(), what, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return b""
