"""Real Ray nodes of this machine: four that lie about themselves, a launcher's own, and one that is joined by hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slime.engine.ports import FIRST_PORT
from tests.rehearse.recipes import ROOT

LIES = """
import os, pathlib, socket, time
# Ray's own agents on the node must stay sound.
lie = os.environ.get("LIE") if b"default_worker" in open("/proc/self/cmdline", "rb").read() else None
if lie == "second":
    true_time, true_exists = time.time, pathlib.Path.exists
    time.time = lambda: true_time() - 37.0
    socket.if_nameindex = lambda: [(1, "bond0")]
    pathlib.Path.exists = lambda self, **how: ".rehearse-driver" not in str(self) and true_exists(self, **how)
    def unreachable(*target, **how):
        raise TimeoutError("timed out")
    socket.create_connection = unreachable
if lie == "third":
    def listen(self, *backlog):
        raise OSError("No buffer space available")
    socket.socket.listen = listen
"""
CLUSTER = """
import json, os, sys
from ray.cluster_utils import Cluster

def patiently(start):
    # Ray gives a node 30 seconds to come up, whatever else the machine does.
    for attempt in range(8):
        try:
            return start()
        except Exception as error:
            if attempt == 7 or "timed out" not in str(error):
                raise

head = {"num_cpus": 1, "include_dashboard": False, "env_vars": json.loads(sys.argv[1])}
cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
for name, env in json.loads(sys.argv[2]).items():
    patiently(lambda: cluster.add_node(wait=False, num_cpus=1, node_name=name, env_vars=env))
cluster.wait_for_nodes()
os.environ["RAY_ADDRESS"] = cluster.address
from slime.preflight.command import main
try:
    status = main(sys.argv[3:])
finally:
    cluster.shutdown()
sys.exit(status)
"""


@pytest.mark.slow
def test_bad_nodes_of_a_real_cluster_are_named(tmp_path: Path) -> None:
    """Four Ray nodes on this machine. Each answers through a real actor; what the system tells it is changed on three."""
    shared, report = tmp_path / "shared", tmp_path / "report.json"
    shared.mkdir()

    def environment(name: str, *, gpus: int = 8, **lies: str) -> dict[str, str]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "nvidia-smi").write_text("#!/bin/sh\n" + gpus * "echo 'NVIDIA H100 80GB HBM3, 580.1, 81559, 81000'\n")
        (folder / "nvidia-smi").chmod(0o755)
        (folder / "sitecustomize.py").write_text(LIES)
        return {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": f"{folder}:{ROOT}", **lies}

    nodes = {
        "first": environment("first", gpus=7, http_proxy="http://proxy:8080"),
        "second": environment("second", LIE="second"),
        "third": environment("third", LIE="third"),
    }
    package = tmp_path / "first" / "numpy-0.0.1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.0.1\n")
    flags = ["--actor-num-nodes", "4", "--actor-num-gpus-per-node", "8", "--colocate", "--num-rollout", "1"]
    flags += ["--hf-checkpoint", str(shared / "GLM-5.2"), "--prompt-data", str(shared / "p.jsonl"), "--rollout-batch-size", "8"]
    own = ["--json", str(report), "--runtime-env", json.dumps({"env_vars": {"NCCL_SOCKET_IFNAME": "lo"}})]
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and k not in ("RAY_ADDRESS", "SOCKET_IFNAME")}
    child = subprocess.run(
        [sys.executable, "-c", CLUSTER, json.dumps(environment("head")), json.dumps(nodes), *own, *flags],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=ROOT,
        env={**env, "PYTHONPATH": str(ROOT), "NCCL_SOCKET_IFNAME": "of-this-shell"},
    )
    assert child.returncode == 1 and report.exists(), child.stdout[-2000:] + child.stderr[-2000:]
    found = {one["what"]: one["values"] for one in json.loads(report.read_text())["findings"] if one["severity"] == "violation"}
    wanted = {
        "GPUs of one kind, as many as wanted: not on 1 of 3 nodes": "(first): 7 GPUs, wanted 8",
        "no proxy stands between the nodes: not on 1 of 3 nodes": "(first): http_proxy=http://proxy:8080 for",
        "package versions differ on 1 nodes": "(first): numpy 0.0.1, the others",
        "clocks agree: not on 1 of 3 nodes": "(second): -3",
        "the network interface is there: not on 1 of 3 nodes": "(second): no lo; has bond0",
        "shared folders are seen, and written where the run writes: not on 1 of 3 nodes": "(second): ",
        "every node reaches every other: not on 1 of 3 nodes": "(second): ",
        "1 of 4 nodes did not answer": "(third): ",
    }
    # Room, free ports and whether GPU packages are installed are this machine's own affair.
    own_affair = ("room", "ports", "can be imported")
    assert {what for what in found if not any(words in what for words in own_affair)} == set(wanted)
    for what, values in wanted.items():
        nodes = re.findall(r"\(\w+\)", found[what])  # a node's name stands in parentheses
        assert values in found[what] and len(nodes) == (3 if "reaches" in what else 1), (what, found[what])
    assert "No buffer space available" in found["1 of 4 nodes did not answer"] and "timed out" in found[list(wanted)[6]]
    assert list(shared.iterdir()) == [], "nothing is left behind"


def _listening(port: int, patience: float = 240.0) -> socket.socket:
    """A listener on `port` once no engine of another test has it. One that stays longer is a user's, and listens itself.

    Without SO_REUSEADDR: with it we could listen where an engine only holds the port as yet, and that engine could not.
    """
    deadline = time.monotonic() + patience
    held = socket.socket()
    while time.monotonic() < deadline:
        try:
            held.bind(("", port))
        except OSError:
            time.sleep(0.1)
        else:
            held.listen(1)
            break
    return held


@pytest.mark.slow
def test_a_launcher_asks_its_own_cluster_and_stops_it(tmp_path: Path) -> None:
    """bash run-glm5.2-tiny.sh --preflight: one real Ray node on CPUs, with the engines' first port taken."""
    report = tmp_path / "report.json"
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and k not in ("RAY_ADDRESS", "SOCKET_IFNAME")}
    with _listening(FIRST_PORT):
        child = subprocess.run(
            ["bash", str(ROOT / "scripts" / "run-glm5.2-tiny.sh"), "--preflight", "--json", str(report)],
            env={**env, "BASE_DIR": str(tmp_path), "PYTHON": sys.executable, "RAY_TEMP_DIR": f"/tmp/slime-pf-{os.getpid()}"},
            capture_output=True,
            text=True,
            timeout=400,
        )
    shutil.rmtree(f"/tmp/slime-pf-{os.getpid()}", ignore_errors=True)
    assert child.returncode == 1 and report.exists(), child.stdout[-2000:] + child.stderr[-2000:]
    told = json.loads(report.read_text())
    found = {one["what"]: one for one in told["findings"]}
    busy = found["ports are free: not on 1 of 1 nodes"]
    # The second port that is asked for may belong to an engine of another test.
    assert busy["severity"] == "violation" and re.search(rf": {FIRST_PORT}(, {FIRST_PORT + 1})?$", busy["values"])
    bad = [what for what, one in found.items() if one["severity"] == "violation" and "room" not in what]
    assert bad == [busy["what"]] and found["no GPUs, as the run computes on CPUs"]["severity"] == "ok"
    assert found["shared folders are seen, and written where the run writes"]["severity"] == "ok"
    assert list(told["nodes"][0]["shared"]) == [str(tmp_path), str(tmp_path / "arithmetic")]
    assert "the Ray cluster of this run is stopped" in child.stderr
    made = ["GLM-5.2-tiny", "GLM-5.2-tiny-FP8", "arithmetic", "report.json", "run"]
    assert sorted(path.name for path in tmp_path.iterdir()) == made, "nothing was converted, trained or saved"


