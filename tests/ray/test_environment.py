"""The Ray that a run starts for itself asks for a secret, answers no metrics, and tells an error once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, os, subprocess, sys, urllib.request
from slime.ray.environment import prepare

prepare()
import psutil
import ray

ray.init("local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


@ray.remote(num_cpus=0)
class Broken:
    @ray.method(num_returns=2)
    def generate(self):
        raise RuntimeError("told once")


batch, report = Broken.remote().generate.remote()
try:
    ray.get(report)
except RuntimeError:
    pass
del batch, report


def answers_numbers(address):
    host = "127.0.0.1" if address.ip == "0.0.0.0" else address.ip
    try:
        with urllib.request.urlopen(f"http://{host}:{address.port}/metrics", timeout=2) as answer:
            return b"# TYPE" in answer.read()
    except Exception:
        return False


children = psutil.Process().children(recursive=True)
sockets = [c.laddr for child in children for c in child.net_connections("tcp4") if c.status == "LISTEN"]
gcs = ray.get_runtime_context().gcs_address
code = f"import ray; ray.init({gcs!r}, log_to_driver=False); print('let in')"
said = {}
secret = os.environ["RAY_AUTH_TOKEN_PATH"]
token = open(secret).read()
mode, inherited = os.stat(secret).st_mode & 0o777, token in "".join(os.environ.values())
for name, drawn in (("stranger", {"RAY_AUTH_TOKEN": "x" * 64}), ("friend", {})):
    command = [sys.executable, "-c", code]
    try:
        ran = subprocess.run(command, env=os.environ | drawn, capture_output=True, text=True, timeout=40)
        said[name] = "let in" in ran.stdout
    except subprocess.TimeoutExpired:
        said[name] = False
said |= {"secret": secret, "mode": mode, "inherited": inherited, "length": len(token)}
print(json.dumps(said | {"sockets": len(sockets), "numbers": [a.port for a in sockets if answers_numbers(a)]}))
"""


@pytest.mark.slow
def test_a_local_ray_asks_for_a_secret_answers_no_metrics_and_tells_an_error_once():
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = json.loads(ran.stdout.splitlines()[-1])
    assert said["friend"] and not said["stranger"]
    assert said["sockets"] > 0 and said["numbers"] == []
    assert (said["length"], said["mode"], said["inherited"]) == (64, 0o600, False)
    assert not Path(said["secret"]).exists(), "it goes with the run"
    assert "Unhandled error" not in ran.stderr and "told once" not in ran.stderr


def test_a_local_ray_that_cannot_start_is_one_line(tmp_path):
    """On a machine that is busy it is Ray's 30 seconds that end; here it has no folder."""
    (tmp_path / "file").touch()
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    program = "from slime.ray.run import start_ray; start_ray(1)"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
        env=env | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(tmp_path / "file")},
    )  # fmt: skip
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == (
        f"RuntimeError: Ray did not start on this machine: [Errno 20] Not a directory: '{tmp_path}/file/ray'; end what else "
        "computes here and try again, or start it by hand (ray start --head) and name it in RAY_ADDRESS"
    )
