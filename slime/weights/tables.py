"""What a rank does with the bytes of a round, as tables that are worked out once for a plan. No torch.

A *write* is one tensor of a delivery, with where it comes from in the trained parameter and where its codes and scales go. A
*move* carries bytes from the buffer beside a bucket to their places in it: parts of tensors travel close to each other and lie
apart in the whole ones. The same part of one expert after another is a step away each time, in the buffer and in the bucket, so
that a move is a copy with strides of many tensors' parts at once: a call costs the host as much as megabytes cost a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import TYPE_CHECKING

from slime.model.names import Entry
from slime.weights.wire import ITEM_BYTES

if TYPE_CHECKING:
    from slime.weights.plan import Delivery, Piece

SCALE = "_scale_inv"
WORD = 8
"""Bytes that a move takes as one number at most."""
_NUMBERS = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Room:
    """A tensor's part within the bytes of a delivery; all numbers are of elements."""

    dtype: str
    shape: tuple[int, ...]
    steps: tuple[int, ...]
    first: int

    @staticmethod
    def of(piece: Piece, part: int) -> Room:
        shape = list(piece.tensor.shape)
        shape[piece.tensor.axis] = sum(stop - start for start, stop in piece.tensor.parts[part])
        steps = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return Room(piece.tensor.dtype, tuple(shape), steps, piece.offset // ITEM_BYTES[piece.tensor.dtype])


@dataclass(frozen=True, slots=True)
class Write:
    entry: Entry
    """The trained parameter."""
    number: int
    """Which of its HF tensors."""
    where: tuple[slice, ...]
    """The part within what this rank has of that tensor."""
    weight: Room
    scale: Room | None
    """Of an FP8 tensor."""


def writes_of(pieces: Iterable[Piece], part: int) -> Iterator[Write]:
    """What of a delivery is not empty, in its order. part: of its tensors."""
    for weight, scale in _with_scales(pieces):
        room = Room.of(weight, part)
        axis, start = weight.tensor.axis, weight.tensor.starts[part]
        if room.shape[axis]:
            where = (*[slice(None)] * axis, slice(start, start + room.shape[axis]))
            number = [tensor.name for tensor in weight.entry.hf].index(weight.tensor.name)
            yield Write(weight.entry, number, where, room, scale and Room.of(scale, part))


def _with_scales(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, Piece | None]]:
    """A weight with the scale behind it, or alone."""
    waiting: Piece | None = None
    for piece in pieces:
        if piece.tensor.name.endswith(SCALE):
            assert waiting is not None and piece.tensor.name == waiting.tensor.name + SCALE
            yield waiting, piece
            waiting = None
            continue
        if waiting is not None:
            yield waiting, None
        waiting = piece
    if waiting is not None:
        yield waiting, None


@dataclass(frozen=True, slots=True)
class Move:
    """A copy with strides; all numbers but the first are of words."""

    word: int
    """Bytes: 8, 4, 2 or 1."""
    shape: tuple[int, ...]
    source: int
    """First word in the buffer beside the bucket."""
    source_steps: tuple[int, ...]
    target: int
    """First word in the bucket."""
    target_steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Equally long rows of bytes of one part of one tensor, and from row to row so many bytes."""

    rows: int
    row: int
    source: int
    source_step: int
    target: int
    target_step: int

    @property
    def form(self) -> tuple[int, int, int, int]:
        return self.rows, self.row, self.source_step, self.target_step


def moves_of(
    deliveries: Iterable[tuple[Delivery, Sequence[Piece]]], *, beside: Mapping[int, int], starts: Mapping[str, int]
) -> Iterator[Move]:
    """The parts of these deliveries to their places in a bucket.

    beside: number of a delivery -> its first byte in the buffer beside it. starts: name -> first byte of the tensor.
    """
    alike: dict[tuple, list[_Rows]] = {}
    for delivery, pieces in deliveries:
        for piece in pieces:
            # The same matrix of other experts and layers lies like it; another one in between would end the run of both.
            kind = delivery.lane, delivery.part, _NUMBERS.sub("", piece.tensor.name)
            for number, rows in enumerate(_rows_of(piece, delivery.part, beside[delivery.number], starts[piece.tensor.name])):
                alike.setdefault((*kind, number, rows.form), []).append(rows)
    for found in alike.values():
        for run in _runs(found):
            yield _move(run)


def _rows_of(piece: Piece, part: int, first: int, start: int) -> Iterator[_Rows]:
    """first: of the delivery in its buffer; start: of the whole tensor in the bucket."""
    tensor, before = piece.tensor, 0
    item = ITEM_BYTES[tensor.dtype] * prod(tensor.shape[tensor.axis + 1 :])
    rows = prod(tensor.shape[: tensor.axis])
    length = sum(stop - begin for begin, stop in tensor.parts[part])
    for begin, stop in tensor.parts[part]:
        source, target = first + piece.offset + before * item, start + begin * item
        if rows * (stop - begin):
            yield _Rows(rows, (stop - begin) * item, source, length * item, target, tensor.shape[tensor.axis] * item)
        before += stop - begin


def _runs(rows: Sequence[_Rows]) -> Iterator[list[_Rows]]:
    """Cut where the way from one to the next is another, or leads back."""
    run: list[_Rows] = []
    for one in rows:
        if run and (min(_step(run[-1], one)) <= 0 or len(run) > 1 and _step(run[-1], one) != _step(run[0], run[1])):
            yield run
            run = []
        run.append(one)
    if run:
        yield run


def _step(one: _Rows, other: _Rows) -> tuple[int, int]:
    return other.source - one.source, other.target - one.target


def _move(run: Sequence[_Rows]) -> Move:
    first = run[0]
    sources, targets = _step(first, run[1]) if len(run) > 1 else (0, 0)
    dims = [(len(run), sources, targets), (first.rows, first.source_step, first.target_step)]
    dims = [dim for dim in dims if dim[0] > 1]
    word = gcd(WORD, first.source, first.target, first.row, *(step for dim in dims for step in dim[1:]))
    return Move(
        word,
        (*(size for size, _, _ in dims), first.row // word),
        first.source // word,
        (*(source // word for _, source, _ in dims), 1),
        first.target // word,
        (*(target // word for _, _, target in dims), 1),
    )
