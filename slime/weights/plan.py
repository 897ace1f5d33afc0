"""Which bytes of which tensor go from which trainer rank to which GPU, and when: a static plan of one weight sync. No torch.

Words. A *unit* is what one call to an engine must hold together (a weight with its scale, a fused pair). A *lane* is all units
that lie on the same trainer ranks and go to the same GPUs; a lane's tensors may travel in *parts*, because tensor parallelism
cuts them on the trainer or in an engine, and an engine rank may keep some of the parts alone. A *round* fills one bucket on
every GPU that receives, none larger than the limit; it ends with one call to each engine. Inside a round bytes go in *hops*:
hop 0 leaves the ranks that trained them, hop n+1 forwards what hop n brought.

GPUs have global numbers, and trainer rank r is GPU r. Every process that shares a GPU with an engine rank, and every
receiver beside an engine on other GPUs, does the same, driven by its number alone:

    plan = plan_sync(table, hf, trainer, receivers, nodes=nodes_of(gpus, per_node), limit_bytes=...)
    for round in range(plan.rounds):
        duties = plan.duties(gpu, round)
        bucket = empty(duties.bucket_bytes)            # duties.metas says what lies where: it goes to the engine rank as it is
        beside = empty(duties.beside_bytes)            # for deliveries that do not lie in the bucket as they travel
        for delivery in duties.makes:                  # export and quantise part `delivery.part` of these tensors:
            for write in plan.writes(delivery): ...    #   into the bucket, or beside it, where the table of places says so
        for hop in range(plan.hops):                   # all sends and receives of a hop may fly at once
            duties.sends(hop)                          # [(delivery, target)] in the order that both sides use
            duties.receives(hop)                       # [(delivery, source)]
        for move in plan.moves(gpu, round): ...        # from beside the bucket to their places in it

The bytes of a delivery are its pieces in order: of each tensor of each unit the part's ranges in row-major order, padded to 16
bytes. A lane with one part travels as it lies: `duties.places` has its first byte in the bucket, and send, receive and
forward need no copy. With several parts it lies beside the bucket (`duties.beside`), and the ranges of each piece are copied to
their place, `duties.starts[piece.tensor.name]` being the tensor's first byte; what the rank does not keep stays as it is.
`Lane.gathered` tensors are cut through FP8 blocks: before they are quantised, the tensor-parallel group of every maker gathers
them, its members together in the order of the round's deliveries.

Guarantees, which `tests/weights/test_sync_plan.py` checks by a walk through the bytes: every part of a unit reaches
each GPU that keeps the part exactly once, from a GPU that has it by then; no bucket and no staging buffer exceeds the limit
unless one unit alone does; a rank gets nothing that it does not keep. The same arguments give the same plan, on every rank
and in the rehearsal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from slime.model.hf_config import HfConfig
from slime.model.names import Entry, NameTable
from slime.types.weight_bucket import TensorMeta
from slime.weights.lanes import Lane, Trainer, WireTable, lanes_of
from slime.weights.rounds import Stop, fill_rounds
from slime.weights.routes import Leg, Router
from slime.weights.serving import Receiver
from slime.weights.tables import Move, Write, moves_of, writes_of
from slime.weights.wire import WireTensor, padded

__all__ = ["Delivery", "Duties", "Leg", "Piece", "Receiver", "SyncPlan", "Trainer", "nodes_of", "plan_sync"]


@dataclass(frozen=True, slots=True)
class Delivery:
    """One part of some units of a lane on its way to all GPUs that keep them, within one round."""

    number: int
    round: int
    lane: int
    part: int
    units: tuple[int, ...]
    """Numbers within the lane, ascending."""
    nbytes: int
    """That each leg moves."""
    makers: tuple[int, ...]
    """GPUs whose trainer rank exports it: holders that send it, or keep it themselves."""
    legs: tuple[Leg, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor's share of a delivery."""

    entry: Entry
    """The trained parameter that it is made of, alone or with others of its fused pair."""
    tensor: WireTensor
    offset: int
    """First byte in the delivery."""
    nbytes: int
    """Without padding; 0 for a part that is empty."""


