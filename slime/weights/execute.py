"""Carries a plan out: exports, sends, receives and forwards bytes until every engine rank's bucket is whole, round by round.

All processes of a sync run the same rounds, driven by the plan and by which GPUs are theirs: a trainer rank has its own, and
may stand for the ranks of an engine on other devices, whose buckets it then holds in its own memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from slime.types.weight_bucket import WeightBucket
from slime.weights.parts import TrainedParts
from slime.weights.plan import Delivery, Duties, Leg, SyncPlan
from slime.weights.stopwatch import Stopwatch
from slime.weights.tables import Move

Key = tuple[int, int]
"""(GPU, number of a delivery)"""


@dataclass(frozen=True)
class Round:
    """A round on one process, before it has travelled."""

    number: int
    duties: Mapping[int, Duties]
    """By GPU here, as the others."""
    buckets: Mapping[int, Tensor]
    beside: Mapping[int, Tensor]
    """For what does not lie in the bucket as it travels."""
    buffers: Mapping[Key, Tensor]
    """Where each delivery lies."""


@dataclass
class Execution:
    """One process's part of a plan. `round` is a collective of all processes, called with 0, 1, ... in turn."""

    plan: SyncPlan
    homes: Sequence[int]
    """Of each GPU, the rank of the process that holds its bucket."""
    rank: int
    device: torch.device
    parts: TrainedParts | None
    """What a trainer rank exports; its number is that of its GPU. None for a process that only receives."""
    group: dist.ProcessGroup | None = None
    """Of all processes; the default group unless said."""
    wait: Callable[[], None] = lambda: None
    """For what was queued on the device: a round is complete when it is given, and each phase's seconds are its own."""
    clock: Stopwatch = field(default_factory=Stopwatch)
    moved: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(source GPU, target GPU) -> bytes that this process sent over the link."""

    def __post_init__(self) -> None:
        self._next: Round | None = None
        # What only receives has nothing to make: a buffer more, and no second saved.
        self._looks_ahead = self.parts is not None and makes_while_sending(self.plan, self.homes)
        self._mine = [gpu for gpu, home in enumerate(self.homes) if home == self.rank]
        self._gathered: dict[int, list[Delivery]] = {}
        for delivery in self.plan.deliveries:
            if self.parts is not None and self.plan.lanes[delivery.lane].gathered and self._gathers(delivery):
                self._gathered.setdefault(delivery.round, []).append(delivery)

    def _gathers(self, delivery: Delivery) -> bool:
        entry = self.plan.lanes[delivery.lane].units[0].entries[0]
        return any(self.parts.is_in_group(entry, maker) for maker in delivery.makers)

    def round(self, number: int) -> dict[int, WeightBucket]:
        """GPU -> its bucket, of those GPUs here that an engine serves on; one without tensors gets nothing in this round.

        A new buffer each time: an engine may answer before its copy kernels have run, so a reused one would corrupt the last.
        The next round is made in this thread while bytes fly without it: collectives are in one order on all ranks.
        """
        made, self._next = self._next, None
        if made is None:
            with self.clock("make"):
                made = self.make(number)
                self.wait()
        try:
            with self.clock("exchange"):
                flying = self._depart(0, made)
        finally:
            # Also when nothing departed because a receiver is gone: a rank that gathers with this one would wait for ever.
            if self._looks_ahead and number + 1 < self.plan.rounds:
                with self.clock("make"):
                    self._next = self.make(number + 1)
        with self.clock("exchange"):
            self._arrive(made, flying)
            self.wait()
        return {gpu: WeightBucket(one.metas, made.buckets[gpu]) for gpu, one in made.duties.items() if one.metas}

    def make(self, number: int) -> Round:
        """What this rank exports of a round, in the buffers that it travels in; a collective of the ranks that gather."""
        duties = {gpu: self.plan.duties(gpu, number) for gpu in self._mine}
        buckets = {gpu: self._empty(one.bucket_bytes) for gpu, one in duties.items()}
        beside = {gpu: self._empty(one.beside_bytes) for gpu, one in duties.items()}
        buffers = {
            (gpu, delivery.number): _buffer(one, delivery, buckets[gpu], beside[gpu])
            for gpu, one in duties.items()
            for delivery in one.deliveries
        }
        self._write(number, duties, buffers)
        return Round(number, duties, buckets, beside, buffers)

    def _empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _arrive(self, made: Round, flying: Sequence[dist.Work]) -> None:
        """What flies in hop 0, then the other hops; then everything is put in its place."""
        for hop in range(self.plan.hops):
            for work in flying if hop == 0 else self._depart(hop, made):
                work.wait()
        for gpu, bucket in made.buckets.items():
            for move in self.plan.moves(gpu, made.number):
                _carry(move, made.beside[gpu], bucket)

    def _write(self, number: int, duties: Mapping[int, Duties], buffers: Mapping[Key, Tensor]) -> None:
        """Export what this rank is a maker of, and take part in the gathering of what a rank of its group is."""
        if self.parts is None:
            return
        mine = {delivery.number: delivery for delivery in duties[self.rank].makes}
        gathered = {delivery.number: delivery for delivery in self._gathered.get(number, ())}
        for key, delivery in sorted({**mine, **gathered}.items()):
            lane = self.plan.lanes[delivery.lane]
            if key in mine:
                self.parts.write(self.plan.writes(delivery), buffers[self.rank, key], gathered=lane.gathered)
            else:
                self.parts.take_part(entry for unit in delivery.units for entry in lane.units[unit].entries)
        self.parts.finish()

    def _depart(self, hop: int, made: Round) -> list[dist.Work]:
        """All sends and receives of a hop at once; both ends of a link take them in the plan's order."""
        deliveries = {delivery.number: delivery for one in made.duties.values() for delivery in one.deliveries}
        flying: list[dist.P2POp] = []
        for _, delivery in sorted(deliveries.items()):
            for leg in delivery.legs:
                if leg.hop == hop:
                    self._fly(leg, delivery, made.buffers, flying)
        return dist.batch_isend_irecv(flying) if flying else []

    def _fly(self, leg: Leg, delivery: Delivery, buffers: Mapping[Key, Tensor], flying: list[dist.P2POp]) -> None:
        source, target = self.homes[leg.source], self.homes[leg.target]
        if self.rank not in (source, target) or delivery.nbytes == 0:
            return
        if self.rank == source:
            self.moved[leg.source, leg.target] += delivery.nbytes
        if source == target:
            buffers[leg.target, delivery.number].copy_(buffers[leg.source, delivery.number])
        elif self.rank == source:
            flying.append(_op(dist.isend, buffers[leg.source, delivery.number], target, self.group))
        else:
            flying.append(_op(dist.irecv, buffers[leg.target, delivery.number], source, self.group))


