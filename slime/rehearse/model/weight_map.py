"""Where every Hugging Face tensor lives in the trainer, how it travels, and which engine ranks keep it. Pure arithmetic.

One row per tensor, in the order in which the weight stream sends it. The stream's rules are those of `slime.ray.weight_stream`:
first the dense weights, one source rank per pipeline stage, then the routed experts, one source per stage and expert shard;
inside a source the model's own order of parameters, buffers last; tensors that an engine fuses travel together; buckets are
filled up to --update-weight-buffer-size. A test compares rows and buckets with the real stream of a small model.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from slime.config.stages import Chunk
from slime.engine.spec import EngineSpec
from slime.model.hf_config import HfConfig
from slime.model.names import Entry, HfTensor, NameTable
from slime.model.order import model_order
from slime.model.placement import Grid, Holders, Places, faults, fp8_block_is_local, holders_of
from slime.rehearse.model.keepers import Keepers
from slime.weights.wire import fp8_format, partners_of, update_groups, wire_bytes


@dataclass(frozen=True)
class Row:
    """One tensor on the wire. `name` is the HF name; its FP8 scale, when there is one, travels with it."""

    name: str
    shape: tuple[int, ...]
    fp8: bool
    stage: int
    holders: Holders
    """Which trainer ranks hold which part of it."""
    source: int
    """Global rank that sends it."""
    bucket: int
    """Number of its bucket in the whole stream."""
    engines: str
    """Which ranks of which engines keep it: `0-3:all@0-63`."""
    block: str
    """FP8: "shard" when every block lies in one shard, "gather" when the source gathers the tensor first; else "-"."""
    nbytes: int

    @property
    def length(self) -> int:
        """Along the axis in which `holders` cuts it; 1 where it is not cut."""
        return {"all": 1, "rows": self.shape[0], "columns": self.shape[-1]}[self.holders.axis]

    def canonical(self) -> str:
        shape, fp8 = "x".join(map(str, self.shape)), "fp8" if self.fp8 else "-"
        trainer = f"{self.name}\t{shape}\t{fp8}\t{self.stage}\t{self.holders.text}\t{self.source}"
        return f"{trainer}\t{self.bucket}\t{self.engines}\t{self.block}\t{self.nbytes}"


@dataclass(frozen=True)
class WeightMap:
    rows: tuple[Row, ...]
    bucket_bytes: tuple[int, ...]
    source_bytes: dict[int, int]
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
    return sum(
        wire_bytes(tensor, fp8=fp8 and tensor.fp8, block=128, float32=entry.float32)
        for entry in table.entries
        for tensor in entry.hf
    )


def build_weight_map(
    table: NameTable,
    hf: HfConfig,
    grid: Grid,
    chunks: Sequence[Chunk],
    engines: Sequence[EngineSpec],
    *,
    limit_bytes: int,
    mtp: bool = False,
    padded_vocab: int | None = None,
) -> WeightMap:
    """mtp: the MTP layer is trained and travels too; else engines keep the checkpoint's. padded_vocab: the embedding's rows."""
    block, kept = fp8_format(hf)
    receivers = [engine for engine in engines if engine.update_weights]
    places = Places(table, grid, chunks, mtp, padded_vocab)
    describe = _Describer(grid, hf, receivers, block, places)
    rows: list[Row] = []
    buckets: list[int] = []
    source_bytes: Counter[int] = Counter()
    partners = partners_of(table)
    for source, stage, entries in _sources(table, grid, places, mtp):
        for bucket in _bucketed(update_groups(entries, partners), limit_bytes, block, kept):
            number = len(buckets)
            buckets.append(sum(nbytes for _, _, nbytes, _ in bucket))
            source_bytes[source] += buckets[-1]
            rows += [describe.row(entry, tensor, nbytes, fp8, stage, source, number) for entry, tensor, nbytes, fp8 in bucket]
    return WeightMap(tuple(rows), tuple(buckets), dict(source_bytes), tuple(problems(table, rows, grid, places, mtp=mtp)))


def _sources(table: NameTable, grid: Grid, places: Places, mtp: bool) -> Iterator[tuple[int, int, list[Entry]]]:
    """(rank, stage, its entries in the model's order): dense sources of all stages, then the experts' sources, by rank."""
    dense: dict[int, list[Entry]] = {stage: [] for stage in range(grid.pp)}
    experts: dict[tuple[int, int], list[Entry]] = {(stage, ep): [] for stage in range(grid.pp) for ep in range(grid.ep)}
    for entry in table.entries:
        if entry.is_mtp and not mtp:
            continue
        stage, shard = places.stages(entry)[0], places.expert_shard(entry)
        if shard is None:
            dense[stage].append(entry)
        else:
            experts[stage, shard].append(entry)
    for stage, entries in dense.items():
        yield stage * grid.ranks_per_stage, stage, sorted(entries, key=model_order)
    for (stage, ep), entries in experts.items():
        if entries:
            yield stage * grid.ranks_per_stage + ep * grid.etp, stage, sorted(entries, key=model_order)


Sized = tuple[Entry, HfTensor, int, bool]


def _bucketed(
    groups: Iterable[tuple[Entry, ...]], limit: int, block: int | None, kept: frozenset[str]
) -> Iterator[list[Sized]]:
    """The rule of `slime.weights.buckets.fill_buckets`, on sizes alone."""
    waiting: list[Sized] = []
    waiting_bytes = 0
    for group in groups:
        sized = []
        for entry, tensor in ((one, tensor) for one in group for tensor in one.hf):
            fp8 = block is not None and tensor.fp8 and tensor.name.removesuffix(".weight") not in kept
            sized.append((entry, tensor, wire_bytes(tensor, fp8=fp8, block=block or 0, float32=entry.float32), fp8))
        nbytes = sum(row[2] for row in sized)
        if waiting and waiting_bytes + nbytes > limit:
            yield waiting
            waiting, waiting_bytes = [], 0
        waiting += sized
        waiting_bytes += nbytes
    if waiting:
        yield waiting


class _Describer:
    """Rows with their words; what is alike for many is made once."""

    def __init__(self, grid: Grid, hf: HfConfig, engines: Sequence[EngineSpec], block: int | None, places: Places):
        self._grid, self._block, self._places = grid, block, places
        self._keepers = Keepers(engines, hf.num_experts)
        self._holders: dict[tuple, Holders] = {}

    def row(self, entry: Entry, tensor: HfTensor, nbytes: int, fp8: bool, stage: int, source: int, bucket: int) -> Row:
        return Row(
            tensor.name,
            tensor.shape,
            fp8,
            stage,
            self._held(entry, tensor),
            source,
            bucket,
            self._keepers.text(entry, tensor),
            self._blocks(entry, fp8),
            nbytes,
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
        return "shard" if fp8_block_is_local(entry, size, self._block) else "gather"


def problems(table: NameTable, rows: Sequence[Row], grid: Grid, places: Places, *, mtp: bool) -> list[str]:
    """What would make the map no proof: a tensor that is not sent, sent twice, away from its partner, or not whole on ranks."""
    wanted = {tensor.name: entry for entry in table.entries if mtp or not entry.is_mtp for tensor in entry.hf}
    sent = Counter(row.name for row in rows)
    found = [f"{name} is in no bucket" for name in wanted if name not in sent]
    found += [f"{name} is sent {count} times" for name, count in sent.items() if count != 1]
    found += [f"{name} is sent and not in the model" for name in sent if name not in wanted]
    bucket_of: dict[str, int] = {}
    for row in rows:
        together = wanted[row.name].together if row.name in wanted else ""
        if together and bucket_of.setdefault(together, row.bucket) != row.bucket:
            found.append(f"{row.name} is not in the bucket of the tensor that engines fuse it with")
    return found + _misplaced(wanted, rows, grid, places)


def _misplaced(wanted: Mapping[str, Entry], rows: Sequence[Row], grid: Grid, places: Places) -> list[str]:
    """Tensors whose parts are not on ranks exactly once per replica, or that a rank sends which does not hold them."""
    told: dict[tuple, list[str]] = {}
    found = []
    for row in rows:
        entry = wanted.get(row.name)
        if entry is None:
            continue
        stages, shard = places.stages(entry), places.expert_shard(entry)
        kind = id(row.holders), row.length, stages, shard, row.source
        if kind not in told:
            told[kind] = list(faults(row.holders, row.length, grid, stages=stages, expert_shard=shard))
            if row.source not in row.holders.parts[0].ranks:
                told[kind].append(f"rank {row.source} sends it and does not hold its first part")
        found += [f"{row.name}: {fault}" for fault in told[kind]]
    return found
