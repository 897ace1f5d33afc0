"""Where every Hugging Face tensor lives in the trainer, which ranks make it for the engines and when, and who keeps it.

One row per tensor. Holders come from the grid alone; makers and rounds are those of the plan that a run carries out
(`slime.weights.plan`), and the map is a proof when both agree: nobody makes what it does not hold, everything that engines keep
reaches every GPU that keeps it once, from a GPU that has it by then.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from slime.engine.spec import EngineSpec
from slime.model.hf_config import HfConfig
from slime.model.names import Entry, HfTensor, NameTable
from slime.model.order import model_order
from slime.model.placement import Grid, Holders, Places, faults, fp8_block_is_local, holders_of, ranges
from slime.rehearse.model.keepers import Keepers
from slime.weights.lanes import Trainer
from slime.weights.plan import Delivery, SyncPlan
from slime.weights.wire import Format


@dataclass(frozen=True)
class Row:
    """One tensor on the wire. `name` is the HF name; its FP8 scale, when there is one, travels with it."""

    name: str
    shape: tuple[int, ...]
    fp8: bool
    stage: int
    holders: Holders
    """Which trainer ranks hold which part of it."""
    makers: tuple[int, ...]
    """Ranks that export it, each the part that it holds; empty where no engine takes it."""
    round: int | None
    """Of the plan; None where no engine takes it."""
    engines: str
    """Which ranks of which engines keep it: `0-3:all@0-63`."""
    block: str
    """FP8: "shard" when every block lies in one shard, "gather" when the ranks that share it gather it first; else "-"."""
    nbytes: int

    @property
    def length(self) -> int:
        """Along the axis in which `holders` cuts it; 1 where it is not cut."""
        return {"all": 1, "rows": self.shape[0], "columns": self.shape[-1]}[self.holders.axis]

    def canonical(self) -> str:
        shape, fp8 = "x".join(map(str, self.shape)), "fp8" if self.fp8 else "-"
        makers, number = ranges(self.makers) or "-", "-" if self.round is None else self.round
        trainer = f"{self.name}\t{shape}\t{fp8}\t{self.stage}\t{self.holders.text}\t{makers}"
        return f"{trainer}\t{number}\t{self.engines or '-'}\t{self.block}\t{self.nbytes}"


@dataclass(frozen=True)
class WeightMap:
    rows: tuple[Row, ...]
    """By round; what no engine takes comes last."""
    made_bytes: Mapping[int, int]
    """Rank -> bytes that it exports."""
    problems: tuple[str, ...]
    """Orphaned, doubled or separated tensors, parts that some replica has not just once; empty when the map is a proof."""

    @property
    def digest(self) -> str:
        """sha256 of the canonical table: two runs with the same digest move the same tensors the same way."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(row.canonical().encode())
            digest.update(b"\n")
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)


def checkpoint_bytes(table: NameTable, *, fp8: bool) -> int:
    """Sum of all tensors' bytes in a BF16 or block-FP8 checkpoint, MTP layer included."""
    form = Format("bfloat16", 128 if fp8 else None, frozenset())
    return sum(form.nbytes(entry, tensor) for entry in table.entries for tensor in entry.hf)


def build_weight_map(
    table: NameTable, hf: HfConfig, trainer: Trainer, engines: Sequence[EngineSpec], plan: SyncPlan | None
) -> WeightMap:
    """plan: of the sync to `engines`; None where none takes weights."""
    places = Places(table, trainer.grid, trainer.chunks, trainer.mtp, trainer.padded_vocab)
    describe = _Describer(trainer.grid, hf, [engine for engine in engines if engine.update_weights], places)
    when, made_bytes = _when(plan) if plan is not None else ({}, Counter())
    rows = []
    for entry in table.entries:
        if not entry.is_mtp or trainer.mtp:
            number, makers = when.get(entry.name, (None, ()))
            rows += [(number, entry, describe.row(entry, tensor, makers, number)) for tensor in entry.hf]
    last = 0 if plan is None else plan.rounds
    rows.sort(key=lambda one: (last if one[0] is None else one[0], places.stages(one[1])[0], model_order(one[1])))
    ordered = tuple(row for _, _, row in rows)
    found = problems(table, ordered, trainer.grid, places, mtp=trainer.mtp)
    if plan is not None:
        found += [f"{name} is in no round" for name in _untaken(table, trainer, plan, when)]
        found += [line for delivery in plan.deliveries for line in undelivered(plan, delivery)]
    return WeightMap(ordered, dict(made_bytes), tuple(found))


def _when(plan: SyncPlan) -> tuple[dict[str, tuple[int, tuple[int, ...]]], Counter[int]]:
    """(Megatron name -> (round, ranks that make a part of it), rank -> bytes that it exports)"""
    makers: dict[tuple[int, int], set[int]] = {}
    rounds: dict[tuple[int, int], int] = {}
    made: Counter[int] = Counter()
    for delivery in plan.deliveries:
        for rank in delivery.makers:
            made[rank] += delivery.nbytes
        for unit in delivery.units:
            key = delivery.lane, unit
            assert rounds.setdefault(key, delivery.round) == delivery.round, f"parts of unit {key} are in two rounds"
            makers.setdefault(key, set()).update(delivery.makers)
    alike: dict[frozenset[int], tuple[int, ...]] = {}
    found = {}
    for (lane, unit), ranks in makers.items():
        sorted_ranks = alike.setdefault(frozenset(ranks), tuple(sorted(ranks)))
        for entry in plan.lanes[lane].units[unit].entries:
            found[entry.name] = rounds[lane, unit], sorted_ranks
    return found, made


