"""A process that watches a control process ends when that is gone, also where nothing else in it would."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import pytest

DRIVER = """
import signal, sys, time
from slime.ray.cluster_watch import ClusterWatch
signal.signal(signal.SIGTERM, {handler})
watch = ClusterWatch("127.0.0.1:{port}", look=0.1, gone=0.5, leave=0.5)
print("watching", flush=True)
while True:
    time.sleep(0.1)
"""


@pytest.mark.parametrize(("handler", "status"), [("lambda *_: sys.exit(143)", 143), ("signal.SIG_IGN", 1)])
def test_a_driver_ends_with_the_control_process(handler: str, status: int):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        text = DRIVER.format(handler=handler, port=listener.getsockname()[1])
        driver = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert driver.stdout.readline() == "watching\n"
        # Alive while somebody listens, for longer than it would take to give up.
        with pytest.raises(subprocess.TimeoutExpired):
            driver.wait(1.5)
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == status
    assert "control process at 127.0.0.1" in said


STOPPED = """
import logging, sys, time
from slime.ray.cluster_watch import ClusterWatch
logging.basicConfig(level=logging.INFO, format="%(message)s")
watch = ClusterWatch("127.0.0.1:{port}", {{"Ray's raylet": {pid}}}, look=0.1)
time.sleep(60)
"""


def test_a_part_of_ray_that_is_stopped_is_told_once_and_when_it_goes_on():
    with socket.create_server(("127.0.0.1", 0)) as listener, subprocess.Popen(["sleep", "100"]) as part:
        text = STOPPED.format(port=listener.getsockname()[1], pid=part.pid)
        with subprocess.Popen([sys.executable, "-c", text], stderr=subprocess.PIPE, text=True) as driver:
            part.send_signal(signal.SIGSTOP)
            told = driver.stderr.readline()
            part.send_signal(signal.SIGCONT)
            after = driver.stderr.readline()
            driver.kill()
        part.kill()
    how = f"is stopped (SIGSTOP, or a debugger; kill -CONT {part.pid} there lets it go on)"
    assert told == f"Ray's raylet (pid {part.pid}) {how}: whatever asks it waits\n"
    assert after.startswith("Ray's raylet goes on, after ")
