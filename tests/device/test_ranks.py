"""The rank grid: order of the axes, refusals with numbers, sources that cover every weight once."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_ranks

from slime.device import get_device
from slime.parallel import check_sizes, init_ranks


def _sizes(tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1, etp: int | None = 1) -> SimpleNamespace:
    return SimpleNamespace(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=None,
        context_parallel_size=cp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp, distributed_timeout_minutes=1,
    )  # fmt: skip


def test_the_recipes_grid_fits_256_ranks() -> None:
    check_sizes(_sizes(tp=4, pp=8, cp=8, ep=32), 256)
    check_sizes(_sizes(tp=8, pp=2, ep=16), 32)  # its conversion


def test_a_grid_that_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"6 ranks cannot be divided into TP 4 x PP 1 x CP 1 = 4; start a multiple of 4 ranks"):
        check_sizes(_sizes(tp=4), 6)
    with pytest.raises(
        ValueError, match=r"expert-TP 1 x EP 3 x PP 2 = 6; choose --expert-model-parallel-size among \[1, 2, 4\]"
    ):
        check_sizes(_sizes(pp=2, ep=3), 8)


def test_axes_run_tp_cp_dp_pp_and_sources_are_unique() -> None:
    """By hand for 8 ranks, TP2 CP2 PP2: tp fastest, then cp, pp slowest; experts over the four ranks of a stage."""

    def place(rank: int) -> tuple:
        ranks = init_ranks(_sizes(tp=2, pp=2, cp=2, ep=2), rank=rank, world_size=8, device=get_device())
        return (ranks.tp_rank, ranks.cp_rank, ranks.dp_rank, ranks.pp_rank), (ranks.ep_rank, ranks.edp_rank), (
            ranks.is_dense_source, ranks.is_expert_source, ranks.is_first_stage, ranks.is_last_stage,
        )  # fmt: skip

    found = run_ranks(8, place)
    assert [grid for grid, _, _ in found] == [(r % 2, r // 2 % 2, 0, r // 4) for r in range(8)]
    assert [experts for _, experts, _ in found] == [(r % 2, r // 2 % 2) for r in range(8)]
    assert [sources[0] for _, _, sources in found] == [r % 4 == 0 for r in range(8)]
    assert [sources[1] for _, _, sources in found] == [r % 4 < 2 for r in range(8)]
    assert [sources[2] for _, _, sources in found] == [r < 4 for r in range(8)]


def test_every_generator_of_a_rank_is_seeded() -> None:
    """By Megatron's rule, seed + 100 x pipeline stage, for Python's, NumPy's and torch's own; the same in every run."""

    def draw(rank: int, seed: int) -> tuple[float, float, float]:
        init_ranks(_sizes(pp=2), rank=rank, world_size=2, device=get_device(), seed=seed)
        return random.random(), np.random.rand(), torch.rand(()).item()

    first, again, other = (run_ranks(2, draw, seed) for seed in (7, 7, 8))
    assert first == again and all(a != b for a, b in zip(first[0], other[0], strict=True))
    for stage, (python, numpy, _) in enumerate(first):
        assert python == random.Random(7 + 100 * stage).random()
        assert numpy == np.random.RandomState(7 + 100 * stage).rand()