@dataclass(frozen=True)
class Duties:
    """What one GPU does in one round."""

    gpu: int
    metas: tuple[TensorMeta, ...]
    """What its engine rank gets: names, shapes and places in the bucket. Each has room for the whole tensor."""
    bucket_bytes: int
    makes: tuple[Delivery, ...]
    """Whose part it exports."""
    staged: tuple[Delivery, ...]
    """Of these, the ones that its own engine rank does not keep: they lie beside the bucket and stay there."""
    deliveries: tuple[Delivery, ...]
    """That it sends, receives or makes."""
    places: Mapping[int, int]
    """Number of a delivery that lies in the bucket as it travels -> its first byte there."""
    beside: Mapping[int, int]
    """Of the others, which have several parts or are staged -> first byte in a buffer beside the bucket. Those of a lane's part
    follow each other."""
    beside_bytes: int

    @cached_property
    def starts(self) -> Mapping[str, int]:
        """First byte of each tensor in the bucket, by name."""
        return {meta.name: meta.start for meta in self.metas}

    def sends(self, hop: int) -> list[tuple[Delivery, int]]:
        """(delivery, GPU that gets it), in the order that both sides use."""
        return [(d, leg.target) for d in self.deliveries for leg in d.legs if leg.hop == hop and leg.source == self.gpu]

    def receives(self, hop: int) -> list[tuple[Delivery, int]]:
        """(delivery, GPU that sends it)."""
        return [(d, leg.source) for d in self.deliveries for leg in d.legs if leg.hop == hop and leg.target == self.gpu]


@dataclass(frozen=True)
class SyncPlan:
    wire: WireTable
    lanes: tuple[Lane, ...]
    deliveries: tuple[Delivery, ...]
    """By round; inside one in the order that senders and receivers use."""
    rounds: int
    nodes: tuple[int, ...]
    """Node of each GPU."""
    limit_bytes: int

    @cached_property
    def hops(self) -> int:
        return max((leg.hop + 1 for delivery in self.deliveries for leg in delivery.legs), default=0)

    def transfers(self) -> Iterator[tuple[int, int, int, int, int]]:
        """(round, hop, source GPU, target GPU, bytes) of every send: what a model of links needs to know."""
        for delivery in self.deliveries:
            for hop, source, target in delivery.legs:
                yield delivery.round, hop, source, target, delivery.nbytes

    def pieces(self, delivery: Delivery) -> Iterator[Piece]:
        """What a delivery's bytes are, in order."""
        offset = 0
        for unit in delivery.units:
            for entry in self.lanes[delivery.lane].units[unit].entries:
                for tensor in self.wire.tensors(entry):
                    nbytes = tensor.part_bytes(delivery.part)
                    yield Piece(entry, tensor, offset, nbytes)
                    offset += padded(nbytes)

    def writes(self, delivery: Delivery) -> tuple[Write, ...]:
        """What its makers put where. Worked out once: every sync asks for the same."""
        if delivery.number not in self._writes:
            self._writes[delivery.number] = tuple(writes_of(self.pieces(delivery), delivery.part))
        return self._writes[delivery.number]

    @cached_property
    def _writes(self) -> dict[int, tuple[Write, ...]]:
        """By number of the delivery, of those that this process was asked for."""
        return {}

    def moves(self, gpu: int, round: int) -> tuple[Move, ...]:
        """What a GPU copies to its bucket from beside it when all hops are done. Worked out once."""
        if (gpu, round) not in self._moves:
            duties = self.duties(gpu, round)
            staged = {delivery.number for delivery in duties.staged}
            parts = [(one, tuple(self.pieces(one))) for one in duties.deliveries if one.number in duties.beside.keys() - staged]
            self._moves[gpu, round] = tuple(moves_of(parts, beside=duties.beside, starts=duties.starts))
        return self._moves[gpu, round]

    @cached_property
    def _moves(self) -> dict[tuple[int, int], tuple[Move, ...]]:
        """By GPU and round, of those that this process was asked for."""
        return {}

    def duties(self, gpu: int, round: int) -> Duties:
        """Everything that the process of a GPU does in a round. Worked out once."""
        if (gpu, round) not in self._duties:
            self._duties[gpu, round] = self._duties_of(gpu, round)
        return self._duties[gpu, round]

    @cached_property
    def _duties(self) -> dict[tuple[int, int], Duties]:
        """By GPU and round, of those that this process was asked for."""
        return {}

    def _duties_of(self, gpu: int, round: int) -> Duties:
        mine = tuple(self._by_gpu.get((gpu, round), ()))
        metas: list[TensorMeta] = []
        places: dict[int, int] = {}
        seen: set[tuple[int, int]] = set()
        end = 0
        for delivery in mine:
            if gpu not in self.keepers[delivery.lane][delivery.part]:
                continue
            if len(self.lanes[delivery.lane].holders) == 1:
                places[delivery.number] = end
            new = [unit for unit in delivery.units if (delivery.lane, unit) not in seen]
            seen.update((delivery.lane, unit) for unit in new)
            for unit in new:
                for entry in self.lanes[delivery.lane].units[unit].entries:
                    for tensor in self.wire.tensors(entry):
                        metas.append(TensorMeta(tensor.name, tensor.shape, tensor.dtype, end, tensor.nbytes))
                        end += padded(tensor.nbytes)
        makes = tuple(delivery for delivery in mine if gpu in delivery.makers)
        staged = tuple(delivery for delivery in makes if gpu not in self.keepers[delivery.lane][delivery.part])
        beside, beside_end = {}, 0
        for delivery in sorted(mine, key=lambda one: (one.lane, one.part, one.units)):
            if delivery.number not in places:
                beside[delivery.number] = beside_end
                beside_end += delivery.nbytes
        return Duties(gpu, tuple(metas), end, makes, staged, mine, places, beside, beside_end)

    @cached_property
    def keepers(self) -> list[list[frozenset[int]]]:
        """GPUs that keep a part, by lane and part."""
        return [[frozenset(gpus) for gpus in lane.keepers] for lane in self.lanes]

    @cached_property
    def _by_gpu(self) -> dict[tuple[int, int], list[Delivery]]:
        found: dict[tuple[int, int], list[Delivery]] = {}
        for delivery in self.deliveries:
            gpus = {*delivery.makers, *(gpu for leg in delivery.legs for gpu in leg[1:])}
            for gpu in gpus:
                found.setdefault((gpu, delivery.round), []).append(delivery)
        return found

    @cached_property
    def digest(self) -> str:
        """sha256 over every delivery with its units' names, bytes and legs: equal plans move the same bytes the same way."""
        sha = hashlib.sha256(f"{self.rounds}\t{self.limit_bytes}\t{self.nodes}\n".encode())
        for lane in self.lanes:
            names = ",".join(entry.name for unit in lane.units for entry in unit.entries)
            sizes = ",".join(str(unit.nbytes) for unit in lane.units)
            sha.update(f"{lane.number}\t{lane.holders}\t{lane.gathered}\t{lane.keepers}\t{names}\t{sizes}\n".encode())
        for one in self.deliveries:
            legs = ";".join(map(_leg_text, one.legs))
            sha.update(f"{one.round}\t{one.lane}\t{one.part}\t{one.units}\t{one.nbytes}\t{one.makers}\t{legs}\n".encode())
        return sha.hexdigest()


