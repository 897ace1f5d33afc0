"""A cable that is slow to deliver: frames that come in at one link leave at the other, later, and some of them never.

    python tools/box_relay.py LINK LINK --ms 50 --loss 0.01        (as root; started by cluster_box.py, ends with its links)

A relay in user space, for kernels without netem. A frame keeps what the kernel notes on it beside (a header of virtio): a
checksum that is still to be made, and a size beyond the cable's that is still to be cut.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import select
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass

_ALL_PROTOCOLS = 3
_SOL_PACKET, _VNET_HDR, _IGNORE_OUTGOING = 263, 15, 23
"""Numbers of <linux/if_packet.h>, which Python has no names for."""
_LARGEST = 10 + 65550
_BUFFER = 8 << 20


@dataclass(frozen=True)
class Held:
    due: float
    """By the clock of `time.monotonic`."""
    out: socket.socket
    frame: bytes


def tap(link: str) -> socket.socket:
    """All frames that come in at a link; what is sent leaves there."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    made.setsockopt(_SOL_PACKET, _VNET_HDR, 1)
    made.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    made.bind((link, _ALL_PROTOCOLS))
    made.setblocking(False)
    return made


def relay(links: tuple[str, str], *, seconds: float, loss: float, seed: int = 0) -> None:
    """Until one of the links is no more."""
    first, second = (tap(link) for link in links)
    to, held, chance = {first: second, second: first}, deque[Held](), random.Random(seed)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while all(os.path.exists(f"/sys/class/net/{link}") for link in links):
        wait = 1.0 if not held else max(0.0, held[0].due - time.monotonic())
        for one in select.select([first, second], [], [], wait)[0]:
            for frame in _come(one):
                if chance.random() >= loss:
                    held.append(Held(time.monotonic() + seconds, to[one], frame))
        while held and held[0].due <= time.monotonic():
            _send(held.popleft())


def _come(link: socket.socket) -> list[bytes]:
    found: list[bytes] = []
    try:
        while len(found) < 64:
            found.append(link.recv(_LARGEST))
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.ENETDOWN):  # a cable may be pulled out, and put back
            raise
    return found


def _send(held: Held) -> None:
    try:
        held.out.send(held.frame)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.ENOBUFS, errno.ENETDOWN, errno.ENXIO):  # lost, as on any cable
            raise


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("links", nargs=2)
    parser.add_argument("--ms", type=float, required=True)
    parser.add_argument("--loss", type=float, required=True)
    given = parser.parse_args(argv)
    relay(tuple(given.links), seconds=given.ms / 1000, loss=given.loss)


if __name__ == "__main__":
    main(sys.argv[1:])
