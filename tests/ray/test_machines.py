"""Machines that die or fall silent under a real Ray cluster of two: named within seconds, with the phase and what to do."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from slime.ray import calls, machines
from slime.ray.calls import gather
from slime.ray.fates import Process, fates
from slime.ray.machines import alive_nodes, lost_machines_named, lost_nodes, silent, verdict, watched
from slime.ray.placement import place
from slime.ray.same_packages import SamePackages
from slime.ray.standstill import Patience

THERE = "127.0.0.2"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_a_machine_that_leaves_while_devices_are_awaited_ends_the_wait(cluster: Cluster):
    node = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.3", wait=True)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(place, num_trainer=9, num_engine=0, colocate=False, wait_seconds=120.0)
        time.sleep(1.0)
        cluster.remove_node(node)
        with pytest.raises(RuntimeError, match=r"^node 127\.0\.0\.3 is gone, waiting for devices: bring it back or replace it"):
            waits.result()


@pytest.mark.slow
def test_a_run_does_not_begin_on_a_machine_with_other_packages(cluster: Cluster, tmp_path: Path):
    (here,) = alive_nodes()
    SamePackages([here]).check()
    (tmp_path / "transformers-4.0.1.dist-info").mkdir()
    (tmp_path / "transformers-4.0.1.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 4.0.1\n")
    other = cluster.add_node(
        num_cpus=1,
        node_ip_address="127.0.0.4",
        wait=True,
        env_vars={"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH')}"},
    )
    packages = SamePackages(["127.0.0.4", here])
    with pytest.raises(ValueError) as told:
        packages.check()
    cluster.remove_node(other)
    assert str(told.value) == (
        f"starting: node 127.0.0.4 has transformers 4.0.1, the others {version('transformers')}: run scripts/setup.sh on the "
        "named nodes; of slime, bring the head's checkout there (told is a hash of its files), and run the same command again; "
        "it resumes from the last checkpoint"
    )


@ray.remote(num_cpus=0)
def no_answer() -> None:
    """As an actor that waits for an engine on a machine which is gone."""
    time.sleep(600)


@pytest.mark.slow
def test_no_wait_outlasts_a_machine_of_the_engines(cluster: Cluster, monkeypatch):
    monkeypatch.setattr(machines, "WATCH_SECONDS", 0.2)
    monkeypatch.setattr(calls, "_TICK_SECONDS", 0.5)
    node = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.5", wait=True)
    patience = Patience()
    patience.gone = watched({"127.0.0.5"})
    with pytest.raises(RuntimeError, match="did not answer"):
        gather({"rollout": no_answer.remote()}, doing="fleet pause", patience=patience, timeout=2.0)
    cluster.remove_node(node)
    with pytest.raises(RuntimeError, match=r"^Ray has lost 127\.0\.0\.5, where engines ran, while fleet pause$"):
        gather({"rollout": no_answer.remote()}, doing="fleet pause", patience=patience, timeout=60.0)
    with pytest.raises(RuntimeError, match="did not answer"):
        gather({"trainer rank 0": no_answer.remote()}, doing="saving rollout 3", patience=patience, timeout=2.0)


@pytest.mark.slow
def test_a_dead_raylet_is_a_lost_machine_before_ray_says_so(cluster: Cluster):
    raylet: subprocess.Popen = cluster.add_node(num_cpus=1, node_ip_address=THERE, wait=True).all_processes["raylet"][0].process
    addresses = set(alive_nodes())
    assert THERE in addresses and len(addresses) == 2
    assert lost_nodes(addresses) == []
    raylet.kill()
    raylet.wait()
    began = time.monotonic()
    (here,) = addresses - {THERE}
    with (
        pytest.raises(RuntimeError) as told,
        lost_machines_named(lambda: (addresses, "generating rollout 3")),
    ):
        raise RuntimeError("Socket closed")
    assert str(told.value) == (
        "node 127.0.0.2 is gone, generating rollout 3: bring it back or replace it, and run the same command again; it resumes "
        "from the last checkpoint. It was missed first by this: Socket closed"
    )
    assert time.monotonic() - began < 15, "no task was sent there, which would wait for Ray's own verdict"
    assert fates({"trainer rank 1": Process(THERE, 7)}) == {"trainer rank 1": "was on node 127.0.0.2, which is gone"}
    assert lost_nodes({here}) == []


def test_an_error_without_a_lost_machine_is_left_alone():
    with pytest.raises(ValueError, match=r"^a reward is wrong$"), lost_machines_named(lambda: ({"127.0.0.1"}, "training")):
        raise ValueError("a reward is wrong")


def test_a_port_that_opens_late_is_not_silent():
    with socket.socket() as late, socket.socket() as never:
        for one in (late, never):
            one.bind(("127.0.0.1", 0))
        assert silent({"127.0.0.1": never.getsockname()[1]}, seconds=0.3) == {"127.0.0.1"}
        late.listen()
        assert silent({"127.0.0.1": late.getsockname()[1]}, seconds=0.3) == set()


def test_one_node_of_two_whose_own_link_is_down_blames_itself():
    said = verdict(["b"], {"a", "b"}, "training", linked=False)
    assert said.startswith(
        "no other node can be reached from a (b cannot; its own link is down), training: mend this node's network, and run"
    )


@pytest.mark.parametrize(
    ("lost", "others", "doing", "line"),
    [
        (["b"], ["a", "c"], "fleet pause", "node b is gone, sending weights to the engines: bring it back or replace it, and"),
        (["b"], ["a"], "fleet release_memory", "node b is gone, handing the devices to the trainer: bring it back"),
        (["b", "c"], ["a", "d"], "saving rollout 2", "nodes b, c are gone, saving rollout 2: bring them back or replace them,"),
        (
            ["b", "c"],
            ["a"],
            "training",
            "no other node can be reached from a (b, c cannot), training: mend this node's",
        ),
        (["b"], ["a"], "", "node b is gone, starting: bring it back or replace it, and run the same command again; it resumes"),
    ],
)
def test_the_line_names_machine_phase_and_remedy(lost: list[str], others: list[str], doing: str, line: str):
    assert verdict(lost, {*lost, *others}, doing).startswith(line)
