"""Lanes: tensors that are on the same trainer ranks and go to the same GPUs. A plan schedules lanes, not tensors.

GLM-5.2 on 256 GPUs has 57,000 tensors and 528 lanes: the experts that one trainer rank gives to one rank of each engine, and
the rest of a pipeline stage, whole or in tensor-parallel parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from slime.config.stages import Chunk
from slime.model.hf_config import HfConfig
from slime.model.names import Entry, NameTable
from slime.model.order import model_order
from slime.model.placement import Grid, Holders, Places, holders_of
from slime.weights.serving import Receiver
from slime.weights.wire import (
    Format,
    WireTensor,
    cuts_of,
    is_gathered,
    padded,
    partners_of,
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
    gpus: tuple[int, ...]
    """That keep the units."""
    units: tuple[Unit, ...]


class WireTable:
    """What every entry looks like on the wire; entries that are alike share the arithmetic."""

    def __init__(self, table: NameTable, hf: HfConfig, trainer: Trainer, *, largest_part: int):
        self.form, self.trainer, self._largest = Format.of(hf), trainer, largest_part
        self.places = Places(table, trainer.grid, trainer.chunks, trainer.mtp, trainer.padded_vocab)
        self._sizes: dict[tuple, tuple[int, tuple[int, ...]]] = {}

    def tensors(self, entry: Entry) -> tuple[WireTensor, ...]:
        """In the order in which they lie in a bucket."""
        stages, shard = self.places.stages(entry), self.places.expert_shard(entry)
        found: list[WireTensor] = []
        for tensor in entry.hf:
            held = holders_of(
                entry,
                tensor,
                self.trainer.grid,
                stages=stages,
                expert_shard=shard,
                padded_vocab=self.trainer.padded_vocab,
            )
            if self.gathered(entry):
                held = Holders("all", (held.parts[0],))
            found += wire_tensors(entry, tensor, held, self.form, cuts=self.cuts(entry))
        return tuple(found)

    def size(self, entry: Entry) -> int:
        """Ranks that share the entry."""
        if entry.split == "none":
            return 1
        return self.trainer.grid.tp if entry.expert is None else self.trainer.grid.etp

    def gathered(self, entry: Entry) -> bool:
        return is_gathered(entry, self.size(entry), self.form)

    def cuts(self, entry: Entry) -> int:
        """Into how many pieces each rank's part is cut further."""
        return cuts_of(entry, self.size(entry), self.form, largest=self._largest)

    def bytes_of(self, entry: Entry) -> tuple[int, tuple[int, ...]]:
        """(bytes in a bucket, bytes of each part)."""
        key = tuple((tensor.shape, self.form.is_fp8(tensor)) for tensor in entry.hf), entry.split, entry.expert is None
        key = (*key, entry.float32)
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
        stages, shard = self.places.stages(entry), self.places.expert_shard(entry)
        size = self.size(entry)
        parts = holders_of(
            entry,
            entry.hf[0],
            self.trainer.grid,
            stages=stages,
            expert_shard=shard,
            padded_vocab=self.trainer.padded_vocab,
        ).parts[:size]
        if self.gathered(entry):
            return (tuple(sorted(rank for part in parts for rank in part.ranks)),)
        return tuple(part.ranks for part in parts for _ in range(self.cuts(entry)))


@dataclass
class _Open:
    """A lane while it is filled."""

    holders: tuple[tuple[int, ...], ...]
    gathered: bool
    gpus: tuple[int, ...]
    units: list[Unit] = field(default_factory=list)


def lanes_of(
    table: NameTable, hf: HfConfig, trainer: Trainer, receivers: Sequence[Receiver], *, limit_bytes: int
) -> tuple[WireTable, tuple[Lane, ...]]:
    """Every tensor that some receiver takes, in lanes; units in the model's order. limit_bytes: of a bucket."""
    wire = WireTable(table, hf, trainer, largest_part=piece_bytes(limit_bytes))
    kept = _Kept(receivers, hf)
    found: dict[tuple, _Open] = {}
    holders: dict[tuple, tuple[tuple[int, ...], ...]] = {}
    for group in _groups(table, trainer):
        first = group[0]
        gpus = kept.gpus(first)
        if not gpus:
            continue
        kind = (
            wire.places.stages(first),
            wire.places.expert_shard(first),
            wire.size(first),
            wire.gathered(first),
            wire.cuts(first),
        )
        lane = found.get((kind, gpus))
        if lane is None:
            if kind not in holders:
                holders[kind] = wire.holders(first)
            lane = found[kind, gpus] = _Open(holders[kind], kind[3], gpus)
        assert len(group) == 1 or all((wire.size(one), wire.gathered(one), wire.cuts(one)) == kind[2:] for one in group), (
            f"{[entry.name for entry in group]} are fused and lie differently on the trainer's ranks"
        )
        sizes = [wire.bytes_of(entry) for entry in group]
        parts = tuple(map(sum, zip(*(part for _, part in sizes), strict=True)))
        lane.units.append(Unit(group, sum(size for size, _ in sizes), parts))
    lanes = tuple(
        Lane(number, lane.holders, lane.gathered, lane.gpus, tuple(lane.units)) for number, lane in enumerate(found.values())
    )
    return wire, lanes


def _groups(table: NameTable, trainer: Trainer) -> Iterator[tuple[Entry, ...]]:
    """What must share a call, in the model's order."""
    entries = sorted((entry for entry in table.entries if trainer.mtp or not entry.is_mtp), key=model_order)
    return update_groups(entries, partners_of(table))


class _Kept:
    """GPUs that keep an entry, over all receivers."""

    def __init__(self, receivers: Sequence[Receiver], hf: HfConfig):
        self._receivers, self._sizes = receivers, {"num_experts": hf.num_experts, "num_layers": hf.num_layers}
        self._by_layer = any(receiver.pp > 1 for receiver in receivers)
        self._found: dict[tuple, tuple[int, ...]] = {}

    def gpus(self, entry: Entry) -> tuple[int, ...]:
        where = (entry.layer, entry.name if entry.layer is None else "") if self._by_layer else ()
        key = entry.expert, entry.is_mtp, where
        if key not in self._found:
            gpus = (gpu for receiver in self._receivers for gpu in receiver.keepers(entry, **self._sizes))
            self._found[key] = tuple(sorted(gpus))
        return self._found[key]
