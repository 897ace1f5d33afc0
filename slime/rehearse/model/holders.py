"""Who has which part of a tensor, rank by rank: of the trainer's ranks and of an engine's.

Rank sets are written as ranges: `0-28/4` is 0, 4, ..., 28 and `0-3,7` is 0, 1, 2, 3, 7.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from slime.engine.spec import EngineSpec
from slime.model.names import Entry, HfTensor
from slime.rehearse.model.shares import Grid


def ranges(ranks: Iterable[int]) -> str:
    """Ascending ranks in the notation above."""
    words, rest = [], list(ranks)
    while rest:
        step = rest[1] - rest[0] if len(rest) > 1 else 1
        count = 1
        while count < len(rest) and rest[count] - rest[count - 1] == step:
            count += 1
        if count == 2 and step > 1:
            count = 1
        words.append(str(rest[0]) if count == 1 else f"{rest[0]}-{rest[count - 1]}" + (f"/{step}" if step > 1 else ""))
        rest = rest[count:]
    return ",".join(words)


@dataclass(frozen=True)
class Part:
    """Rows or columns [start, stop) of a tensor, and the global ranks that hold them; [0, 1) is a tensor that is not cut."""

    start: int
    stop: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Holders:
    """Every part of one HF tensor on the trainer's ranks. axis: "rows", "columns", or "all" where ranks hold it whole."""

    axis: str
    parts: tuple[Part, ...]

    @cached_property
    def text(self) -> str:
        """`rows 0:38720@0-28/4;rows 38720:77440@1-29/4;...` or `all@0-31`."""
        return ";".join(
            ("all" if self.axis == "all" else f"{self.axis} {part.start}:{part.stop}") + f"@{ranges(part.ranks)}"
            for part in self.parts
        )


