"""The tiny launcher over two nodes of a box: a pipeline stage and an engine on each, by a hostfile and a stand-in for ssh."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tools import cluster_box

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cluster_box.why_not() is not None, reason=f"no cluster in a box: {cluster_box.why_not()}"),
]


def test_the_launcher_trains_over_two_nodes_and_leaves_nothing_on_them():
    with tempfile.TemporaryDirectory(prefix="box-", dir="/tmp") as folder:
        box = cluster_box.make(Path(folder) / "box", 2)
        try:
            status, said = launched(box)
            assert status == 0, said[-6000:]
            assert "1 other nodes joined" in said
            engines = dict(re.findall(r"engine (default-\w+-\d): ready at http://([\d.]+):", said))
            assert sorted(engines.values()) == ["10.98.0.1", "10.98.0.2"], engines
            assert re.search(r"trainer: 2 ranks = TP 1 x CP 1 x PP 2 x DP 1", said)
            read_back = re.findall(r"weights v2: (\d+) of \1 tensors read back equal from (default-\w+-\d)", said)
            assert len(read_back) == 2, said[-6000:]
            (gap,) = re.findall(r"rollout 1/1 \| reward .* \| gap ([\d.]+) ", said)
            assert float(gap) < 0.25, "float32 against weights rounded to FP8: hundredths, not units"
            saved = box.folder / "base" / "GLM-5.2-tiny_slime" / "latest_checkpointed_iteration.txt"
            assert saved.read_text().strip() == "0"
            # A keeper looks every two seconds whether its launcher, or on another node its Ray, is there.
            deadline = time.monotonic() + 60
            while box.pids() and time.monotonic() < deadline:
                time.sleep(0.2)
            assert box.pids() == []
            assert [path for node in box.nodes for path in (box.folder / "of" / node.name / "tmp").glob("slime*")] == []
        finally:
            cluster_box.remove(box.folder)


def launched(box: cluster_box.Box) -> tuple[int, str]:
    tool = f"{sys.executable} {ROOT / 'tools' / 'cluster_box.py'}"
    settings = {
        "BASE_DIR": str(box.folder / "base"), "HOSTFILE": str(box.folder / "hostfile"), "MASTER_ADDR": box.nodes[0].address,
        "NUM_NODES": "2", "SFT_STEPS": "2", "SSH": f"{tool} ssh {box.folder}",
    }  # fmt: skip
    flags = (
        "--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--num-rollout", "1", "--save-interval", "1",
        "--eval-interval", "1000", "--skip-eval-before-train", "--check-weight-update-equal",
    )  # fmt: skip
    command = cluster_box.entering(box, "1", ["bash", str(ROOT / "scripts" / "run-glm5.2-tiny.sh"), *flags])
    done = subprocess.run(
        command, env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    return done.returncode, done.stdout
