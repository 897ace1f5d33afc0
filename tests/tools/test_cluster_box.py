"""Nodes on one machine: what each has for itself, what they share, and that nothing is left of them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import cluster_box

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(cluster_box.why_not() is not None, reason=f"no cluster in a box: {cluster_box.why_not()}")


def tool(*words: object, stdin: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "cluster_box.py"), *map(str, words)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60)


def said(*words: object, stdin: str = "") -> str:
    done = tool(*words, stdin=stdin)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def box() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="box-", dir="/tmp") as folder:
        path = Path(folder) / "box"
        said("make", path, "--nodes", 2)
        yield path
        if (path / cluster_box.STATE).exists():
            said("remove", path)


def test_each_node_has_a_name_an_address_and_folders_of_its_own(box: Path):
    assert (box / "hostfile").read_text().split() == ["10.98.0.1", "10.98.0.2"]
    names = [said("on", box, number, "hostname") for number in (1, 2)]
    assert names == ["node1", "node2"]
    for folder in ("/tmp", "/dev/shm"):
        said("on", box, 1, "touch", f"{folder}/of-node1")
        assert tool("on", box, 2, "ls", f"{folder}/of-node1").returncode == 2, f"{folder} is shared"
        assert not Path(f"{folder}/of-node1").exists()
    said("on", box, 1, "touch", box / "shared")
    said("on", box, 2, "ls", box / "shared")


SERVER = "import socket; s = socket.create_server(('0.0.0.0', 5000)); print('up', flush=True); s.accept()[0].sendall(b'hello')"
CLIENT = "import socket; print(socket.create_connection(('node1', 5000), 2).recv(5).decode())"


def test_nodes_reach_one_another_by_name_until_a_link_is_down_and_the_machine_reaches_none(box: Path):
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "cluster_box.py"), "on", str(box), "1", sys.executable, "-c", SERVER],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdout.readline() == "up\n"
    outside = subprocess.run([sys.executable, "-c", CLIENT.replace("node1", "10.98.0.1")], capture_output=True, text=True)
    assert outside.returncode == 1
    linked = "from slime.ray.interfaces import has_carrier; print(*map(has_carrier, ('10.98.0.2', '127.0.0.1', '10.9.9.9')))"
    assert said("on", box, 2, sys.executable, "-c", linked) == "True True True"
    said("down", box, "node2")
    assert said("on", box, 2, sys.executable, "-c", linked) == "False True True"
    assert tool("on", box, 2, sys.executable, "-c", CLIENT).returncode == 1
    said("up", box, 2)
    # The bridge takes a moment to forward again.
    deadline = time.monotonic() + 30
    while (answer := tool("on", box, 2, sys.executable, "-c", CLIENT)).returncode and time.monotonic() < deadline:
        time.sleep(0.2)
    assert answer.stdout == "hello\n", answer.stderr
    assert server.wait(30) == 0


def login(box: Path, words: str, stdin: str = "") -> subprocess.CompletedProcess:
    """From node 1 to node 2, as a launcher does it."""
    return tool("on", box, 1, sys.executable, ROOT / "tools" / "cluster_box.py", "ssh", box, "10.98.0.2", words, stdin=stdin)


def test_the_stand_in_for_ssh_runs_a_script_with_a_clean_environment(box: Path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "of another cluster")
    done = login(box, "bash -s", stdin="hostname; echo ${RAY_ADDRESS:-none}; echo trouble >&2; exit 7")
    assert (done.returncode, done.stdout.split(), done.stderr) == (7, ["node2", "none"], "trouble\n")
    assert said("on", box, 2, "sh", "-c", "echo $RAY_ADDRESS") == "of another cluster"


def test_no_node_sees_anothers_processes_and_no_orphan_stays(box: Path):
    # The sleeper's parent ends at once, so that the node's first process inherits it; so does the one that ends soon.
    login(box, "bash -s", stdin="setsid sleep 543 >/dev/null 2>&1 & setsid sleep 0.1 >/dev/null 2>&1 &")
    assert "sleep 543" in said("on", box, 2, "ps", "-e", "-o", "args=")
    assert "sleep 543" not in said("on", box, 1, "ps", "-e", "-o", "args=")
    deadline = time.monotonic() + 20
    while "sleep 0.1" in (left := said("on", box, 2, "ps", "-e", "-o", "stat=,args=")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "defunct" not in left and "sleep 0.1" not in left


def test_a_signal_reaches_the_command_on_the_node_once(box: Path):
    counts = "import signal, time; n = []; signal.signal(15, lambda *_: n.append(1)); print('up', flush=True)\n"
    counts += "while not n: time.sleep(0.05)\ntime.sleep(0.5); print(len(n))"
    line = cluster_box.entering(cluster_box.load(box), 1, [sys.executable, "-c", counts])
    on = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    assert on.stdout.readline() == "up\n"
    on.terminate()
    assert (on.wait(30), on.stdout.read()) == (0, "1\n")


def test_a_node_dies_with_all_its_processes_and_boots_empty(box: Path):
    login(box, "bash -s", stdin="setsid sleep 544 >/dev/null 2>&1 & touch /tmp/mine /dev/shm/mine")
    victim = cluster_box.load(box).node(2)
    assert len(victim.pids()) >= 1
    said("die", box, 2)
    assert [pid for pid in victim.pids() if Path(f"/proc/{pid}").exists()] == []
    refused = login(box, "hostname")
    assert (refused.returncode, refused.stderr) == (255, "10.98.0.2: [Errno 111] Connection refused\n")
    assert tool("on", box, 2, "true").stderr == "cluster_box: node2 is dead; boot it first\n"
    said("boot", box, 2, "--env", "CLOCK=other")
    assert login(box, "echo $CLOCK; ls /tmp/mine /dev/shm/mine 2>/dev/null").stdout == "other\n"


def test_parted_nodes_reach_each_other_alone_and_clocks_since_boot_differ(box: Path):
    said("part", box, 2)
    knock = "import socket; socket.create_connection(('node2', 22), 1)"
    assert "Error" in tool("on", box, 1, sys.executable, "-c", knock).stderr
    said("up", box, 2)
    assert login(box, "hostname").stdout == "node2\n"
    clocks = [float(said("on", box, number, "cat", "/proc/uptime").split()[0]) for number in (1, 2)]
    assert 990 < clocks[1] - clocks[0] < 1090


def exchange(box: Path, client: str, *, server: str) -> str:
    """What a program on node 2 says that talks to one on node 1."""
    other = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "cluster_box.py"), "on", str(box), "1", sys.executable, "-c", server],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout.readline() == "up\n"
    told = said("on", box, 2, sys.executable, "-c", client)
    return f"{told} {other.communicate(timeout=30)[0].strip()}"


ECHO = """
import hashlib, socket
server = socket.create_server(("0.0.0.0", 5001))
print("up", flush=True)
one = server.accept()[0]
for _ in range(5):
    one.sendall(one.recv(1))