def holders_of(
    entry: Entry, tensor: HfTensor, grid: Grid, *, stages: Sequence[int], expert_shard: int | None, padded_vocab: int | None
) -> Holders:
    """stages: those that have the tensor (the last one may have a copy of the embedding)."""
    size = 1 if entry.split == "none" else grid.tp if expert_shard is None else grid.etp
    ranks = [_ranks(grid, stages, expert_shard, number, size) for number in range(size)]
    if size == 1:
        return Holders("all", (Part(0, 1, ranks[0]),))
    columns = entry.split == "columns"
    length = tensor.shape[1 if columns else 0]
    # One HF tensor with gate and up in it: each rank has its rows of both.
    pieces = 2 if entry.split == "gated_rows" and len(entry.hf) == 1 else 1
    padded = padded_vocab if entry.split == "vocab" and padded_vocab else length
    borders = [min(length, number * padded // (pieces * size)) for number in range(pieces * size + 1)]
    parts = [Part(start, stop, ranks[number % size]) for number, (start, stop) in enumerate(pairwise(borders))]
    return Holders("columns" if columns else "rows", tuple(parts))


def _ranks(grid: Grid, stages: Sequence[int], expert_shard: int | None, number: int, size: int) -> tuple[int, ...]:
    """Ranks with part `number` of `size`: neighbours are of one tensor-parallel group, then come replicas or expert shards."""
    found: list[int] = []
    for stage in stages:
        first, end = stage * grid.ranks_per_stage, (stage + 1) * grid.ranks_per_stage
        if expert_shard is None:
            found += range(first + number, end, size)
        else:
            begin, stride = first + expert_shard * grid.etp, grid.etp * grid.ep
            found += (rank for start in range(begin, end, stride) for rank in range(start + number, start + grid.etp, size))
    return tuple(found)


def faults(holders: Holders, length: int, grid: Grid, *, stages: Sequence[int], expert_shard: int | None) -> Iterator[str]:
    """What contradicts "every replica holds every part exactly once", by each rank's own coordinates. length: along the axis.

    A replica of a tensor that tensor parallelism cuts is one (cp, dp) of a stage, of an expert one edp; of a whole tensor it is
    a rank.
    """
    end = 0
    for part in holders.parts:
        if part.start != end:
            low, high = sorted((part.start, end))
            yield f"{holders.axis} {low}:{high} are held {'by nobody' if part.start > end else 'twice'}"
        end = part.stop
    if end != length:
        yield f"{holders.axis} {end}:{length} are held by nobody"
    wanted = Counter(_replicas(grid, stages, expert_shard, whole=holders.axis == "all"))
    for number, part in enumerate(holders.parts):
        seen = Counter(_replica(grid, rank, expert_shard, whole=holders.axis == "all") for rank in part.ranks)
        if seen != wanted:
            wrong = sorted((seen - wanted) | (wanted - seen))[0]
            yield f"part {number} is {seen[wrong]} times in replica {wrong}, not {wanted[wrong]} times"


def _replica(grid: Grid, rank: int, expert_shard: int | None, *, whole: bool) -> tuple[int, ...]:
    place = grid.place(rank)
    if expert_shard is not None:
        return place["pp"], place["ep"], place["edp"], place["etp"] if whole else -1
    return place["pp"], place["cp"], place["dp"], place["tp"] if whole else -1


def _replicas(grid: Grid, stages: Sequence[int], expert_shard: int | None, *, whole: bool) -> Iterator[tuple[int, ...]]:
    for stage in stages:
        if expert_shard is not None:
            for edp in range(grid.edp):
                yield from ((stage, expert_shard, edp, etp) for etp in (range(grid.etp) if whole else (-1,)))
            continue
        for cp in range(grid.cp):
            for dp in range(grid.dp):
                yield from ((stage, cp, dp, tp) for tp in (range(grid.tp) if whole else (-1,)))


class Keepers:
    """Which ranks of each engine keep a part of a tensor; every rank is handed every bucket.

    By SGLang's rules: routed experts lie on consecutive expert-parallel ranks; attention and embedding are cut over the ranks
    of an attention replica, an MLP over all ranks unless moe_dense_tp_size (dense) or an all-to-all backend (shared experts)
    keeps it whole, the output layer as the embedding with enable_dp_lm_head and over all ranks without.
    """

    def __init__(self, engines: Sequence[EngineSpec], num_experts: int):
        self._engines, self._num_experts = engines, num_experts
        self._said: dict[tuple, str] = {}

    def text(self, entry: Entry, tensor: HfTensor) -> str:
        """`0-3:all@0-63` (engines 0 to 3, each rank the whole tensor), `0:1/4@0-63;1:all@0-7` (a quarter on each)."""
        cuts = tuple(self.cut(entry, tensor, engine) for engine in self._engines)
        if (entry.expert, cuts) not in self._said:
            said: dict[str, list[int]] = {}
            for engine, cut in zip(self._engines, cuts, strict=True):
                words = ("all" if cut == 1 else f"1/{cut}") + f"@{ranges(self._ranks(entry, engine))}"
                words += " of a pipeline stage" if engine.pp_size > 1 else ""
                said.setdefault(words, []).append(engine.engine_id)
            self._said[entry.expert, cuts] = ";".join(f"{ranges(ids)}:{words}" for words, ids in said.items())
        return self._said[entry.expert, cuts]

    def _ranks(self, entry: Entry, engine: EngineSpec) -> range:
        if entry.expert is None:
            return range(engine.tp_size)
        share = engine.tp_size // engine.ep_size
        first = entry.expert // (self._num_experts // engine.ep_size) * share
        return range(first, first + share)

    @staticmethod
    def cut(entry: Entry, tensor: HfTensor, engine: EngineSpec) -> int:
        """Into how many parts the engine cuts it."""
        attention, settings = engine.tp_size // engine.dp_size, engine.settings
        if entry.expert is not None:
            return engine.tp_size // engine.ep_size
        if entry.split == "none":
            return 1
        if ".mlp.shared_experts." in entry.name:
            return engine.tp_size if str(settings.get("moe_a2a_backend", "none")) == "none" else 1
        if ".mlp." in entry.name:
            return 1 if str(settings.get("moe_dense_tp_size")) == "1" else engine.tp_size
        if entry.name.startswith("output_layer."):
            return attention if str(settings.get("enable_dp_lm_head", "")).lower() in ("true", "1") else engine.tp_size
        if entry.groups and tensor is not entry.hf[0]:
            return min(attention, entry.groups[0])  # with more ranks than key/value heads, some have the same one
        return attention
