"""A machine of trainer ranks dies in a cluster in a box that has a spare one: the run goes on there, from memory."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest
from by_hand import by_hand
from e2e.test_tiny_qwen3 import flags_of
from e2e.test_tiny_two_nodes import made

from tools import cluster_box
from tools.drills.scene import by_role, look_at
from tools.make_tiny_checkpoint import main as make_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cluster_box.why_not() is not None, reason=f"no cluster in a box: {cluster_box.why_not()}"),
]
ROOT = Path(__file__).resolve().parents[2]
RAY = ("--num-gpus=1", "--num-cpus=8", "--object-store-memory=200000000", "--disable-usage-stats")
DEVICES = ("--actor-num-nodes", 2, "--actor-num-gpus-per-node", 1, "--num-gpus-per-node", 1, "--rollout-num-gpus", 1)


@by_hand("a run of three minutes over four nodes")
def test_a_lost_machine_of_the_trainer_is_replaced_by_a_spare_one_from_the_snapshot_of_another(monkeypatch):
    for name, value in (("GLOO_SOCKET_IFNAME", "eth0"), ("RAY_AUTH_MODE", "token"), ("RAY_AUTH_TOKEN", secrets.token_hex(32))):
        monkeypatch.setenv(name, value)
    with made(4) as box:
        work = box.folder / "base"
        work.mkdir()
        make_checkpoint(["--preset", "qwen3", "--seed", "3", "--output", str(work / "model")])
        model = next(path.parent for path in (work / "model").rglob("config.json"))
        head = box.nodes[0].address
        for number, node in enumerate(box.nodes, 1):
            role = ["--head", "--port=6379", "--include-dashboard=false"] if number == 1 else [f"--address={head}:6379"]
            ray = [str(Path(sys.executable).with_name("ray")), "start", *role, f"--node-ip-address={node.address}", *RAY]
            subprocess.run(cluster_box.entering(box, number, ray), check=True, capture_output=True, timeout=120)
        flags = flags_of(
            model, work, "--snapshot-interval", 1, "--update-weight-transport", "nccl", "--num-rollout", 4, devices=DEVICES
        )
        environment = os.environ | {"RAY_ADDRESS": f"{head}:6379", "SLIME_RUN_DIR": str(work / "logs")}
        with (work / "said").open("w") as out:
            run = subprocess.Popen(
                cluster_box.entering(box, 1, [sys.executable, "-m", "slime.train", *flags]),
                cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        said = until(work / "said", r"rollout 2/4 \| ", run)
        ranks = [number for number in (1, 2, 3, 4) if roles(box, number)["trainer"]]
        assert len(ranks) == 2 and ranks[1] > 1 and roles(box, 1)["rollout"], said[-6000:]
        cluster_box.die(box, ranks[1])
        try:
            status = run.wait(400)
        finally:
            run.terminate()
        said = (work / "said").read_text()
        assert status == 0, said[-6000:]
        dead = box.nodes[ranks[1] - 1].address
        assert f"node {dead} is gone; waiting for a spare one with as many free devices" in said
        assert re.search(
            r"the trainer runs again after [\d.]+ s, from its snapshot of rollout \d: no finished rollout was lost", said
        )
        assert re.findall(r"rollout (\d)/4 \| ", said) == ["1", "2", "3", "4"]
        assert (work / "run" / "latest_checkpointed_iteration.txt").read_text().strip() == "3"


def roles(box: cluster_box.Box, number: int) -> dict:
    return by_role({pid: one for pid in box.node(number).pids() if (one := look_at(pid)) is not None})


def until(file: Path, pattern: str, run: subprocess.Popen) -> str:
    deadline = time.monotonic() + 400
    while not re.search(pattern, said := file.read_text()) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert re.search(pattern, said), said[-6000:]
    return said
