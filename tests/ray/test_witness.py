"""What a process tells of itself while it waits: its stack, its collectives, and what its rooms add."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import run_ranks

from slime.config.upkeep import UpkeepConfig
from slime.ray import witness
from slime.ray.standstill import Patience, missing
from slime.rollout.watch import Watch, waiting
from slime.types.sample import Sample, Status


def left_alone(rank: int, folder: Path) -> dict[int, witness.Testimony]:
    """Rank 1 does not come to the pair's second collective until rank 0 was asked where it is."""
    witness.stand(folder / f"{rank}.sock")
    pair = dist.new_group([0, 1], group_desc="tensor-parallel")
    dist.all_reduce(torch.ones(2))
    dist.all_reduce(torch.ones(2), group=pair)
    dist.barrier()
    said = {}
    if rank == 1:
        said = ask_until(folder / "0.sock", "all_reduce (distributed_c10d.py")
    dist.all_reduce(torch.ones(2), group=pair)
    return said


def ask_until(path: Path, words: str) -> dict[int, witness.Testimony]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        other, own = witness.ask(path), witness.testimony()
        if other is not None and any(words in line for line in other.lines):
            return {0: other, 1: own}
        time.sleep(0.05)
    raise AssertionError(other)


def test_a_rank_in_a_collective_says_in_which_line_and_who_is_missing(tmp_path):
    said = run_ranks(2, left_alone, tmp_path)[1]
    (line,) = [line for line in said[0].lines if "all_reduce" in line]
    inner, outer, *_ = line.split(" < ")
    assert inner.startswith("all_reduce (distributed_c10d.py:") and outer.startswith("left_alone (test_witness.py:")
    counts = {rank: {group.title: group.num_begun for group in one.groups} for rank, one in said.items()}
    # One all-reduce and the barrier of all, which gloo counts as one as well; then 2 and 1 of the pair.
    assert counts == {0: {"default_pg": 2, "tensor-parallel": 2}, 1: {"default_pg": 2, "tensor-parallel": 1}}
    states = {f"trainer rank {rank}": one.groups for rank, one in said.items()}
    assert missing(states) == ["tensor-parallel (ranks 0, 1): collective 2 has begun on trainer rank 0; trainer rank 1 is at 1"]


def test_a_wait_before_anybody_is_known_says_so():
    assert Patience().explain() == "no actor has told of its process yet: Ray is starting them"


def test_what_took_long_before_is_expected_to_take_as_long_again():
    patience = Patience(UpkeepConfig(hang_report_minutes=10, hang_exit_minutes=45))
    patience.note("generating rollout 3", 400)
    patience.note("generating rollout 4", 900)
    patience.note("generating rollout 5", 500)
    kinds = ("generating rollout 6", "training", "saving rollout 5")
    assert [patience.report_after(kind) for kind in kinds] == [1800, 600, 600]
    patience.note("training", 3000)
    assert patience.report_after("training") == 2700, "the end is not put off"


def test_nobody_behind_the_socket_is_no_error(tmp_path):
    assert witness.ask(tmp_path / "none.sock") is None
    (tmp_path / "file.sock").write_text("left by a process that was killed")
    assert witness.ask(tmp_path / "file.sock") is None
    witness.stand(tmp_path / "file.sock")
    assert witness.ask(tmp_path / "file.sock") is not None


def test_a_thread_of_ours_is_told_and_idle_ones_of_libraries_are_not(monkeypatch):
    leave = threading.Event()

    def look_at_a_file() -> None:
        leave.wait(20)

    monkeypatch.setattr(witness, "_also", [lambda: ["3 prompts are back"]])
    threads = [threading.Thread(target=look_at_a_file), threading.Thread(target=leave.wait, args=(20,))]
    for thread in threads:
        thread.start()
    lines = witness.testimony().lines
    leave.set()
    assert sum("look_at_a_file (test_witness.py:" in line for line in lines) == 1
    assert sum(line.startswith("wait (threading.py:") for line in lines) == 1, "the other one waits in the library alone"
    assert lines[-1] == "3 prompts are back"


def test_a_rollout_says_what_its_samples_wait_for():
    pending, judged = Sample(index=0), Sample(index=1)
    judged.status = Status.COMPLETED

    async def generate() -> list[str]:
        with Watch(lambda: ([[pending, judged], [pending]], 5), "evaluation gsm8k"):
            return waiting()

    assert asyncio.run(generate()) == ["evaluation gsm8k: 5 prompts are back, 2 wait: 2 samples for an engine, 1 for a grader"]
    assert waiting() == []
