"""Lanes: tensors that are on the same trainer ranks and go to the same GPUs. A plan schedules lanes, not tensors.

GLM-5.2 on 256 GPUs has 57,000 tensors and 528 lanes: the experts that one trainer rank gives to one rank of each engine, and
the rest of a pipeline stage, whole or in tensor-parallel parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from math import lcm

from slime.config.stages import Chunk
from slime.model.hf_config import HfConfig
from slime.model.names import Entry, HfTensor, NameTable
from slime.model.order import model_order
from slime.model.placement import Grid, Holders, Part, Places, holders_of
from slime.weights.serving import Receiver
from slime.weights.shares import Shares, borders
from slime.weights.wire import (
    Format,
    WirePart,
    WireTensor,
    cuts_of,
    is_gathered,
    padded,
    partners_of,
    parts_of,
    piece_bytes,
    update_groups,
    wire_tensors,
)


@dataclass(frozen=True)
class Trainer:
    """Where the trained model lies."""

    grid: Grid
    chunks: tuple[Chunk, ...]
    mtp: bool = False
    """The multi-token-prediction layer is trained, so it travels."""
    padded_vocab: int | None = None
    """Rows of the embedding with its padding."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Tensors that one call to an engine must hold together: a weight and its scale, a fused pair, gate and up."""

    entries: tuple[Entry, ...]
    """In the order in which the model has them."""
    nbytes: int
    """In a bucket, every tensor's start aligned."""
    part_bytes: tuple[int, ...]
    """That travel, per part: of every tensor the part's bytes, padded to the alignment."""


@dataclass(frozen=True)
class Lane:
    number: int
    holders: tuple[tuple[int, ...], ...]
    """Per part, the trainer ranks that hold it."""
    gathered: bool
    """The parts cut FP8 blocks: a source's tensor-parallel group gathers each unit before it is quantised."""
    keepers: tuple[tuple[int, ...], ...]
    """Per part, the GPUs whose ranks load it, ascending."""
    units: tuple[Unit, ...]

    @cached_property
    def gpus(self) -> tuple[int, ...]:
        """That load the units or parts of them, ascending: each has room for the whole units."""
        return tuple(sorted(set(chain.from_iterable(self.keepers))))


