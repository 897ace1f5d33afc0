"""A cluster in a box: nodes on one machine, each with a network, processes, a host name, /dev/shm and /tmp of its own.

    .venv/bin/python tools/cluster_box.py make BOX --nodes 2       (as root; BOX is a folder, which all nodes share)
    .venv/bin/python tools/cluster_box.py on BOX 1 COMMAND...      runs a command on node 1, with this environment
    .venv/bin/python tools/cluster_box.py down BOX 2               takes the link of node 2 down; `up` brings it back
    .venv/bin/python tools/cluster_box.py slow BOX 2 --mbit 2      what comes to node 2 comes slowly; `up` takes that back too
    .venv/bin/python tools/cluster_box.py delay BOX 2 --ms 50 --loss 0.01    frames come late, or never, until `up`
    .venv/bin/python tools/cluster_box.py part BOX 3 4             nodes 3 and 4 reach each other alone; `up` joins one again
    .venv/bin/python tools/cluster_box.py die BOX 2                ends every process of node 2; `boot` starts it again, empty
    .venv/bin/python tools/cluster_box.py remove BOX               ends every process of every node, and the box

BOX/hostfile names the nodes. A launcher runs on node 1 and reaches the others by a stand-in for ssh (tools/box_login.py):

    HOSTFILE=BOX/hostfile MASTER_ADDR=10.98.0.1 SSH="$PYTHON tools/cluster_box.py ssh BOX"

A node is a network, a PID, a mount, a UTS and a time namespace; clocks since boot differ from node to node, as those of
machines do. Its first process, an init that serves the stand-in for ssh, is the node: when it ends, the kernel ends all others.
A bridge joins the nodes. It has no address, so nothing of the box is reached from the machine's own network, nor the other way.
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

try:
    from tools import box_login
except ImportError:  # run as a program
    import box_login

STATE = "box.json"
MOST_NODES = 8
LOGIN, RELAY = (Path(__file__).with_name(name) for name in ("box_login.py", "box_relay.py"))
_NETWORK = "10.98.0"
_BOOT_SECONDS = 10.0
_SECONDS_APART = 1000
"""Between the clocks since boot of two nodes."""
_CLEAN = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG")
"""What a login by ssh would have of this environment."""
_NAMESPACES = ("--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "--time")

# A node's init, run in the new namespaces: a /tmp of the node's own, in which the box stays visible, a /dev/shm and a hosts
# file; then the stand-in for sshd. Bash, because it waits for the orphans that a first process gets.
_INIT = """
set -eu
mount --make-rprivate /
mkdir -p "$TMP_OF_NODE$BOX"
mount --rbind "$BOX" "$TMP_OF_NODE$BOX"
mount -t tmpfs -o "size=$SHM,mode=1777" tmpfs /dev/shm
mount --bind "$BOX/hosts" /etc/hosts
hostname "$NAME"
ip link set lo up
mkdir -p "$TMP_OF_NODE/tmp"
chmod 1777 "$TMP_OF_NODE/tmp"
case "$BOX" in /tmp/*) mount --rbind "$TMP_OF_NODE/tmp" /tmp ;; *) mount --bind "$TMP_OF_NODE/tmp" /tmp ;; esac
cd /
login=("$PYTHON" -I -S "$LOGIN" serve 0.0.0.0)
unset TMP_OF_NODE BOX SHM NAME PYTHON LOGIN
"${login[@]}" &
wait
"""


@dataclass(frozen=True)
class Node:
    name: str
    """Its host name."""
    address: str
    netns: str
    link: str
    """The bridge's end of its cable."""
    shm: str
    """Size of its /dev/shm."""
    init: int = 0
    """Process id, as the machine counts, of the node's first process; 0: the node is dead."""
    relay: int = 0
    """Of the program that its frames go through; 0: none."""

    @property
    def port(self) -> str:
        """The link that is plugged into the bridge."""
        return f"{self.link}r" if self.relay else self.link

    def pids(self) -> list[int]:
        """Its processes, as the machine counts them, but the init and the stand-in for sshd."""
        if not (space := _pid_space(self.init)):
            return []
        return [pid for pid in _all_pids() if pid != self.init and _pid_space(pid) == space and not _serves_logins(pid)]


@dataclass(frozen=True)
class Box:
    folder: Path
    bridge: str
    nodes: tuple[Node, ...]

    def node(self, which: str | int) -> Node:
        """By number from 1, name or address. Raises ValueError."""
        for number, node in enumerate(self.nodes, 1):
            if str(which) in (str(number), node.name, node.address):
                return node
        raise ValueError(f"{self.folder} has no node {which}; there are {', '.join(node.name for node in self.nodes)}")

    def pids(self) -> list[int]:
        """The same of every node."""
        return [pid for node in self.nodes for pid in node.pids()]

    def tmp(self, node: Node) -> Path:
        """Where the node's /tmp is on the machine."""
        return self.folder / "of" / node.name / "tmp"

    @property
    def other_bridge(self) -> str:
        """Of the nodes that are parted from the rest."""
        return f"{self.bridge}x"


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _pid_space(pid: int) -> str:
    """Which PID namespace; "" for a process that is gone."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid") if pid else ""
    except OSError:
        return ""


def _serves_logins(pid: int) -> bool:
    return _words(pid)[3:5] == [os.fsencode(LOGIN), b"serve"]


def _words(pid: int) -> list[bytes]:
    """Its command line; [] for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") if pid else []
    except OSError:
        return []


def why_not() -> str | None:
    """Why no box can be made here; None where one can."""
    if os.geteuid() != 0:
        return "namespaces with a network need root"
    lacking = [name for name in ("ip", "nsenter", "unshare", "mount", "bash") if shutil.which(name) is None]
    if lacking:
        return f"no command {', '.join(lacking)}"
    tried = subprocess.run(["unshare", "--net", *_NAMESPACES, "mount", "--make-rprivate", "/"], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"this container makes no namespaces: {tried.stderr.strip()}"


def make(folder: Path, num_nodes: int, *, shm: str = "2g") -> Box:
    """Raises ValueError where that is not possible; a box that is half made is removed again."""
    if reason := why_not():
        raise ValueError(f"no cluster in a box: {reason}")
    if not 2 <= num_nodes <= MOST_NODES:
        raise ValueError(f"--nodes {num_nodes}: a box has 2 to {MOST_NODES} nodes")
    if hidden := [path for path in (sys.executable, str(LOGIN.absolute())) if path.startswith("/tmp/")]:
        raise ValueError(f"{hidden[0]} is in /tmp, where a node has files of its own: put project and environment elsewhere")
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
            box = replace(box, nodes=(*box.nodes, Node(name, address, f"slime-{mark}-{number}", f"sb{mark}-{number}", shm)))
            _plug_in(box, box.nodes[-1])
            box = boot(box, name)
    except BaseException:
        _remove(box)
        raise
    return box


def _plug_in(box: Box, node: Node) -> None:
    _call("ip", "netns", "add", node.netns)
    _call("ip", "link", "add", node.link, "type", "veth", "peer", "name", "eth0", "netns", node.netns)
    _call("ip", "link", "set", node.link, "master", box.bridge, "up")
    _call("ip", "-n", node.netns, "addr", "add", f"{node.address}/24", "dev", "eth0")
    _call("ip", "-n", node.netns, "link", "set", "eth0", "up")
    _call("ip", "-n", node.netns, "route", "add", "default", "dev", "eth0")


def boot(box: Box, which: str | int, env: Mapping[str, str] | None = None) -> Box:
    """Start a node that is dead, with nothing in its /tmp and /dev/shm. env: what logins have there beside the usual."""
    node = box.node(which)
    if _pid_space(node.init):
        raise ValueError(f"{node.name} runs (process {node.init}); end it first (die)")
    own = box.folder / "of" / node.name
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    settle = {
        "BOX": str(box.folder), "TMP_OF_NODE": str(own), "NAME": node.name, "SHM": node.shm,
        "PYTHON": sys.executable, "LOGIN": str(LOGIN),
    }  # fmt: skip
    apart = str(_SECONDS_APART * (box.nodes.index(node) + 1))
    line = ["unshare", *_NAMESPACES, "--monotonic", apart, "--boottime", apart, "bash", "-c", _INIT]
    with (own / "init.log").open("w") as log:
        parent = subprocess.Popen(
            ["ip", "netns", "exec", node.netns, *line],
            env=_clean_environment() | (env or {}) | settle, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + _BOOT_SECONDS
    while "ready" not in (said := (own / "init.log").read_text()):
        if parent.poll() is not None or time.monotonic() > deadline:
            parent.kill()
            raise ValueError(f"{node.name} did not come up: {said.strip()}")
        time.sleep(0.02)
    (init,) = map(int, Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split())
    parent.returncode = 0  # it ends with the init, which outlives this program
    return _write(box, replace(node, init=init))


def die(box: Box, which: str | int) -> Box:
    """End the node's first process, and so every one of the node's. Its link stays: what comes for it is refused."""
    node = box.node(which)
    if node.init:
        os.kill(node.init, signal.SIGKILL)
        while _pid_space(node.init):
            time.sleep(0.01)
    return _write(box, replace(node, init=0))


def load(folder: Path) -> Box:
    """Raises ValueError where the folder is no box."""
    file = folder.resolve() / STATE
    if not file.is_file():
        raise ValueError(f"{folder} is no box (it has no {STATE}); make one")
    state = json.loads(file.read_text())
    return Box(folder.resolve(), state["bridge"], tuple(Node(**node) for node in state["nodes"]))


def entering(box: Box, which: str | int, command: Sequence[str]) -> list[str]:
    """The command line that runs `command` on a node, in this working directory and environment."""
    return [sys.executable, __file__, "on", str(box.folder), str(which), *command]


def run_on(box: Box, which: str | int, command: Sequence[str]) -> int:
    """The status of the command, which gets the signals that this process gets."""
    node = box.node(which)
    if not _pid_space(node.init):
        raise ValueError(f"{node.name} is dead; boot it first")
    enter = ["nsenter", "--target", str(node.init), "--net", "--mount", "--uts", "--time", "--pid"]
    # The stand-in for a login's own session: a Ctrl-C comes to this process, which passes it on once.
    command = ["sh", "-c", 'cd "$0" 2>/dev/null || cd /; exec "$@"', os.getcwd(), *command]
    entered = subprocess.Popen([*enter, *command], start_new_session=True)

    def pass_on(number: int, frame: object) -> None:
        children = Path(f"/proc/{entered.pid}/task/{entered.pid}/children").read_text()
        _signal([int(pid) for pid in children.split()], signal.Signals(number))

    for one in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(one, pass_on)
    status = entered.wait()
    return status if status >= 0 else 128 - status


def set_link(box: Box, which: str | int, state: str) -> None:
    """state: "up" or "down". Up is as it was made: as fast, and with all others."""
    node = box.node(which)
    _call("ip", "link", "set", node.link, state)
    if state == "up":
        if node.relay:
            _end_relay(node)
            _write(box, replace(node, relay=0))
        _call("ip", "link", "set", node.link, "master", box.bridge)
        for inside, link in _ends(node):
            subprocess.run([*inside, "tc", "qdisc", "del", "dev", link, "root"], capture_output=True)


def delay(box: Box, which: str | int, *, milliseconds: float, loss: float = 0.0) -> Box:
    """Every frame to the node and from it comes so much later; `loss`, a share, never comes. In the place of a delay before."""
    if not (milliseconds >= 0 and 0 <= loss <= 1):
        raise ValueError(f"--ms {milliseconds} --loss {loss}: a delay is at least 0, and a loss a share from 0 to 1")
    set_link(box, which, "up")
    box = load(box.folder)
    node = box.node(which)
    relayed = f"{node.link}p"
    _call("ip", "link", "set", node.link, "nomaster")
    _call("ip", "link", "add", f"{node.link}r", "type", "veth", "peer", "name", relayed)
    words = [node.link, relayed, "--ms", str(milliseconds), "--loss", str(loss)]
    relay = subprocess.Popen(
        [sys.executable, "-I", "-S", str(RELAY), *words], env=_clean_environment(),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    relay.returncode = 0  # it outlives this program
    box = _write(box, replace(node, relay=relay.pid))
    _call("ip", "link", "set", relayed, "up")
    _call("ip", "link", "set", box.node(which).port, "master", box.bridge, "up")
    if relay.stdout.readline() != b"ready\n":
        raise ValueError(f"the relay of {node.name} did not come up; this kernel may have no packet sockets")
    return box


def _end_relay(node: Node) -> None:
    """It ends by itself when a link of it is gone."""
    subprocess.run(["ip", "link", "del", f"{node.link}r"], capture_output=True)
    if os.fsencode(RELAY) in _words(node.relay):
        _signal([node.relay], signal.SIGKILL)


def slow(box: Box, which: str | int, mbit: float) -> None:
    """A token bucket at both ends of the node's cable."""
    for inside, link in _ends(box.node(which)):
        bucket = ["rate", f"{mbit}mbit", "burst", "64kb", "latency", "500ms"]
        _call(*inside, "tc", "qdisc", "replace", "dev", link, "root", "tbf", *bucket)


def _ends(node: Node) -> list[tuple[list[str], str]]:
    return [([], node.link), (["ip", "netns", "exec", node.netns], "eth0")]


def part(box: Box, which: Sequence[str | int]) -> None:
    """These nodes reach each other, and nobody of the rest."""
    subprocess.run(["ip", "link", "add", box.other_bridge, "type", "bridge"], capture_output=True)  # it may be there
    _call("ip", "link", "set", box.other_bridge, "up")
    for one in which:
        _call("ip", "link", "set", box.node(one).port, "master", box.other_bridge)


def remove(folder: Path) -> None:
    """With every process of every node."""
    box = load(folder)
    _remove(box)
    (box.folder / STATE).unlink()


def _remove(box: Box) -> None:
    _signal([node.init for node in box.nodes if node.init], signal.SIGKILL)
    for node in box.nodes:
        while _pid_space(node.init):
            time.sleep(0.01)
        _end_relay(node)
        subprocess.run(["ip", "link", "del", node.link], capture_output=True)
        subprocess.run(["ip", "netns", "del", node.netns], capture_output=True)
    for bridge in (box.bridge, box.other_bridge):
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)
    shutil.rmtree(box.folder / "of", ignore_errors=True)


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _write(box: Box, node: Node) -> Box:
    """The box with that node in the place of the one of its name, also in the box's file."""
    box = replace(box, nodes=tuple(node if one.name == node.name else one for one in box.nodes))
    state = {"bridge": box.bridge, "nodes": [asdict(one) for one in box.nodes]}
    (box.folder / STATE).write_text(json.dumps(state, indent=1) + "\n")
    return box


def _clean_environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _CLEAN if name in os.environ}


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)}: {done.stderr.strip()}")


def main(argv: list[str]) -> int:
    if argv[:1] == ["ssh"]:  # from one node to another, over their network: BOX ADDRESS WORDS...
        return box_login.main(["ask", *argv[2:]])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("make", "on", "down", "up", "slow", "delay", "part", "die", "boot", "remove"):
        one = commands.add_parser(name)
        one.add_argument("box", type=Path)
        if name == "make":
            one.add_argument("--nodes", type=int, default=2)
            one.add_argument("--shm", default="2g", help="size of each node's /dev/shm")
        elif name != "remove":
            one.add_argument("node", nargs="+" if name == "part" else None, help="number, name or address")
        if name == "on":
            one.add_argument("words", nargs=argparse.REMAINDER)
        elif name == "slow":
            one.add_argument("--mbit", type=float, required=True, help="megabits a second, to the node and from it")
        elif name == "delay":
            one.add_argument("--ms", type=float, required=True, help="milliseconds, to the node and again from it")
            one.add_argument("--loss", type=float, default=0.0, help="share of frames, e.g. 0.01")
        elif name == "boot":
            one.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for every login there")
    given = parser.parse_args(argv)
    try:
        return _do(given)
    except ValueError as error:
        sys.stderr.write(f"cluster_box: {error}\n")
        return 1


def _do(given: argparse.Namespace) -> int:
    if given.command == "make":
        made = make(given.box, given.nodes, shm=given.shm)
        sys.stdout.write("".join(f"{node.name} {node.address}\n" for node in made.nodes))
        return 0
    if given.command == "remove":
        remove(given.box)
        return 0
    box = load(given.box)
    if given.command == "on":
        return run_on(box, given.node, given.words)
    if given.command in ("up", "down"):
        set_link(box, given.node, given.command)
    elif given.command == "slow":
        slow(box, given.node, given.mbit)
    elif given.command == "delay":
        delay(box, given.node, milliseconds=given.ms, loss=given.loss)
    elif given.command == "part":
        part(box, given.node)
    elif given.command == "die":
        die(box, given.node)
    else:
        boot(box, given.node, dict(word.split("=", 1) for word in given.env))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
