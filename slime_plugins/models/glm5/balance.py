"""Who scores which query rows, so that every rank of a TP x CP group scores about equally many keys. Plain Python.

Rank r of n holds the r-th equal slice of the stream. A row at position p of its sample has p + 1 keys to score, so with one
long sample the last slice costs twice the mean. Rows of costly slices are therefore scored elsewhere, and their indices sent
back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

UNITS_PER_RANK = 16
"""A slice is dealt in so many pieces: pieces of 128 rows at 2,048 rows per rank still fill the scoring kernel's blocks."""


@dataclass(frozen=True, order=True)
class Move:
    """Rows begin <= i < end of the stream lie on `owner` and are scored by `scorer`."""

    owner: int
    scorer: int
    begin: int
    end: int

    @property
    def rows(self) -> int:
        return self.end - self.begin


def deal_rows(bounds: Sequence[int], ranks: int, *, move_cost: float) -> tuple[Move, ...]:
    """The moves that even the scoring work, sorted; every other row is scored where it lies. The same on all ranks.

    bounds: sample boundaries [0, ..., T], T a multiple of `ranks`. move_cost: what moving one row costs its owner and its
    scorer each, in keys scored; a move is made only when it lowers the larger of the two ranks' costs. Negative: no moves.
    """
    total = bounds[-1]
    if ranks < 1 or total % ranks:
        raise ValueError(f"a stream of {total} rows cannot lie in equal slices on {ranks} ranks")
    if move_cost < 0 or ranks == 1:
        return ()
    work, share = CausalWork(bounds), total // ranks
    edges = [share * unit // UNITS_PER_RANK for unit in range(UNITS_PER_RANK + 1)]
    inside = [(a, b) for a, b in pairwise(edges) if a < b]
    units = [[_Unit(r * share + a, r * share + b, work, move_cost) for a, b in inside] for r in range(ranks)]
    load = [float(work.between(r * share, (r + 1) * share)) for r in range(ranks)]
    moves = []
    while True:
        owner, scorer = load.index(max(load)), load.index(min(load))
        high, low = load[owner], load[scorer]
        # The unit whose move leaves the larger of the two loads lowest.
        unit = min(units[owner], key=lambda u: max(high - u.relief, low + u.burden), default=None)
        if unit is None or max(high - unit.relief, low + unit.burden) >= high:
            return _joined(moves)
        units[owner].remove(unit)
        moves.append(Move(owner, scorer, unit.begin, unit.end))
        load[owner] -= unit.relief
        load[scorer] += unit.burden


def loads(bounds: Sequence[int], ranks: int, moves: Sequence[Move], *, move_cost: float = 0.0) -> list[float]:
    """Keys that each rank scores, plus what its moves cost."""
    work, share = CausalWork(bounds), bounds[-1] // ranks
    load = [float(work.between(r * share, (r + 1) * share)) for r in range(ranks)]
    for move in moves:
        cost, carried = work.between(move.begin, move.end), move_cost * move.rows
        load[move.owner] += carried - cost
        load[move.scorer] += carried + cost
    return load


class CausalWork:
    """Keys to score for ranges of rows: row i of a sample that begins at s has i - s + 1."""

    def __init__(self, bounds: Sequence[int]) -> None:
        self.bounds = list(bounds)
        self.before = [0]
        for start, end in pairwise(self.bounds):
            self.before.append(self.before[-1] + _triangle(end - start))

    def between(self, begin: int, end: int) -> int:
        return self._until(end) - self._until(begin)

    def _until(self, row: int) -> int:
        sample = min(bisect_right(self.bounds, row), len(self.bounds) - 1) - 1
        return self.before[sample] + _triangle(row - self.bounds[sample])


class _Unit:
    """Consecutive rows that move together: what that takes off their owner and what it puts on another rank."""

    def __init__(self, begin: int, end: int, work: CausalWork, move_cost: float) -> None:
        self.begin, self.end = begin, end
        cost, carried = work.between(begin, end), move_cost * (end - begin)
        self.relief, self.burden = cost - carried, cost + carried


def _triangle(rows: int) -> int:
    return rows * (rows + 1) // 2


def _joined(moves: Sequence[Move]) -> tuple[Move, ...]:
    """Sorted, with neighbouring ranges of one owner and scorer made one."""
    joined: list[Move] = []
    for move in sorted(moves):
        last = joined[-1] if joined else None
        if last and (last.owner, last.scorer, last.end) == (move.owner, move.scorer, move.begin):
            joined[-1] = Move(move.owner, move.scorer, last.begin, move.end)
        else:
            joined.append(move)
    return tuple(joined)
