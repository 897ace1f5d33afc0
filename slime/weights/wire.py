"""What travels: every tensor as an engine loads it, in the groups that one update call must carry. No torch.

A tensor that tensor parallelism cuts is on the trainer's ranks in parts: ranges of its rows or of its columns. Where the cut
lies on FP8 blocks a rank quantises its own part, and the part's codes and scales are those of the whole tensor; where it
does not, the tensor is gathered first and is whole where it is sent from. Parts end where the shares of engine ranks do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from math import prod
from typing import NamedTuple

from slime.model.hf_config import HfConfig
from slime.model.names import Entry, HfTensor, NameTable
from slime.model.placement import Holders, fp8_block_is_local

ALIGNMENT = 16
"""Tensors start at multiples of it in a bucket: CUDA loads want aligned addresses, and float32 views a multiple of 4."""
PIECES = 64
SMALLEST_PIECE = 2**20
"""Bytes under which splitting a send costs more than it levels."""
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1}
"""By torch's name of the number format."""

Ranges = tuple[tuple[int, int], ...]
"""[start, stop) along one axis, ascending."""


def padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Format:
    """The number formats of the serving checkpoint, by its own config."""

    dtype: str
    """torch's name of what is not FP8."""
    block: int | None
    """Side of an FP8 block; None when the checkpoint is not block FP8."""
    kept: frozenset[str]
    """Modules that an FP8 checkpoint keeps as they are."""

    @staticmethod
    def of(hf: HfConfig) -> Format:
        block = (hf.get("quantization_config") or {}).get("weight_block_size")
        dtype = str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16")
        return Format(dtype, int(block[0]) if block else None, frozenset(hf.fp8_exceptions))

    def is_fp8(self, tensor: HfTensor) -> bool:
        return self.block is not None and tensor.fp8 and tensor.name.removesuffix(".weight") not in self.kept

    def nbytes(self, entry: Entry, tensor: HfTensor) -> int:
        """Of one of the entry's tensors, its FP8 scales included."""
        numel = prod(tensor.shape)
        if not self.is_fp8(tensor):
            return numel * ITEM_BYTES["float32" if entry.float32 else self.dtype]
        rows, columns = tensor.shape
        return numel + -(-rows // self.block) * -(-columns // self.block) * ITEM_BYTES["float32"]


@dataclass(frozen=True)
class WireTensor:
    """One tensor of a bucket: what an engine loads under `name`, and the parts in which it arrives."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """torch dtype without the prefix, e.g. "float8_e4m3fn"."""
    axis: int
    """0: parts are rows, 1: columns. A tensor that is not cut has one part, all of its rows."""
    parts: tuple[Ranges, ...]
    """Per part its ranges along the axis."""
    starts: tuple[int, ...]
    """Per part its first row or column within what a rank that gives it has."""

    @property
    def nbytes(self) -> int:
        return self._along() * sum(stop - start for ranges in self.parts for start, stop in ranges)

    def part_bytes(self, part: int) -> int:
        return self._along() * sum(stop - start for start, stop in self.parts[part])

    def _along(self) -> int:
        """Bytes of one row, or of one column."""
        total = ITEM_BYTES[self.dtype]
        for axis, size in enumerate(self.shape):
            total *= 1 if axis == self.axis else size
        return total


def wire_tensors(
    entry: Entry, tensor: HfTensor, held: Holders, form: Format, *, cuts: int = 1, borders: Sequence[int] = ()
) -> tuple[WireTensor, ...]:
    """The tensor, and behind it its scale where it is FP8.

    held: which part each rank has. borders: of the shares that engines load, ascending; no part lies across one. cuts: into how
    many ranges each of these parts is cut further, so that several links carry it.
    """
    axis = 1 if held.axis == "columns" or (borders and entry.split == "columns") else 0
    parts = parts_of(held, tensor.shape[axis], cuts=cuts, borders=borders)
    ranges, starts = tuple(part.ranges for part in parts), tuple(part.start for part in parts)
    if not form.is_fp8(tensor):
        return (WireTensor(tensor.name, tensor.shape, "float32" if entry.float32 else form.dtype, axis, ranges, starts),)
    block = form.block or 1
    scale_shape = tuple(-(-size // block) for size in tensor.shape)
    scales = tuple(tuple((start // block, -(-stop // block)) for start, stop in part) for part in ranges)
    return (
        WireTensor(tensor.name, tensor.shape, "float8_e4m3fn", axis, ranges, starts),
        WireTensor(tensor.scale_name, scale_shape, "float32", axis, scales, tuple(start // block for start in starts)),
    )


class WirePart(NamedTuple):
    """What of a tensor travels as one."""

    owner: int
    """Number of the trainer's part that it is in."""
    ranges: Ranges
    start: int
    """Its first row or column within that part."""


def parts_of(held: Holders, length: int, *, cuts: int, borders: Sequence[int]) -> list[WirePart]:
    """The trainer's parts of a tensor of that length along its axis, cut at the borders and into pieces."""
    # With two pieces per rank, parts come piece by piece: 0 1 2 3 0 1 2 3.
    ranks = dict.fromkeys(part.ranks for part in held.parts)
    if held.axis == "all":
        whole: list[Ranges] = [((0, length),)]
    else:
        whole = [tuple((part.start, part.stop) for part in held.parts if part.ranks == of_part) for of_part in ranks]
    if cuts == 1 and not borders:
        return [WirePart(owner, ranges, 0) for owner, ranges in enumerate(whole)]
    found = []
    for owner, ((first, last),) in enumerate(whole):
        inside = [first, *(border for border in borders if first < border < last), last]
        for start, stop in chain.from_iterable(_cut(*pair, cuts) for pair in pairwise(inside)):
            found.append(WirePart(owner, ((start, stop),), start - first))
    return found


def _cut(start: int, stop: int, cuts: int) -> Iterator[tuple[int, int]]:
    return pairwise(start + (stop - start) * number // cuts for number in range(cuts + 1))


def piece_bytes(limit_bytes: int) -> int:
    """About what one send moves: little enough of a full bucket to level the links, enough to be worth a send."""
    return max(SMALLEST_PIECE, limit_bytes // PIECES)


def cuts_of(entry: Entry, size: int, form: Format, *, largest: int) -> int:
    """How often each part of a large unquantised tensor (embedding, output layer) is cut further.

    size: parts that it has. largest: bytes that a part should have at most.
    """
    tensor = entry.hf[0]
    if len(entry.hf) > 1 or form.is_fp8(tensor) or entry.split not in ("none", "rows", "vocab"):
        return 1
    return min(-(-form.nbytes(entry, tensor) // size // largest), tensor.shape[0] // size) or 1


def is_gathered(entry: Entry, size: int, form: Format) -> bool:
    """A cut through FP8 blocks: the tensor is put together before it is quantised. size: ranks that share it."""
    if form.block is None or not any(form.is_fp8(tensor) for tensor in entry.hf):
        return False
    return not fp8_block_is_local(entry, size, form.block)


def update_groups(entries: Iterable[Entry], partners: Mapping[str, int]) -> Iterator[tuple[Entry, ...]]:
    """Entries that must share a call; a fused pair comes with its last member. partners: how many members each key has."""
    waiting: dict[str, list[Entry]] = {}
    for entry in entries:
        if not entry.together:
            yield (entry,)
            continue
        group = waiting.setdefault(entry.together, [])
        group.append(entry)
        if len(group) == partners[entry.together]:
            yield tuple(waiting.pop(entry.together))


def partners_of(table: NameTable) -> Counter[str]:
    """How many entries share each key of fused tensors."""
    return Counter(entry.together for entry in table.entries if entry.together)
