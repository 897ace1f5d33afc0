"""The tiny launcher over two nodes of a box: a pipeline stage and an engine on each, by a hostfile and a stand-in for ssh."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import audits
import pytest
from by_hand import by_hand

from tools import box_drill, cluster_box

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--num-rollout", "2", "--save-interval", "1",
    "--eval-interval", "1000", "--skip-eval-before-train", "--check-weight-update-equal",
)  # fmt: skip
MADE = ("arithmetic", *(f"GLM-5.2-tiny{which}" for which in ("", "-FP8", "_torch_dist", "_warm_start")))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cluster_box.why_not() is not None, reason=f"no cluster in a box: {cluster_box.why_not()}"),
]


def test_a_node_that_dies_is_named_and_the_same_command_goes_on_over_two_nodes_and_leaves_nothing(base, monkeypatch):
    monkeypatch.setenv("PASS_ENV", passed())
    with made(2) as box:
        for name in MADE if (base / MADE[-1]).exists() else ():  # else the launcher makes them here
            shutil.copytree(base / name, box.folder / "base" / name)
        first = box_drill.Launch(box, FLAGS)
        try:
            assert first.comes_to("train"), text(first)[-6000:]
            cluster_box.die(box, 2)
            first.until(lambda: False, seconds=240)
        finally:
            first.leave()
        told = [line for line in text(first).splitlines() if "the run stopped: " in line]
        assert told and all("node 10.98.0.2 is gone, training: " in line for line in told), told
        assert all(box_drill.says_all(line, ["10.98.0.2"]) for line in told), told
        assert first.process.returncode == 1
        until_empty(box)
        box = cluster_box.boot(cluster_box.load(box.folder), 2)
        logs = folders_of_ray(box)
        assert len(logs) == 1, "a launch that failed keeps its own"

        status, said = ended(box, launched(box))
        assert status == 0, said[-6000:]
        assert "1 other nodes joined" in said
        engines = dict(re.findall(r"engine (default-\w+-\d): ready at http://([\d.]+):", said))
        assert sorted(engines.values()) == ["10.98.0.1", "10.98.0.2"], engines
        assert re.search(r"trainer: 2 ranks = TP 1 x CP 1 x PP 2 x DP 1", said)
        read_back = re.findall(r"weights v2: (\d+) of \1 tensors read back equal from (default-\w+-\d)", said)
        assert len(read_back) == 2, said[-6000:]
        ((number, gap),) = re.findall(r"rollout (\d)/2 \| reward .* \| gap ([\d.]+) ", said)
        assert number == "2", "it went on behind the checkpoint of the first"
        assert float(gap) < 0.25, "float32 against weights rounded to FP8: hundredths, not units"
        saved = box.folder / "base" / "GLM-5.2-tiny_slime" / "latest_checkpointed_iteration.txt"
        assert saved.read_text().strip() == "1"
        until_empty(box)
        assert folders_of_ray(box) == logs
        assert not (box.folder / "base" / "run" / ".launched").exists()


def until_empty(box: cluster_box.Box) -> None:
    """A keeper looks every two seconds whether its launcher, or on another node its Ray, is there."""
    deadline = time.monotonic() + 60
    while (left := box_drill.left_on(box)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


def folders_of_ray(box: cluster_box.Box) -> list[Path]:
    return [folder for node in box.nodes for folder in box.tmp(node).glob("slime*")]


def text(launch: box_drill.Launch) -> str:
    return "\n".join(line.text for line in launch.lines)


@by_hand("a launch and an audit of three minutes")
def test_nothing_on_two_nodes_that_train_is_open_to_a_third():
    """Every listener of both nodes, called from there as another user, and from the third node, which is not of the run."""
    hook = ("--num-rollout", "1", "--custom-megatron-before-train-step-hook-path", "step_hook.wait")
    with made(3) as box:
        base, run = box.folder / "base", launched(box, *hook, PYTHONPATH=str(Path(__file__).with_name("hooks")))
        try:
            deadline = time.monotonic() + 600
            while not (base / "training").exists() and run.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            found = (
                audits.audited(base, "--outside", str(box.nodes[2].init), passed={}) if (base / "training").exists() else None
            )
        finally:
            base.mkdir(exist_ok=True)
            (base / "go").touch()
            status, said = ended(box, run)
        assert status == 0 and found is not None, said[-6000:]
        assert found["not_done"] == []
        audits.check(found, passed={})
        reached = {(row["who"], row["protocol"], row["verdict"]) for row in found["rows"] if row["outside"] == "reached"}
        # gloo's, which a rank opens at its node's address, take any connection and say nothing.
        assert {(who, verdict) for who, _, verdict in reached if verdict == "silent"} <= {("ray::TrainActor", "silent")}, (
            reached
        )
        assert {protocol for _, protocol, _ in reached} <= {"HTTP", "gRPC", ""}, reached
        nodes = {row["place"].rpartition(":")[0] for row in found["rows"] if row["who"] == "slime.engine.serve"}
        assert nodes >= {node.address for node in box.nodes[:2]}, nodes


def passed() -> str:
    return " ".join(name for name in ("RAY_worker_niceness",) if name in os.environ)


@contextmanager
def made(num_nodes: int) -> Iterator[cluster_box.Box]:
    with tempfile.TemporaryDirectory(prefix="box-", dir="/tmp") as folder:
        box = cluster_box.make(Path(folder) / "box", num_nodes)
        try:
            yield box
        finally:
            cluster_box.remove(box.folder)


def launched(box: cluster_box.Box, *more: str, **environment: str) -> subprocess.Popen:
    """The launcher on nodes 1 and 2."""
    tool, hosts = f"{sys.executable} {ROOT / 'tools' / 'cluster_box.py'}", box.folder / "two"
    hosts.write_text("".join(f"{node.address}\n" for node in box.nodes[:2]))
    settings = {
        "BASE_DIR": str(box.folder / "base"), "HOSTFILE": str(hosts), "MASTER_ADDR": box.nodes[0].address,
        "NUM_NODES": "2", "SFT_STEPS": "2", "SSH": f"{tool} ssh {box.folder}",
        "PASS_ENV": passed(),
    }  # fmt: skip
    command = cluster_box.entering(box, "1", ["bash", str(ROOT / "scripts" / "run-glm5.2-tiny.sh"), *FLAGS, *more])
    with (box.folder / "said").open("w") as out:
        return subprocess.Popen(command, env=os.environ | settings | environment, stdout=out, stderr=subprocess.STDOUT)


def ended(box: cluster_box.Box, run: subprocess.Popen) -> tuple[int, str]:
    """Status and what it said; after twenty minutes it is ended."""
    try:
        status = run.wait(1200)
    except subprocess.TimeoutExpired:
        run.terminate()
        status = run.wait(120)
    return status, (box.folder / "said").read_text()
