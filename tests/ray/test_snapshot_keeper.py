"""Snapshots in keepers of real processes, "nodes" of one Ray: what is whole, what is torn, and what a lost node leaves."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import ray

from slime.ray import snapshot_keeper
from slime.ray.calls import ProcessLost
from slime.ray.snapshot_keeper import CHUNK, SnapshotStore
from slime.ray.standstill import Patience

pytestmark = pytest.mark.slow

A, B, C = "10.0.0.1", "10.0.0.2", "10.0.0.3"
SIZES = [CHUNK + 5, 3]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init("local", num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def store(monkeypatch):
    """Of a rank on A and one on B, whose copies lie on the other. C is a spare."""
    (node,) = ray.nodes()
    monkeypatch.setattr(snapshot_keeper, "alive_nodes", lambda: dict.fromkeys((A, B, C), node))
    made = []

    def make(**how) -> SnapshotStore:
        made.append(SnapshotStore([A, B], Patience(), peers=how.pop("peers", True), **how))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def writes(letter: str, *, ranks=(0, 1), then: Exception | None = None):
    """As ranks do: each its whole snapshot, of one letter."""

    def write(paths: list[str]) -> list[str]:
        for rank in ranks:
            Path(paths[rank]).write_bytes(letter.encode() * SIZES[rank])
        if then is not None:
            raise then
        return []

    return write


def read(paths: list[str]) -> list[str]:
    """The letters of each rank's snapshot, which has its whole length."""
    found = [Path(path).read_bytes() for path in paths]
    assert [len(data) for data in found] == SIZES
    return ["".join(sorted({chr(byte) for byte in data})) for data in found]


def kill(store: SnapshotStore, node: str) -> None:
    pid = ray.get(store._keepers[node].pid.remote())
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_rank_that_dies_amid_writing_leaves_the_snapshot_before(store):
    kept = store()
    assert kept.newest() is None
    assert kept.take(3, SIZES, writes("a")) and kept.take(4, SIZES, writes("b"))
    with pytest.raises(ProcessLost):
        kept.take(5, SIZES, writes("c", ranks=[0], then=ProcessLost("rank 1 was killed")))
    assert kept.newest() == 4 and read(kept.bring_home(4)) == ["b", "b"]
    assert kept.take(5, SIZES, writes("d")) and read(kept.bring_home(5)) == ["d", "d"]


def test_what_a_lost_node_held_comes_from_the_other_one_to_the_spare(store):
    kept = store()
    kept.take(1, SIZES, writes("a"))
    kept._finish_copies()
    kill(kept, A)
    kept.nodes = [C, B]
    assert kept.newest() == 1 and read(kept.bring_home(1)) == ["a", "a"]
    # The copies of B's were on A: the next snapshot makes them again.
    kept.take(2, SIZES, writes("b"))
    kept._finish_copies()
    kill(kept, B)
    kept.nodes = [C, A]
    assert kept.newest() == 2 and read(kept.bring_home(2)) == ["b", "b"]


def test_with_one_version_the_copy_is_whole_while_its_original_is_written(store):
    kept = store(versions=1)
    kept.take(1, SIZES, writes("a"))
    with pytest.raises(ProcessLost):
        kept.take(2, SIZES, writes("b", ranks=[0], then=ProcessLost("rank 1 was killed")))
    assert kept.newest() == 1 and read(kept.bring_home(1)) == ["a", "a"]


def test_a_keeper_that_is_gone_costs_its_snapshots_and_no_more(store, caplog):
    kept = store(peers=False)
    kept.take(1, SIZES, writes("a"))
    kill(kept, A)
    assert kept.newest() is None
    assert kept.take(2, SIZES, writes("b")) and kept.newest() == 2
    assert f"the keeper of snapshots on {A} is gone" in caplog.text
    assert not kept.take(3, SIZES, lambda paths: ["FileNotFoundError: it has gone"]) and kept.newest() == 2
    assert "no snapshot was taken: FileNotFoundError: it has gone" in caplog.text
