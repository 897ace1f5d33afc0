"""A cluster in a box: nodes on one machine, each with its own network, host name, /dev/shm and /tmp, joined by a bridge.

    .venv/bin/python tools/cluster_box.py make BOX --nodes 2       (as root; BOX is a folder, which all nodes share)
    .venv/bin/python tools/cluster_box.py on BOX 1 COMMAND...      runs a command on node 1, with this environment
    .venv/bin/python tools/cluster_box.py down BOX 2               takes the link of node 2 down; `up` brings it back
    .venv/bin/python tools/cluster_box.py remove BOX               ends every process of every node, and the box

BOX/hostfile names the nodes. A launcher runs on node 1 and reaches the others by a stand-in for ssh:

    HOSTFILE=BOX/hostfile MASTER_ADDR=10.98.0.1 SSH="$PYTHON tools/cluster_box.py ssh BOX"

A node is a network, a mount and a UTS namespace, which a sleeping process holds open. The bridge has no address, so nothing of
the box is reached from the machine's own network, nor the other way round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

STATE = "box.json"
MOST_NODES = 8
_NETWORK = "10.98.0"
_LEAVE_SECONDS = 5.0
_CLEAN = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG")
"""What a login by ssh would have of this environment."""

# Run in the new namespaces: a /tmp of the node's own, in which the box stays visible, a /dev/shm and a hosts file.
_SETTLE = """
set -eu
mount --make-rprivate /
mkdir -p "$TMP_OF_NODE$BOX"
mount --bind "$BOX" "$TMP_OF_NODE$BOX"
mount -t tmpfs -o "size=$SHM,mode=1777" tmpfs /dev/shm
mount --bind "$BOX/hosts" /etc/hosts
hostname "$NAME"
case "$BOX" in /tmp/*) mount --rbind "$TMP_OF_NODE/tmp" /tmp ;; *) mount --bind "$TMP_OF_NODE/tmp" /tmp ;; esac
ip link set lo up
exec sleep infinity
"""


@dataclass(frozen=True)
class Node:
    name: str
    """Its host name."""
    address: str
    netns: str
    link: str
    """The bridge's end of its cable."""
    holder: int
    """Process id of the one that keeps the namespaces."""


@dataclass(frozen=True)
class Box:
    folder: Path
    bridge: str
    nodes: tuple[Node, ...]

    def node(self, which: str) -> Node:
        """By number from 1, name or address. Raises ValueError."""
        for number, node in enumerate(self.nodes, 1):
            if which in (str(number), node.name, node.address):
                return node
        raise ValueError(f"{self.folder} has no node {which}; there are {', '.join(node.name for node in self.nodes)}")

    def pids(self) -> list[int]:
        """Every process of every node but the holders."""
        found = []
        for node in self.nodes:
            listed = subprocess.run(["ip", "netns", "pids", node.netns], capture_output=True, text=True).stdout
            found += [int(pid) for pid in listed.split() if int(pid) != node.holder]
        return found


def why_not() -> str | None:
    """Why no box can be made here; None where one can."""
    if os.geteuid() != 0:
        return "namespaces with a network need root"
    lacking = [name for name in ("ip", "nsenter", "unshare", "mount") if shutil.which(name) is None]
    if lacking:
        return f"no command {', '.join(lacking)}"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "mount", "--make-rprivate", "/"], capture_output=True, text=True
    )
    return None if tried.returncode == 0 else f"this container makes no namespaces: {tried.stderr.strip()}"


def make(folder: Path, num_nodes: int, *, shm: str = "2g") -> Box:
    """Raises ValueError where that is not possible; a box that is half made is removed again."""
    if reason := why_not():
        raise ValueError(f"no cluster in a box: {reason}")
    if not 2 <= num_nodes <= MOST_NODES:
        raise ValueError(f"--nodes {num_nodes}: a box has 2 to {MOST_NODES} nodes")
    folder = folder.resolve()
    if (folder / STATE).exists():
        raise ValueError(f"{folder} is a box already; remove it first, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    # Names of links have 15 characters at most, and several boxes may be there.
    mark = f"{os.getpid():x}"
    names = [f"node{number}" for number in range(1, num_nodes + 1)]
    addresses = [f"{_NETWORK}.{number}" for number in range(1, num_nodes + 1)]
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for address, name in zip(addresses, names, strict=True))]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    (folder / "hostfile").write_text("".join(f"{address}\n" for address in addresses))
    box = Box(folder, f"sb{mark}", ())
    try:
        _call("ip", "link", "add", box.bridge, "type", "bridge")
        _call("ip", "link", "set", box.bridge, "up")
        for number, (name, address) in enumerate(zip(names, addresses, strict=True), 1):
            box = Box(folder, box.bridge, (*box.nodes, Node(name, address, f"slime-{mark}-{number}", f"sb{mark}-{number}", 0)))
            box = Box(folder, box.bridge, (*box.nodes[:-1], _start(box, box.nodes[-1], shm)))
            _write(box)
    except BaseException:
        _remove(box)
        raise
    return box


def _start(box: Box, node: Node, shm: str) -> Node:
    own = box.folder / "of" / node.name
    (own / "tmp").mkdir(parents=True)
    (own / "tmp").chmod(0o1777)
    _call("ip", "netns", "add", node.netns)
    _call("ip", "link", "add", node.link, "type", "veth", "peer", "name", "eth0", "netns", node.netns)
    _call("ip", "link", "set", node.link, "master", box.bridge, "up")
    _call("ip", "-n", node.netns, "addr", "add", f"{node.address}/24", "dev", "eth0")
    _call("ip", "-n", node.netns, "link", "set", "eth0", "up")
    _call("ip", "-n", node.netns, "route", "add", "default", "dev", "eth0")
    settle = {"BOX": str(box.folder), "TMP_OF_NODE": str(own), "NAME": node.name, "SHM": shm}
    log = open(own / "holder.log", "w")  # noqa: SIM115  (the holder's)
    holder = subprocess.Popen(
        ["ip", "netns", "exec", node.netns, "unshare", "--mount", "--uts", "sh", "-c", _SETTLE],
        env=_clean_environment() | settle, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    log.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{holder.pid}/cmdline").read_bytes().split(b"\0")[0] != b"sleep":
        if holder.poll() is not None or time.monotonic() > deadline:
            holder.kill()
            raise ValueError(f"{node.name} did not come up: {(own / 'holder.log').read_text().strip()}")
        time.sleep(0.02)
    return Node(**{**asdict(node), "holder": holder.pid})


def load(folder: Path) -> Box:
    """Raises ValueError where the folder is no box."""
    file = folder.resolve() / STATE
    if not file.is_file():
        raise ValueError(f"{folder} is no box (it has no {STATE}); make one")
    state = json.loads(file.read_text())
    return Box(folder.resolve(), state["bridge"], tuple(Node(**node) for node in state["nodes"]))


def entering(box: Box, which: str, command: Sequence[str]) -> list[str]:
    """The command line that runs `command` on a node, in this working directory."""
    node = box.node(which)
    enter = ["nsenter", "--target", str(node.holder), "--net", "--mount", "--uts"]
    # No PID namespace: a node's launcher could not reach into another's from within its own.
    return [*enter, "sh", "-c", 'cd "$0" 2>/dev/null || cd /; exec "$@"', os.getcwd(), *command]


def set_link(box: Box, which: str, state: str) -> None:
    """state: "up" or "down"."""
    _call("ip", "link", "set", box.node(which).link, state)


def remove(folder: Path) -> None:
    """Every process of the box is asked to leave, then killed."""
    box = load(folder)
    _remove(box)
    (box.folder / STATE).unlink()


def _remove(box: Box) -> None:
    _signal(box.pids(), signal.SIGTERM)
    deadline = time.monotonic() + _LEAVE_SECONDS
    while (left := box.pids()) and time.monotonic() < deadline:
        time.sleep(0.2)
    _signal(left, signal.SIGKILL)
    _signal([node.holder for node in box.nodes if node.holder], signal.SIGKILL)
    for node in box.nodes:
        subprocess.run(["ip", "link", "del", node.link], capture_output=True)
        subprocess.run(["ip", "netns", "del", node.netns], capture_output=True)
    subprocess.run(["ip", "link", "del", box.bridge], capture_output=True)
    shutil.rmtree(box.folder / "of", ignore_errors=True)


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _write(box: Box) -> None:
    state = {"bridge": box.bridge, "nodes": [asdict(node) for node in box.nodes]}
    (box.folder / STATE).write_text(json.dumps(state, indent=1) + "\n")


def _clean_environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _CLEAN if name in os.environ}


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)}: {done.stderr.strip()}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("make", "on", "ssh", "down", "up", "remove"):
        one = commands.add_parser(name)
        one.add_argument("box", type=Path)
        if name == "make":
            one.add_argument("--nodes", type=int, default=2)
            one.add_argument("--shm", default="2g", help="size of each node's /dev/shm")
        elif name != "remove":
            one.add_argument("node", help="number, name or address")
        if name in ("on", "ssh"):
            one.add_argument("words", nargs=argparse.REMAINDER)
    given = parser.parse_args(argv)
    try:
        if given.command == "make":
            box = make(given.box, given.nodes, shm=given.shm)
            sys.stdout.write("".join(f"{node.name} {node.address}\n" for node in box.nodes))
        elif given.command == "remove":
            remove(given.box)
        elif given.command in ("up", "down"):
            set_link(load(given.box), given.node, given.command)
        else:
            line = entering(load(given.box), given.node, given.words)
            os.execvpe(line[0], line, dict(os.environ) if given.command == "on" else _clean_environment())
    except ValueError as error:
        sys.stderr.write(f"cluster_box: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