def _free_ports(count: int) -> list[str]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("", 0))
    return [str(one.getsockname()[1]) for one in held]


def _lines_until(stream, words: str) -> str:
    """All that is said up to the line with `words`, which comes before the end."""
    said = ""
    for line in stream:
        said += line
        if words in line:
            return said
    raise AssertionError(f"{words!r} is not in:\n{said[-3000:]}")


def _as_of_another_machine(script: Path, folder: Path) -> None:
    """Another machine has a folder of its own at the path in the script, and none of the launcher's processes."""
    folder.mkdir()
    text = script.read_text()
    for assigned, own in ((r"^folder=(\S+)$", str(folder)), (r"^export SLIME_LAUNCH=(\w+)$", "f" * 32)):
        text = text.replace(re.search(assigned, text, re.MULTILINE)[1], own)
    script.write_text(text)


@pytest.mark.slow
def test_a_node_that_is_joined_by_hand_is_waited_for(tmp_path: Path) -> None:
    """The 744B launcher without a hostfile, for two nodes of 64 slots each: the second joins by the printed line, and late."""
    report, ray_folder = tmp_path / "report.json", f"/tmp/slime-pj-{os.getpid()}"
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and k not in ("RAY_ADDRESS", "HOSTFILE")}
    ports = _free_ports(2)
    env |= {"BASE_DIR": str(tmp_path), "RUN_DIR": str(tmp_path / "run"), "MASTER_ADDR": "127.0.0.1", "PYTHON": sys.executable}
    env |= {"NUM_NODES": "2", "NUM_GPUS": "64", "LOGICAL_GPUS": "1", "RAY_PORT": ports[0], "RAY_DASHBOARD_PORT": ports[1]}
    command = ["bash", str(ROOT / "scripts" / "run-glm5.2-744B-A40B.sh"), "--preflight", "--json", str(report)]
    launcher = subprocess.Popen(
        command, env=env | {"RAY_TEMP_DIR": ray_folder}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    node = None
    try:
        said = _lines_until(launcher.stdout, "preflight: 1 of 2 nodes have joined (0 s, at most 1800)")
        script = Path(re.search(r"on each of the other 1 nodes: bash (.*)", said)[1])
        _as_of_another_machine(script, tmp_path / "there")
        node = subprocess.Popen(
            ["bash", str(script)], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        said += launcher.communicate(timeout=300)[0]
    finally:
        launcher.kill()
        if node is not None:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()
        shutil.rmtree(ray_folder, ignore_errors=True)
    told = json.loads(report.read_text())
    found = {one["what"]: one["severity"] for one in told["findings"]}
    assert found["2 nodes are in the Ray cluster"] == found["every node answers"] == "ok", said[-3000:]
    assert found["every node reaches every other"] == "ok" and len(told["nodes"]) == 2
    assert not (tmp_path / "run" / "join.sh").exists() and "the Ray cluster of this run is stopped" in said