def _untaken(table: NameTable, trainer: Trainer, plan: SyncPlan, when: Mapping[str, object]) -> Iterator[str]:
    """Tensors that some engine takes, and no round brings."""
    drafts = any(entry.is_mtp for lane in plan.lanes for unit in lane.units for entry in unit.entries)
    for entry in table.entries:
        if entry.name not in when and (not entry.is_mtp or (trainer.mtp and drafts)):
            yield from (tensor.name for tensor in entry.hf)


def undelivered(plan: SyncPlan, delivery: Delivery) -> Iterator[str]:
    """What is wrong with a delivery: a GPU that keeps it and gets it not just once, a sender that has not got it yet."""
    lane = plan.lanes[delivery.lane]
    keepers = lane.keepers[delivery.part]
    arrives = dict.fromkeys(delivery.makers, 0)
    got = [gpu for gpu in delivery.makers if gpu in keepers]
    for hop, _, target in delivery.legs:
        arrives[target] = hop + 1
        got.append(target)
    if sorted(got) != list(keepers):
        wrong = sorted((Counter(got) - Counter(keepers)) | (Counter(keepers) - Counter(got)))[0]
        yield f"delivery {delivery.number} of round {delivery.round} reaches GPU {wrong} {got.count(wrong)} times"
    for hop, source, _ in delivery.legs:
        if arrives.get(source, hop + 1) > hop:
            yield f"delivery {delivery.number} of round {delivery.round} leaves GPU {source} in hop {hop} before it is there"
    if not set(delivery.makers) <= set(lane.holders[delivery.part]):
        yield f"delivery {delivery.number} of round {delivery.round} is made on ranks that do not hold it"


class _Describer:
    """Rows with their words; what is alike for many is made once."""

    def __init__(self, grid: Grid, hf: HfConfig, engines: Sequence[EngineSpec], places: Places):
        self._grid, self._places = grid, places
        self._form = Format.of(hf)
        self._keepers = Keepers(engines, hf.num_experts)
        self._holders: dict[tuple, Holders] = {}

    def row(self, entry: Entry, tensor: HfTensor, makers: tuple[int, ...], number: int | None) -> Row:
        fp8 = self._form.is_fp8(tensor)
        return Row(
            tensor.name,
            tensor.shape,
            fp8,
            self._places.stages(entry)[0],
            self._held(entry, tensor),
            makers,
            number,
            self._keepers.text(entry, tensor),
            self._blocks(entry, fp8),
            self._form.nbytes(entry, tensor),
        )

    def _held(self, entry: Entry, tensor: HfTensor) -> Holders:
        stages, shard = self._places.stages(entry), self._places.expert_shard(entry)
        kind = stages, shard, entry.split, tensor.shape, len(entry.hf)
        if kind not in self._holders:
            padded = self._places.padded_vocab
            self._holders[kind] = holders_of(entry, tensor, self._grid, stages=stages, expert_shard=shard, padded_vocab=padded)
        return self._holders[kind]

    def _blocks(self, entry: Entry, fp8: bool) -> str:
        if not fp8:
            return "-"
        size = self._grid.etp if entry.expert is not None else self._grid.tp
        return "shard" if fp8_block_is_local(entry, size, self._form.block) else "gather"


def problems(table: NameTable, rows: Sequence[Row], grid: Grid, places: Places, *, mtp: bool) -> list[str]:
    """What would make the map no proof: a tensor that is not sent, sent twice, away from its partner, or not whole on ranks."""
    wanted = {tensor.name: entry for entry in table.entries if mtp or not entry.is_mtp for tensor in entry.hf}
    sent = Counter(row.name for row in rows)
    found = [f"{name} is in no row" for name in wanted if name not in sent]
    found += [f"{name} is sent {count} times" for name, count in sent.items() if count != 1]
    found += [f"{name} is sent and not in the model" for name in sent if name not in wanted]
    round_of: dict[str, int | None] = {}
    for row in rows:
        together = wanted[row.name].together if row.name in wanted else ""
        if together and round_of.setdefault(together, row.round) != row.round:
            found.append(f"{row.name} is not in the round of the tensor that engines fuse it with")
    return found + _misplaced(wanted, rows, grid, places)


def _misplaced(wanted: Mapping[str, Entry], rows: Sequence[Row], grid: Grid, places: Places) -> list[str]:
    """Tensors whose parts are not on ranks exactly once per replica, or that a rank makes which does not hold them."""
    told: dict[tuple, list[str]] = {}
    found = []
    for row in rows:
        entry = wanted.get(row.name)
        if entry is None:
            continue
        stages, shard = places.stages(entry), places.expert_shard(entry)
        kind = id(row.holders), row.length, stages, shard, row.makers
        if kind not in told:
            wrong = list(faults(row.holders, row.length, grid, stages=stages, expert_shard=shard))
            told[kind] = wrong or list(_unmade(row))
        found += [f"{row.name}: {fault}" for fault in told[kind]]
    return found


def _unmade(row: Row) -> Iterator[str]:
    """Where a tensor travels, each part that is not empty has a maker, and each maker a part."""
    makers = set(row.makers)
    for rank in sorted(makers.difference(*(part.ranks for part in row.holders.parts))):
        yield f"rank {rank} makes it and does not hold a part of it"
    for number, part in enumerate(row.holders.parts):
        if makers and row.block != "gather" and part.start < part.stop and makers.isdisjoint(part.ranks):
            yield f"no rank that holds part {number} makes it"
