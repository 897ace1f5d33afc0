"""A listener that is kept to some addresses: real connections, from loopback addresses on the list and others."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from callers import connects

from slime.compat.peers import keep_listeners, only_from, source_filter

# torch/csrc/distributed/c10d: VALIDATE with its magic number, then PING with a number that comes back.
STORE_PING = b"\0\xce\xf7\x85\x3c" + b"\x0d" + b"abcd"


def says_hello(source: str, port: int, listener: socket.socket) -> bool:
    with socket.socket() as caller:
        caller.settimeout(0.5)
        caller.bind((source, 0))
        try:
            caller.connect(("127.0.0.1", port))
        except TimeoutError:
            return False
        accepted, peer = listener.accept()
        with accepted:
            caller.sendall(b"hello")
            return accepted.recv(5) == b"hello" and peer[0].removeprefix("::ffff:") == source


@pytest.mark.parametrize("family, everywhere", [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")])
def test_only_the_listed_addresses_connect(family, everywhere):
    with socket.socket(family) as listener:
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((everywhere, 0))
        only_from(listener, ["127.0.0.7", "127.0.0.2", "127.0.0.5"])
        listener.listen()
        reached = [n for n in range(1, 9) if says_hello(f"127.0.0.{n}", listener.getsockname()[1], listener)]
    assert reached == [2, 5, 7]


LISTENS_EVERYWHERE = """
import sys
from datetime import timedelta
import socket
import torch.distributed as dist

store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
other = socket.create_server(("0.0.0.0", 0))
print(store.port, other.getsockname()[1], flush=True)
sys.stdin.read()
"""


def test_a_child_that_listens_everywhere_is_kept_to_addresses_at_the_ports_that_are_named():
    """torch's store, in a process that was not asked; what it has taken before stays."""
    command = [sys.executable, "-c", LISTENS_EVERYWHERE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        kept, other = map(int, child.stdout.readline().split())
        assert connects(("127.0.0.1", kept), source="127.0.0.9")
        with socket.create_connection(("127.0.0.1", kept)) as before:
            assert keep_listeners([child.pid], {kept}, ["127.0.0.1", "127.0.0.2"]) == 1
            before.sendall(STORE_PING)
            assert before.recv(4) == STORE_PING[-4:]
        sources = ("127.0.0.1", "127.0.0.2", "127.0.0.9")
        assert [connects(("127.0.0.1", kept), source=source) for source in sources] == [True, True, False]
        assert connects(("127.0.0.1", other), source="127.0.0.9"), "nobody named it"
        child.stdin.close()
    assert keep_listeners([child.pid], {kept}, ["127.0.0.1"]) == 0, "it has ended"


def test_what_cannot_be_told_apart_is_refused():
    for peers in ([], ["::1"], ["10.0.0.1", "fe80::1"]):
        with pytest.raises(ValueError, match="IPv4 addresses of the run's nodes"):
            source_filter(peers)
    with pytest.raises(ValueError, match="got 251"):
        source_filter([f"10.0.0.{n}" for n in range(251)])


@pytest.mark.parametrize("address, peers", [("127.0.0.1", []), ("127.0.0.2", ["127.0.0.1", "127.0.0.2"])])
def test_the_trainers_store_is_at_one_address_and_for_the_runs_nodes(address, peers):
    from datetime import timedelta

    import torch.distributed as dist

    from slime.compat.store import serve_store

    store = serve_store(address, peers, world_size=2, timeout=timedelta(seconds=20))
    store.set("key", "value")
    client = dist.TCPStore(address, store.port, 2, is_master=False, timeout=timedelta(seconds=20))
    assert client.get("key") == b"value"
    own = int.from_bytes(socket.inet_aton(address), "little")
    tables = [line.split() for table in ("tcp", "tcp6") for line in open(f"/proc/net/{table}")]
    bound = [fields[1] for fields in tables if fields[3] == "0A" and fields[1].endswith(f":{store.port:04X}")]
    assert bound == [f"{own:08X}:{store.port:04X}"]
    with socket.socket() as stranger:
        stranger.settimeout(0.5)
        stranger.bind(("127.0.0.9", 0))
        if peers:
            with pytest.raises(TimeoutError):
                stranger.connect((address, store.port))