whole = b""
while part := one.recv(1 << 20):
    whole += part
print(len(whole), hashlib.sha256(whole).hexdigest()[:16])
"""
ASK = """
import hashlib, random, socket, time
one, took = socket.create_connection(("node1", 5001), 20), []
for _ in range(5):
    began = time.monotonic()
    one.sendall(b"?")
    one.recv(1)
    took.append(time.monotonic() - began)
whole = random.Random(0).randbytes(3 << 20)
one.sendall(whole)
one.close()
print(min(took), hashlib.sha256(whole).hexdigest()[:16])
"""
COUNT = """
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("0.0.0.0", 5002))
server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
server.settimeout(1)
print("up", flush=True)
got = set()
try:
    while True:
        got.add(server.recv(9))
except TimeoutError:
    print(len(got))
"""
SHOWER = """
import socket
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for number in range(300):
    one.sendto(b"%d" % number, ("node1", 5002))
"""


def test_a_delayed_link_carries_all_late_and_a_lossy_one_a_share_until_it_is_up_again(box: Path):
    names = {path.name for path in Path("/sys/class/net").iterdir()}
    said("delay", box, 2, "--ms", 60)
    deadline = time.monotonic() + 30  # the bridge takes a moment to forward
    while tool("on", box, 2, sys.executable, "-c", "import socket; socket.create_connection(('node1', 22), 3)").returncode:
        assert time.monotonic() < deadline
    took, sent, size, came = exchange(box, ASK, server=ECHO).split()
    assert float(took) >= 2 * 0.060, "there and back"
    assert (int(size), came) == (3 << 20, sent), "large frames and unfinished checksums are carried as they are"
    said("delay", box, 2, "--ms", 1, "--loss", 0.25)
    relay = cluster_box.load(box).node(2).relay
    # Sent are 300, of which each is lost with a chance of a quarter: 225 come, within eight standard deviations.
    assert 165 < int(exchange(box, SHOWER, server=COUNT)) < 285
    said("up", box, 2)
    assert {path.name for path in Path("/sys/class/net").iterdir()} == names
    assert cluster_box.load(box).node(2).relay == 0
    while os.path.exists(f"/proc/{relay}") and "Z" not in Path(f"/proc/{relay}/stat").read_text():
        assert time.monotonic() < deadline + 60
    assert tool("delay", box, 2, "--ms", 1, "--loss", 2).stderr.startswith("cluster_box: --ms 1.0 --loss 2.0: a delay is at")


def test_a_project_in_tmp_is_told_that_nodes_do_not_see_it(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(cluster_box, "LOGIN", Path("/tmp/project/tools/box_login.py"))
    with pytest.raises(ValueError, match=r"^/tmp/project/tools/box_login\.py is in /tmp, where a node has files of its own"):
        cluster_box.make(tmp_path, 2)


def test_mistakes_are_told_in_a_line(box: Path, tmp_path: Path):
    for words, told in (
        (("make", box), f"{box} is a box already; remove it first, or name another folder"),
        (("make", tmp_path, "--nodes", 9), "--nodes 9: a box has 2 to 8 nodes"),
        (("on", box, "7", "true"), f"{box} has no node 7; there are node1, node2"),
        (("remove", tmp_path), f"{tmp_path} is no box (it has no box.json); make one"),
    ):
        done = tool(*words)
        assert (done.returncode, done.stderr) == (1, f"cluster_box: {told}\n")


def test_a_removed_box_leaves_no_process_no_link_and_no_folder(box: Path):
    """The last of this file: it takes the box away."""
    made = cluster_box.load(box)
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(100)"
    login(box, "bash -s", stdin=f'setsid {sys.executable} -c "{code}" >/dev/null 2>&1 </dev/null &')
    left = [*made.pids(), *(node.init for node in made.nodes)]
    assert len(left) >= 3
    said("remove", box)
    assert [pid for pid in left if os.path.exists(f"/proc/{pid}")] == []
    names = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True).stdout
    names += subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
    assert made.bridge not in names and made.nodes[0].netns not in names
    assert sorted(path.name for path in box.iterdir()) == ["hostfile", "hosts", "shared"]
