"""torchrun for ranks of this node alone: `python -m slime.compat.torchrun --standalone ...`, as `torch.distributed.run`.

torchrun has two stores, one where its agents meet and one for the ranks. They listen on every interface, whatever the endpoint
says, and ask nobody for a secret; here they are on loopback.
"""

from __future__ import annotations

import sys
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.run import main as torchrun

from slime.compat.store import serve_store

LOOPBACK = "127.0.0.1"


def _store_of_agents(host: str, port: int, *, is_master: bool, multi_tenant: bool, timeout: timedelta) -> dist.TCPStore:
    """In the place of TCPStore; the port is the system's choice."""
    if is_master:
        return serve_store(LOOPBACK, [], world_size=None, timeout=timeout)
    return dist.TCPStore(host, port, is_master=False, multi_tenant=multi_tenant, timeout=timeout)


def _store_of_ranks(self: DynamicRendezvousHandler, address: str, port: int) -> dist.TCPStore:
    return serve_store(LOOPBACK, [], world_size=None, timeout=timedelta(minutes=5))


def main() -> None:
    if "--standalone" not in sys.argv:
        raise SystemExit("slime.compat.torchrun is for the ranks of one node (--standalone); several nodes: torchrun")
    c10d_rendezvous_backend.TCPStore = _store_of_agents
    DynamicRendezvousHandler._create_tcp_store_server = _store_of_ranks
    # What the agent tells the ranks; else the name of the machine.
    sys.argv.insert(1, f"--local-addr={LOOPBACK}")
    torchrun()


if __name__ == "__main__":
    main()
