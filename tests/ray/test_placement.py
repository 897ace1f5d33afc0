"""Device slots count within what is visible: Ray hands out the machine's numbers, torch and SGLang count what they see."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from slime.ray.placement import Placement, Slot, listens, visible_index, with_spares

# Two slots of a machine of which a share is visible, and what an actor in the second slot sees.
JOB = """
import json, os, ray
from slime.ray.placement import ALL_DEVICES, place
ray.init("local", num_gpus=2, num_cpus=4, include_dashboard=False, log_to_driver=False)
placement = place(num_trainer=2, num_engine=2, colocate=True)
@ray.remote(num_gpus=0.4, num_cpus=0)
def seen():
    return os.environ.get("CUDA_VISIBLE_DEVICES")
where = placement.strategy(placement.trainer_slots[1])
seen = ray.get(seen.options(scheduling_strategy=where, runtime_env={"env_vars": ALL_DEVICES}).remote())
print(json.dumps([[slot.device_index for slot in placement.engine_slots], seen]))
"""


def test_a_device_is_counted_among_the_visible_ones():
    assert visible_index(3, "2,3") == 1 and visible_index("2", "2, 3") == 0
    assert visible_index("MIG-7b1c", "GPU-5f0c,MIG-7b1c") == 1
    assert visible_index(5, None) == 5 and visible_index(5, "") == 5
    with pytest.raises(ValueError, match="device 4, which CUDA_VISIBLE_DEVICES=2,3 does not list"):
        visible_index(4, "2,3")


@pytest.mark.slow
@pytest.mark.parametrize("visible", ["2,3", "GPU-5f0c1e5b-0a51-4a2c,GPU-0e8a9c6d-93c1-43aa"])
def test_slots_and_actors_of_a_share_of_a_machine(visible):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"CUDA_VISIBLE_DEVICES": visible, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", JOB], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    indices, seen = json.loads(done.stdout.splitlines()[-1])
    assert indices == [0, 1]
    assert seen == visible  # nothing is hidden: the slot's index picks the device


def test_ranks_of_a_lost_node_move_to_a_spare_one_and_engines_do_not():
    trainers = (Slot(0, "10.0.0.1", 0), Slot(1, "10.0.0.2", 0))
    apart = Placement(None, trainers, (Slot(2, "10.0.0.3", 0),))
    assert with_spares(apart, []) is apart
    with pytest.raises(RuntimeError, match="node 10.0.0.2 is gone, with engines on it, .*; it resumes from the last"):
        with_spares(Placement(None, trainers, trainers), ["10.0.0.2"])


@pytest.mark.parametrize(
    ("trainer", "engine", "here", "in_cluster", "host", "peers"),
    [
        ("10.0.0.1", "10.0.0.1", "10.0.0.1", ["10.0.0.1"], "127.0.0.1", ()),
        # All engines on one node, the trainer on another: ranks there send weights to them.
        ("10.0.0.1", "10.0.0.2", "10.0.0.2", ["10.0.0.1", "10.0.0.2"], "10.0.0.2", ("10.0.0.1", "10.0.0.2")),
        # The driver, with the actor that asks them, is on a third, and a fourth is there as a spare.
        ("10.0.0.1", "10.0.0.1", "10.0.0.3", ["10.0.0.4"], "10.0.0.1", ("10.0.0.1", "10.0.0.3", "10.0.0.4")),
    ],
)
def test_servers_listen_where_all_that_speak_to_them_reach_them(monkeypatch, trainer, engine, here, in_cluster, host, peers):
    monkeypatch.setattr("slime.ray.placement.ray.util.get_node_ip_address", lambda: here)
    monkeypatch.setattr("slime.ray.placement.alive_nodes", lambda: dict.fromkeys(in_cluster))
    placement = Placement(None, (Slot(0, trainer, 0),), (Slot(1, engine, 0),))
    assert listens(placement, engine) == (host, peers)