class WireTable:
    """What every entry looks like on the wire; entries that are alike share the arithmetic."""

    def __init__(self, table: NameTable, hf: HfConfig, trainer: Trainer, receivers: Sequence[Receiver], *, largest_part: int):
        self.form, self.trainer, self._largest = Format.of(hf), trainer, largest_part
        self.shares = Shares(receivers, hf, self.form)
        self.places = Places(table, trainer.grid, trainer.chunks, trainer.mtp, trainer.padded_vocab)
        self._sizes: dict[tuple, tuple[int, tuple[int, ...]]] = {}

    def tensors(self, entry: Entry) -> tuple[WireTensor, ...]:
        """In the order in which they lie in a bucket."""
        cuts, found = self.cuts(entry), []
        for tensor in entry.hf:
            held, borders = self._held(entry, tensor), self._borders(entry, tensor)
            found += wire_tensors(entry, tensor, held, self.form, cuts=cuts, borders=borders)
        return tuple(found)

    def _held(self, entry: Entry, tensor: HfTensor) -> Holders:
        """As it lies where it is sent from."""
        held = holders_of(
            entry,
            tensor,
            self.trainer.grid,
            stages=self.places.stages(entry),
            expert_shard=self.places.expert_shard(entry),
            padded_vocab=self.trainer.padded_vocab,
        )
        if self.gathered(entry):
            return Holders("all", (Part(0, 1, tuple(sorted({rank for part in held.parts for rank in part.ranks}))),))
        return held

    def _borders(self, entry: Entry, tensor: HfTensor) -> list[int]:
        length = tensor.shape[1 if entry.split == "columns" else 0]
        counts = {count for count in self.shares.of(entry) if count > 1}
        return sorted({border for count in counts for border in borders(entry, length, count)})

    def size(self, entry: Entry) -> int:
        """Ranks that share the entry."""
        if entry.split == "none":
            return 1
        return self.trainer.grid.tp if entry.expert is None else self.trainer.grid.etp

    def gathered(self, entry: Entry) -> bool:
        return is_gathered(entry, self.size(entry), self.form)

    def cuts(self, entry: Entry) -> int:
        """Into how many pieces each part is cut further."""
        return cuts_of(entry, lcm(self.size(entry), *self.shares.of(entry)), self.form, largest=self._largest)

    def bytes_of(self, entry: Entry) -> tuple[int, tuple[int, ...]]:
        """(bytes in a bucket, bytes of each part)."""
        key = tuple((tensor.shape, self.form.is_fp8(tensor)) for tensor in entry.hf), entry.split, entry.expert is None
        key = (*key, entry.float32, self.shares.of(entry))
        if key not in self._sizes:
            tensors = self.tensors(entry)
            parts = range(len(tensors[0].parts))
            self._sizes[key] = (
                sum(padded(tensor.nbytes) for tensor in tensors),
                tuple(sum(padded(tensor.part_bytes(part)) for tensor in tensors) for part in parts),
            )
        return self._sizes[key]

    def holders(self, entry: Entry) -> tuple[tuple[int, ...], ...]:
        """Per part, the trainer ranks that can give it."""
        held = self._held(entry, entry.hf[0])
        ranks = list(dict.fromkeys(part.ranks for part in held.parts))
        return tuple(ranks[part.owner] for part in self._parts(entry, held))

    def _parts(self, entry: Entry, held: Holders) -> list[WirePart]:
        """Of the entry's first tensor; those of its others are the same shares of them."""
        length = entry.hf[0].shape[1 if entry.split == "columns" else 0]
        return parts_of(held, length, cuts=self.cuts(entry), borders=self._borders(entry, entry.hf[0]))

    def keepers(self, entry: Entry, gpus: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
        """Per part, the GPUs that load it. gpus: of each receiver, those whose ranks load some of the entry, rank by rank."""
        tensor, axis = entry.hf[0], 1 if entry.split == "columns" else 0
        spans: list[tuple[int, int, int]] = []
        for count, ranks in zip(self.shares.of(entry), gpus, strict=True):
            ends = borders(entry, tensor.shape[axis], count)
            spans += ((gpu, ends[number % count], ends[number % count + 1]) for number, gpu in enumerate(ranks))
        parts = self._parts(entry, self._held(entry, tensor))
        return tuple(
            tuple(sorted(gpu for gpu, start, stop in spans if start <= part.ranges[0][0] and part.ranges[-1][1] <= stop))
            for part in parts
        )


@dataclass
class _Open:
    """A lane while it is filled."""

    holders: tuple[tuple[int, ...], ...]
    gathered: bool
    keepers: tuple[tuple[int, ...], ...]
    units: list[Unit] = field(default_factory=list)


def lanes_of(
    table: NameTable, hf: HfConfig, trainer: Trainer, receivers: Sequence[Receiver], *, limit_bytes: int
) -> tuple[WireTable, tuple[Lane, ...]]:
    """Every tensor that some receiver takes, in lanes; units in the model's order. limit_bytes: of a bucket."""
    wire = WireTable(table, hf, trainer, receivers, largest_part=piece_bytes(limit_bytes))
    kept = _Kept(receivers, hf)
    found: dict[tuple, _Open] = {}
    holders: dict[tuple, tuple[tuple[int, ...], ...]] = {}
    for group in _groups(table, trainer):
        first = group[0]
        gpus = kept.gpus(first)
        if not any(gpus):
            continue
        kind = (
            wire.places.stages(first),
            wire.places.expert_shard(first),
            wire.size(first),
            wire.gathered(first),
            wire.cuts(first),
            shares := wire.shares.of(first),
            max(shares) > 1 and first.split == "vocab",  # shares of a vocabulary are no equal ones
        )
        lane = found.get((kind, gpus))
        if lane is None:
            if kind not in holders:
                holders[kind] = wire.holders(first)
            lane = found[kind, gpus] = _Open(holders[kind], kind[3], wire.keepers(first, gpus))
        assert len(group) == 1 or all((wire.size(one), wire.gathered(one), wire.cuts(one)) == kind[2:5] for one in group), (
            f"{[entry.name for entry in group]} are fused and lie differently on the trainer's ranks"
        )
        sizes = [wire.bytes_of(entry) for entry in group]
        parts = tuple(map(sum, zip(*(part for _, part in sizes), strict=True)))
        lane.units.append(Unit(group, sum(size for size, _ in sizes), parts))
    lanes = tuple(
        Lane(number, lane.holders, lane.gathered, lane.keepers, tuple(lane.units)) for number, lane in enumerate(found.values())
    )
    return wire, lanes


def _groups(table: NameTable, trainer: Trainer) -> Iterator[tuple[Entry, ...]]:
    """What must share a call, in the model's order."""
    entries = sorted((entry for entry in table.entries if trainer.mtp or not entry.is_mtp), key=model_order)
    return update_groups(entries, partners_of(table))


class _Kept:
    """GPUs that keep an entry or a share of it, by receiver and rank by rank."""

    def __init__(self, receivers: Sequence[Receiver], hf: HfConfig):
        self._receivers, self._sizes = receivers, {"num_experts": hf.num_experts, "num_layers": hf.num_layers}
        self._by_layer = any(receiver.pp > 1 for receiver in receivers)
        self._found: dict[tuple, tuple[tuple[int, ...], ...]] = {}

    def gpus(self, entry: Entry) -> tuple[tuple[int, ...], ...]:
        where = (entry.layer, entry.name if entry.layer is None else "") if self._by_layer else ()
        key = entry.expert, entry.is_mtp, where
        if key not in self._found:
            self._found[key] = tuple(receiver.keepers(entry, **self._sizes) for receiver in self._receivers)
        return self._found[key]
