"""Which units travel in which round: all lanes side by side, each at the pace of its size, no bucket beyond the limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from slime.weights.lanes import Lane
from slime.weights.wire import piece_bytes


@dataclass(frozen=True, slots=True)
class Stop:
    """One part of some units of a lane, with its round and the ranks that may give it."""

    round: int
    lane: int
    part: int
    units: tuple[int, ...]
    nbytes: int
    sources: tuple[int, ...]
    """Trainer ranks; those that keep the units themselves where there are such, else the one rank that stages them."""


def fill_rounds(lanes: Sequence[Lane], *, limit_bytes: int) -> list[Stop]:
    """All stops, by round.

    Units of all lanes are taken in the order of their place within their lane: every pipeline stage sends in every round,
    and all end together. A round ends when the next unit would take some bucket or staging buffer beyond limit_bytes; a unit
    larger than that has its buckets for itself.
    """
    filling = _Filling(lanes, limit_bytes)
    for _, lane, unit in sorted(chain.from_iterable(_places(lane) for lane in lanes)):
        filling.add(lane, unit)
    filling.close()
    return filling.stops


def _places(lane: Lane) -> list[tuple[float, int, int]]:
    """(middle of the unit within the lane, 0 to 1; lane; unit)."""
    total = sum(unit.nbytes for unit in lane.units) or 1
    before, found = 0, []
    for number, unit in enumerate(lane.units):
        found.append(((before + unit.nbytes / 2) / total, lane.number, number))
        before += unit.nbytes
    return found


@dataclass
class _Filling:
    """The round that is being filled."""

    lanes: Sequence[Lane]
    limit: int
    stops: list[Stop] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._round = 0
        self._profiles = _profiles(self.lanes)
        self._loads = [0] * (1 + max(chain([-1], *self._profiles)))
        self._staged: dict[int, int] = {}
        self._givers = [tuple(_givers(lane, part) for part in range(len(lane.holders))) for lane in self.lanes]
        self._waiting: dict[tuple[int, int, tuple[int, ...]], list[int]] = {}
        """(lane, part, sources) -> units"""
        self._piece = piece_bytes(self.limit)

    def add(self, lane: int, number: int) -> None:
        unit = self.lanes[lane].units[number]
        makers = self._makers(lane, unit.part_bytes)
        if makers is None or not self._fits(lane, unit.nbytes):
            self.close()
            makers = self._makers(lane, unit.part_bytes)
            assert makers is not None, "an empty round takes any unit"
        for profile in self._profiles[lane]:
            self._loads[profile] += unit.nbytes
        for part, (sources, stages) in enumerate(makers):
            if not unit.part_bytes[part]:
                continue
            if stages:
                self._staged[sources[0]] = self._staged.get(sources[0], 0) + unit.part_bytes[part]
            self._waiting.setdefault((lane, part, sources), []).append(number)

    def _fits(self, lane: int, nbytes: int) -> bool:
        most = max(self._loads[profile] for profile in self._profiles[lane])
        return not most or most + nbytes <= self.limit

    def _makers(self, lane: int, part_bytes: Sequence[int]) -> Sequence[tuple[tuple[int, ...], bool]] | None:
        """Per part (ranks that give it, whether it is staged), each staged part with the rank whose buffer is the emptiest.

        None where a buffer that holds something already would exceed the limit.
        """
        givers = self._givers[lane]
        if not any(stages for _, stages in givers):
            return givers
        added: dict[int, int] = {}
        found = []
        for (sources, stages), nbytes in zip(givers, part_bytes, strict=True):
            if stages:
                rank = min(sources, key=lambda one: (self._staged.get(one, 0) + added.get(one, 0), one))
                added[rank] = added.get(rank, 0) + nbytes
                if self._staged.get(rank) and self._staged[rank] + added[rank] > self.limit:
                    return None
                sources = (rank,)
            found.append((sources, stages))
        return found

    def close(self) -> None:
        """End the round: its stops, those with the fewest ways to go first, so that the others level what these leave."""
        if not self._waiting:
            return
        order = sorted(self._waiting, key=lambda key: (len(self.lanes[key[0]].keepers[key[1]]), key))
        for key in order:
            self._cut(*key, self._waiting[key])
        self._waiting.clear()
        self._staged.clear()
        self._loads = [0] * len(self._loads)
        self._round += 1

    def _cut(self, lane: int, part: int, sources: tuple[int, ...], units: Sequence[int]) -> None:
        """Stops of about a piece each."""
        taken: list[int] = []
        nbytes = 0
        for unit in units:
            taken.append(unit)
            nbytes += self.lanes[lane].units[unit].part_bytes[part]
            if nbytes >= self._piece or unit == units[-1]:
                self.stops.append(Stop(self._round, lane, part, tuple(taken), nbytes, sources))
                taken, nbytes = [], 0


def _givers(lane: Lane, part: int) -> tuple[tuple[int, ...], bool]:
    """(ranks that can give a part, whether they would have to stage it because none of them keeps it)."""
    gpus = set(lane.keepers[part])
    keeping = tuple(rank for rank in lane.holders[part] if rank in gpus)
    return (keeping, False) if keeping else (lane.holders[part], True)


def _profiles(lanes: Sequence[Lane]) -> list[list[int]]:
    """Per lane the kinds of GPUs that keep it; GPUs that keep the same lanes are one kind, for their buckets fill alike."""
    kept: dict[int, list[int]] = {}
    for lane in lanes:
        for gpu in lane.gpus:
            kept.setdefault(gpu, []).append(lane.number)
    numbers: dict[tuple[int, ...], int] = {}
    of_gpu = {gpu: numbers.setdefault(tuple(found), len(numbers)) for gpu, found in kept.items()}
    return [sorted({of_gpu[gpu] for gpu in lane.gpus}) for lane in lanes]
