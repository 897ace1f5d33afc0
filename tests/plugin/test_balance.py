"""Rows of the indexer are dealt so that ranks score equally many keys, and every row is scored once."""

from __future__ import annotations

import functools
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from slime_plugins.models.glm5.balance import UNITS_PER_RANK, CausalWork, deal_rows, loads
from slime_plugins.models.glm5.exchange import Traffic
from slime_plugins.models.glm5.ops.torch_ops import index_topk


@st.composite
def streams(draw) -> tuple[list[int], int]:
    """(sample boundaries, ranks)"""
    ranks = draw(st.sampled_from([1, 2, 3, 4, 8, 32]))
    total = ranks * draw(st.integers(1, 60))
    cuts = draw(st.sets(st.integers(1, max(1, total - 1)), max_size=6))
    return [0, *sorted(cuts - {total}), total], ranks


def test_work_of_a_range_is_the_number_of_its_causal_pairs() -> None:
    work = CausalWork([0, 3, 4, 10])
    keys = [1, 2, 3, 1, 1, 2, 3, 4, 5, 6]
    for begin in range(11):
        for end in range(begin, 11):
            assert work.between(begin, end) == sum(keys[begin:end])


@settings(max_examples=400, deadline=None)
@given(streams(), st.sampled_from([0, 3, 40]))
def test_every_row_is_scored_once_and_the_greatest_load_never_grows(stream, move_cost) -> None:
    (bounds, ranks), moves = stream, deal_rows(*stream, move_cost=move_cost)
    share = bounds[-1] // ranks
    assert moves == deal_rows(tuple(bounds), ranks, move_cost=move_cost)
    scorers = [row // share for row in range(bounds[-1])]
    for move in moves:
        assert move.owner != move.scorer and 0 <= move.scorer < ranks
        for row in range(move.begin, move.end):
            assert scorers[row] == move.owner == row // share
            scorers[row] = move.scorer
    work = CausalWork(bounds)
    by_row = [0] * ranks
    for row, scorer in enumerate(scorers):
        by_row[scorer] += work.between(row, row + 1)
    assert by_row == loads(bounds, ranks, moves)
    assert max(loads(bounds, ranks, moves, move_cost=move_cost)) <= max(loads(bounds, ranks, ()))


@settings(max_examples=400, deadline=None)
@given(streams())
def test_free_moves_leave_no_rank_more_than_a_unit_above_the_mean(stream) -> None:
    """A rank above it took its last unit while it was the idlest, or keeps one with which the idlest would be no better off."""
    bounds, ranks = stream
    work, share = CausalWork(bounds), bounds[-1] // ranks
    edges = [share * unit // UNITS_PER_RANK for unit in range(UNITS_PER_RANK + 1)]
    units = [work.between(rank * share + a, rank * share + b) for rank in range(ranks) for a, b in pairwise(edges)]
    mean = sum(units) / ranks
    assert max(loads(bounds, ranks, deal_rows(bounds, ranks, move_cost=0))) <= mean + max(units)


@pytest.mark.parametrize("ranks", [2, 4, 8, 32])
def test_free_moves_even_one_long_sample_to_a_unit(ranks: int) -> None:
    """Without them the last of n slices costs (2 n - 1) / n times the mean."""
    total = ranks * 512
    before = loads([0, total], ranks, ())
    mean = total * (total + 1) / 2 / ranks
    assert max(before) / mean == pytest.approx((2 * ranks - 1) / ranks, rel=1e-3)
    largest_unit = total * (512 // UNITS_PER_RANK)
    assert max(loads([0, total], ranks, deal_rows([0, total], ranks, move_cost=0))) <= mean + largest_unit


def test_moves_are_made_where_they_pay_at_the_recipes_sizes() -> None:
    """65,536 rows on TP4 x CP8, a moved row as dear as 20,480 keys: what the greatest load becomes, in means."""
    mean = 65536 * 65537 / 2 / 32
    assert max(loads([0, 65536], 32, ())) / mean == pytest.approx(1.969, abs=0.001)
    moves = deal_rows([0, 65536], 32, move_cost=20480)
    assert max(loads([0, 65536], 32, moves, move_cost=20480)) / mean < 1.25
    assert deal_rows(list(range(0, 65537, 8192)), 32, move_cost=20480) == ()
    assert deal_rows([0, 65536], 32, move_cost=-1) == ()


def test_slices_must_be_equal() -> None:
    with pytest.raises(ValueError, match="a stream of 10 rows cannot lie in equal slices on 4 ranks"):
        deal_rows([0, 10], 4, move_cost=0)


def test_rows_travel_to_their_scorers_and_their_indices_back() -> None:
    """Small whole numbers: every score is exact, so that indices must be equal whoever scores."""
    bounds, ranks, topk = (0, 70, 103, 104, 194, 200), 4, 16
    draw = torch.Generator().manual_seed(0)
    query = torch.randint(-4, 5, (200, 4, 8), generator=draw).to(torch.bfloat16)
    keys = torch.randint(-4, 5, (200, 8), generator=draw).to(torch.bfloat16)
    gates = torch.randint(-3, 4, (200, 4), generator=draw).float()
    rows = torch.arange(200)
    starts = torch.tensor([max(begin for begin in bounds[:-1] if begin <= row) for row in range(200)])
    moves = deal_rows(bounds, ranks, move_cost=0)
    assert len({move.owner for move in moves}) > 1 and len({move.scorer for move in moves}) > 1

    def on_rank(rank: int) -> torch.Tensor:
        mine = slice(50 * rank, 50 * rank + 50)
        traffic = Traffic.of(moves, 50, dist.group.WORLD, torch.device("cpu"))
        select = functools.partial(_scored, keys, topk)
        return traffic.select(select, query[mine], gates[mine], starts[mine], rows[mine] + 1, bounds)

    whole = index_topk(query, keys, gates, starts, rows + 1, topk=topk)
    assert torch.equal(torch.cat(run_ranks(ranks, on_rank)), whole)


def _scored(keys: torch.Tensor, topk: int, query: torch.Tensor, gates: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor):
    return index_topk(query, keys, gates, starts, ends, topk=topk)