def _leg_text(leg: Leg) -> str:
    return f"{leg.hop}:{leg.source}>{leg.target}"


def nodes_of(num_gpus: int, gpus_per_node: int) -> tuple[int, ...]:
    """Node of each GPU where all nodes are alike."""
    return tuple(gpu // gpus_per_node for gpu in range(num_gpus))


def plan_sync(
    table: NameTable,
    hf: HfConfig,
    trainer: Trainer,
    receivers: Sequence[Receiver],
    *,
    nodes: Sequence[int],
    limit_bytes: int,
) -> SyncPlan:
    """The plan of one sync. nodes: node of each GPU, trainer ranks first. limit_bytes: --update-weight-buffer-size.

    Raises ValueError when a GPU has no node, or when two engines share one.
    """
    if limit_bytes <= 0:
        raise ValueError(f"--update-weight-buffer-size is {limit_bytes}; it is a number of bytes and must be positive")
    _check_gpus(trainer, receivers, nodes)
    wire, lanes = lanes_of(table, hf, trainer, receivers, limit_bytes=limit_bytes)
    stops = fill_rounds(lanes, limit_bytes=limit_bytes)
    router = Router(nodes)
    deliveries = tuple(_deliveries(lanes, stops, router))
    rounds = 1 + max((stop.round for stop in stops), default=-1)
    return SyncPlan(wire, lanes, deliveries, rounds, tuple(nodes), limit_bytes)


def _deliveries(lanes: Sequence[Lane], stops: Sequence[Stop], router: Router) -> Iterator[Delivery]:
    number = 0
    for _, batch in groupby(stops, key=lambda stop: stop.round):
        of_round = [(stop, lanes[stop.lane].keepers[stop.part]) for stop in batch]
        order = router.new_round([(stop.sources, gpus, stop.nbytes) for stop, gpus in of_round])
        for stop, gpus in (of_round[one] for one in order):
            route = router.route(stop.sources, gpus, stop.nbytes)
            yield Delivery(number, stop.round, stop.lane, stop.part, stop.units, stop.nbytes, route.makers, route.legs)
            number += 1


def _check_gpus(trainer: Trainer, receivers: Sequence[Receiver], nodes: Sequence[int]) -> None:
    owner: dict[int, int] = {}
    for receiver in receivers:
        for gpu in receiver.gpus:
            if owner.setdefault(gpu, receiver.engine) != receiver.engine:
                raise ValueError(f"engines {owner[gpu]} and {receiver.engine} both serve on GPU {gpu}; give each its own")
    last = max([trainer.grid.world - 1, *owner])
    if last >= len(nodes):
        raise ValueError(f"GPU {last} takes part in the sync, but only {len(nodes)} GPUs have a node; name the node of each")
