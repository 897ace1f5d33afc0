"""Where the ranks of a conversion meet: on loopback by our torchrun, on every interface by torch's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import json, os
import torch
import torch.distributed as dist
from tools.audit.sockets import listeners

dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
if dist.get_rank() == 0:
    found = [one.address for one in listeners([os.getppid(), os.getpid()]) if one.kind == "tcp"]
    print(json.dumps({"ranks": int(total), "addresses": sorted(set(found))}))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("module", "addresses"), [("slime.compat.torchrun", ["127.0.0.1"]), ("torch.distributed.run", ["127.0.0.1", "::"])]
)
def test_ranks_of_one_node_meet_on_loopback(tmp_path: Path, module: str, addresses: list[str]):
    (tmp_path / "rank.py").write_text(RANK)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", module, "--nproc-per-node", "2", "--standalone", str(tmp_path / "rank.py")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert json.loads(ran.stdout) == {"ranks": 2, "addresses": addresses}
