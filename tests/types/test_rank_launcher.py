"""The launcher that other tests trust."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailed, run_ranks


def test_results_come_back_in_rank_order_and_ranks_can_talk():
    def total(rank: int, offset: int) -> tuple[int, float]:
        x = torch.tensor([float(rank + offset)])
        dist.all_reduce(x)
        return rank, x.item()

    assert run_ranks(3, total, 10) == [(0, 33.0), (1, 33.0), (2, 33.0)]


def test_the_first_failing_rank_is_the_one_reported_and_the_others_are_ended(tmp_path):
    def fail(rank: int) -> None:
        if rank == 0:
            (tmp_path / "pid").write_text(str(os.getpid()))
        dist.barrier()
        if rank == 1:
            raise ValueError("rank one says no")
        time.sleep(600)

    with pytest.raises(RankFailed, match="rank 1 of 2 failed first(.|\n)*rank one says no"):
        run_ranks(2, fail, timeout=300)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_rank_that_dies_is_named_with_its_exit_code():
    def die(rank: int) -> None:
        if rank == 0:
            os._exit(7)
        time.sleep(600)

    with pytest.raises(RankFailed, match="rank 0 of 2 died with exit code 7"):
        run_ranks(2, die, timeout=300)


def test_a_hang_ends_at_the_time_out_with_the_stack_of_the_late_rank():
    def hang(rank: int) -> None:
        if rank == 1:
            time.sleep(600)

    # Long enough for two ranks to start on a busy machine; nothing runs meanwhile.
    with pytest.raises(RankFailed, match=r"did not finish within 10 s(.|\n)*in hang"):
        run_ranks(2, hang, timeout=10)


def test_tensors_survive_the_way_back():
    def make(rank: int) -> torch.Tensor:
        return torch.full((200_000,), float(rank))

    first, second = run_ranks(2, make)
    assert first.sum() == 0 and second.sum() == 200_000
