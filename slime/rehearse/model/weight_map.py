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
from itertools import groupby

from slime.config.stages import Chunk
from slime.engine.spec import EngineSpec
from slime.model.hf_config import HfConfig
from slime.model.names import Entry, HfTensor, NameTable
from slime.rehearse.model.flops import is_mtp, layer_of
from slime.rehearse.model.holders import Holders, Keepers, faults, holders_of
from slime.rehearse.model.shares import Grid, has_embedding_copy
from slime.weights.digest import StreamDigest

SCALE_BYTES = 4


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
    def stream_digest(self) -> str:
        """What a run compares with its real buckets: names, shapes, bytes and buckets, without holders and engines."""
        digest = StreamDigest()
        for _, bucket in groupby(self.rows, key=lambda row: row.bucket):
            digest.add((row.name, row.shape, row.nbytes) for row in bucket)
        return digest.hex()

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


def wire_bytes(tensor: HfTensor, *, fp8: bool, block: int, float32: bool) -> int:
    numel = 1
    for size in tensor.shape:
        numel *= size
    if fp8:
        rows, columns = tensor.shape
        return numel + -(-rows // block) * -(-columns // block) * SCALE_BYTES
    return numel * (4 if float32 else 2)


def fp8_format(hf: HfConfig) -> tuple[int | None, frozenset[str]]:
    """(block, modules kept as they are) of the serving checkpoint; (None, ...) when it is not block FP8."""
    section = hf.get("quantization_config") or {}
    block = section.get("weight_block_size")
    return (int(block[0]) if block else None), hf.fp8_exceptions


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
    partners = Counter(entry.together for entry in table.entries if entry.together)
    for source, stage, entries in _sources(table, grid, places, mtp):
        for bucket in _bucketed(_groups(entries, partners), limit_bytes, block, kept):
            number = len(buckets)
            buckets.append(sum(nbytes for _, _, nbytes, _ in bucket))
            source_bytes[source] += buckets[-1]
            rows += [describe.row(entry, tensor, nbytes, fp8, stage, source, number) for entry, tensor, nbytes, fp8 in bucket]
    return WeightMap(tuple(rows), tuple(buckets), dict(source_bytes), tuple(problems(table, rows, grid, places, mtp=mtp)))


class Places:
    """Which pipeline stages and which expert shard have a tensor."""

    def __init__(self, table: NameTable, grid: Grid, chunks: Sequence[Chunk], mtp: bool, padded_vocab: int | None):
        self.padded_vocab = padded_vocab
        self._grid, self._last = grid, chunks[-1].pp_rank
        self._owner = {layer: chunk.pp_rank for chunk in chunks for layer in chunk.layers}
        self._per_shard = -(
            -max((entry.expert + 1 for entry in table.entries if entry.expert is not None), default=0) // grid.ep
        )
        self._embedding = (0, self._last) if has_embedding_copy(table, grid.pp, mtp=mtp) else (0,)

    def stages(self, entry: Entry) -> tuple[int, ...]:
        """The first one sends it; the last one may have a copy of the embedding."""
        if entry.name.startswith("embedding."):
            return self._embedding
        layer = layer_of(entry)
        return (self._last if layer is None else self._owner[layer],)

    def expert_shard(self, entry: Entry) -> int | None:
        return None if entry.expert is None else entry.expert // self._per_shard


def _sources(table: NameTable, grid: Grid, places: Places, mtp: bool) -> Iterator[tuple[int, int, list[Entry]]]:
    """(rank, stage, its entries in the model's order): dense sources of all stages, then the experts' sources, by rank."""
    dense: dict[int, list[Entry]] = {stage: [] for stage in range(grid.pp)}
    experts: dict[tuple[int, int], list[Entry]] = {(stage, ep): [] for stage in range(grid.pp) for ep in range(grid.ep)}
    for entry in table.entries:
        if is_mtp(entry) and not mtp:
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


# The order in which the layer's modules register their parameters. `check_ranks` compares it with the built model's.
_IN_LAYER = (
    "input_layernorm.weight",
    "self_attention.linear_q_proj.weight",
    "self_attention.linear_q_down_proj.weight",
    "self_attention.linear_q_up_proj.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.linear_kv_down_proj.weight",
    "self_attention.linear_kv_up_proj.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "self_attention.linear_proj.weight",
    "self_attention.wq_b.weight",
    "self_attention.wk.weight",
    "self_attention.k_norm.weight",
    "self_attention.k_norm.bias",
    "self_attention.weights_proj.weight",
    "post_self_attn_layernorm.weight",
    "pre_mlp_layernorm.weight",
    "mlp.router.weight",
    "mlp.experts.linear_fc1.weight",
    "mlp.experts.linear_fc2.weight",
    "mlp.shared_experts.linear_fc1.weight",
    "mlp.shared_experts.linear_fc2.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc2.weight",
    "post_mlp_layernorm.weight",
    "mlp.router.expert_bias",
)
# The MTP layer's own order, around its decoder layer.
_IN_MTP = (
    *("enorm.weight", "hnorm.weight", "eh_proj.weight"),
    *(f"transformer_layer.{name}" for name in _IN_LAYER),
    "final_layernorm.weight",
)
_PLACE = {name: place for names in (_IN_LAYER, _IN_MTP) for place, name in enumerate(names)}


def model_order(entry: Entry) -> tuple[int, int, int, int]:
    """Sort key: parameters before buffers; embedding, layers, final norm, MTP layer, head; a layer's own order; the expert."""
    layer = 10**6 + 1 if is_mtp(entry) else layer_of(entry)
    if layer is None:
        where = -1 if entry.name.startswith("embedding.") else 10**6 + 2 * ("output_layer" in entry.name)
        return int(entry.float32), where, 0, 0
    suffix = entry.name.split(".", 3)[3]
    if entry.expert is not None:
        suffix = suffix.removesuffix(str(entry.expert))
    return int(entry.float32), layer, _PLACE[suffix], entry.expert or 0


def _groups(entries: Iterable[Entry], partners: Mapping[str, int]) -> Iterator[list[tuple[Entry, HfTensor]]]:
    """Tensors that must share a bucket; a fused pair is sent when its last member comes. partners: how many each has."""
    waiting: dict[str, list[tuple[Entry, HfTensor]]] = {}
    arrived: Counter[str] = Counter()
    for entry in entries:
        tensors = [(entry, tensor) for tensor in entry.hf]
        if not entry.together:
            yield tensors
            continue
        waiting.setdefault(entry.together, []).extend(tensors)
        arrived[entry.together] += 1
        if arrived[entry.together] == partners[entry.together]:
            yield waiting.pop(entry.together)


Sized = tuple[Entry, HfTensor, int, bool]


def _bucketed(
    groups: Iterable[list[tuple[Entry, HfTensor]]], limit: int, block: int | None, kept: frozenset[str]
) -> Iterator[list[Sized]]:
    """The rule of `slime.weights.buckets.fill_buckets`, on sizes alone."""
    waiting: list[Sized] = []
    waiting_bytes = 0
    for group in groups:
        sized = []
        for entry, tensor in group:
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


def fp8_block_is_local(entry: Entry, size: int, block: int) -> bool:
    """Each HF tensor's shard starts and ends on block borders along the cut."""
    if entry.split == "none" or size == 1:
        return True
    axis = 1 if entry.split == "columns" else 0
    return all(tensor.shape[axis] % (size * block) == 0 for tensor in entry.hf if tensor.fp8)


def problems(table: NameTable, rows: Sequence[Row], grid: Grid, places: Places, *, mtp: bool) -> list[str]:
    """What would make the map no proof: a tensor that is not sent, sent twice, away from its partner, or not whole on ranks."""
    wanted = {tensor.name: entry for entry in table.entries if mtp or not is_mtp(entry) for tensor in entry.hf}
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