def makes_while_sending(plan: SyncPlan, homes: Sequence[int]) -> bool:
    """Whether trainer ranks make a round while the one before travels: where none of them holds the bucket of an engine's rank.

    Each has two rounds of what it sends in its memory then. Where buckets that engines load are there too, a round is made
    while the engines load the one before. All ranks find the same, so that those that gather a tensor do it in one order.
    """
    return all(homes[gpu] >= plan.wire.trainer.grid.world for lane in plan.lanes for gpu in lane.gpus)


def _buffer(duties: Duties, delivery: Delivery, bucket: Tensor, beside: Tensor) -> Tensor:
    """Where a delivery lies: in the bucket if it can."""
    place = duties.places.get(delivery.number)
    flat, first = (beside, duties.beside[delivery.number]) if place is None else (bucket, place)
    return flat[first : first + delivery.nbytes]


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _carry(move: Move, beside: Tensor, bucket: Tensor) -> None:
    word = _WORDS[move.word]
    source = beside.view(word).as_strided(move.shape, move.source_steps, move.source)
    bucket.view(word).as_strided(move.shape, move.target_steps, move.target).copy_(source)


def _op(kind: object, tensor: Tensor, peer: int, group: dist.ProcessGroup | None) -> dist.P2POp:
    return dist.P2POp(kind, tensor, group=group, group_peer=peer)
