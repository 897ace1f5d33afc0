"""Where the trainer holds each tensor: the grid of its ranks, the stages and shards that have it, which part is on whom.

Pure arithmetic on the table of names; a rehearsal, the plan of a weight sync and the tests of real ranks read the same answer.
Rank sets are written as ranges: `0-28/4` is 0, 4, ..., 28 and `0-3,7` is 0, 1, 2, 3, 7.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from slime.config.stages import Chunk
from slime.model.names import Entry, HfTensor, NameTable


@dataclass(frozen=True)
class Grid:
    """Sizes of the training ranks. Axes from fastest: tp, cp, ep, dp, pp (megatron-core's default order)."""

    world: int
    tp: int
    pp: int
    cp: int
    ep: int
    etp: int

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def edp(self) -> int:
        """Replicas of an expert."""
        return self.world // (self.etp * self.ep * self.pp)

    @property
    def ranks_per_stage(self) -> int:
        return self.world // self.pp

    def place(self, rank: int) -> dict[str, int]:
        """Coordinates of a rank, dense and expert ones."""
        inside, stage = rank % self.ranks_per_stage, rank // self.ranks_per_stage
        return {
            "tp": inside % self.tp,
            "cp": inside // self.tp % self.cp,
            "dp": inside // (self.tp * self.cp),
            "pp": stage,
            "etp": inside % self.etp,
            "ep": inside // self.etp % self.ep,
            "edp": inside // (self.etp * self.ep),
        }


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
        layer = entry.layer
        return (self._last if layer is None else self._owner[layer],)

    def expert_shard(self, entry: Entry) -> int | None:
        return None if entry.expert is None else entry.expert // self._per_shard


def has_embedding_copy(table: NameTable, pp: int, *, mtp: bool) -> bool:
    """The last of several stages has the embedding too: for tied weights, or to embed what the MTP layer reads."""
    return pp > 1 and (bool(table.aliases) or mtp)


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
    pieces = pieces_per_rank(entry)
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


def fp8_block_is_local(entry: Entry, size: int, block: int) -> bool:
    """Each HF tensor's shard starts and ends on block borders along the cut. size: ranks that share the entry."""
    if entry.split == "none" or size == 1:
        return True
    axis = 1 if entry.split == "columns" else 0
    pieces = pieces_per_rank(entry) * size
    return all(tensor.shape[axis] % (pieces * block) == 0 for tensor in entry.hf if tensor.fp8)


def pieces_per_rank(entry: Entry) -> int:
    """One HF tensor with gate and up in it: each rank has its rows of both."""
    return 2 if entry.split == "gated_rows" and len(entry.hf) == 1 else 1
