"""torch's rendezvous store, for the run's own nodes: by itself it listens on every interface and asks nobody for a secret."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from slime.compat.peers import only_from


def serve_store(address: str, peers: Sequence[str], *, world_size: int | None, timeout: timedelta) -> dist.TCPStore:
    """A store at `address`, on a port that the system picks, so that no two runs race for one (its `port`).

    peers: addresses that may connect; empty where `address` is loopback. world_size: None where ranks are not counted by it.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, 0))
        if peers:
            only_from(listener, peers)
        listener.listen(2048)
        port = listener.getsockname()[1]
        # The store closes the descriptor.
        return dist.TCPStore(
            address,
            port,
            world_size,
            is_master=True,
            wait_for_workers=False,
            timeout=timeout,
            master_listen_fd=listener.detach(),
        )
    finally:
        listener.close()
