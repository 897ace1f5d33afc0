"""Which earlier tokens sparse attention read for each token of a sample, as engines say it, in few bytes.

A token at place p (counted from 0) with p < topk reads everything before it and itself, and nothing is said of it. Of any other
the rising places are kept as the gaps between them, a byte each (255: and so many more), packed by zlib's Huffman coder, which
comes near the entropy: 0.26 bytes a place where half of all tokens are read, 0.8 where one of 32 is.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ROWS_AT_ONCE = 256
"""Rows that are packed together; whoever needs some of them unpacks the block."""

_REFUSAL = b"refused: "


@dataclass(frozen=True)
class Piece:
    """What one engine says: of tokens `first` <= p < `end`, without those below topk."""

    first: int
    end: int
    topk: int
    blocks: Mapping[int, tuple[bytes, ...]]
    """0-based layer that computes a selection -> packed rows, ROWS_AT_ONCE of them in each but the last."""

    @property
    def nbytes(self) -> int:
        return sum(len(block) for blocks in self.blocks.values() for block in blocks)

    @staticmethod
    def of(places: Mapping[int, np.ndarray], first: int, topk: int) -> Piece:
        """places: by layer [rows, topk], of the tokens from `first` on; the order within a row is free. Rows below topk are
        not read. Raises ValueError for a place that is named twice, is behind its token or below 0."""
        rows = len(next(iter(places.values()))) if places else 0
        skipped = min(max(topk - first, 0), rows)
        begin = first + skipped
        blocks = {
            layer: tuple(
                _packed(rows_of[at : at + ROWS_AT_ONCE], begin + at - skipped, layer)
                for at in range(skipped, rows, ROWS_AT_ONCE)
            )
            for layer, rows_of in places.items()
        }
        return Piece(begin, max(first + rows, begin), topk, blocks)

    def rows(self, layer: int, first: int, end: int) -> np.ndarray:
        """int32 [end - first, topk], rising; -1 in rows of which this piece says nothing."""
        out = np.full((end - first, self.topk), -1, np.int32)
        begin, stop = max(first, self.first), min(end, self.end)
        if stop <= begin:
            return out
        for number in range((begin - self.first) // ROWS_AT_ONCE, (stop - 1 - self.first) // ROWS_AT_ONCE + 1):
            at = self.first + number * ROWS_AT_ONCE
            rows = _unpacked(self.blocks[layer][number], self.topk)
            low, high = max(at, begin), min(at + len(rows), stop)
            out[low - first : high - first] = rows[low - at : high - at]
        return out

    def to_bytes(self) -> bytes:
        layers = list(self.blocks)
        head = {
            "first": self.first, "end": self.end, "topk": self.topk, "layers": layers,
            "sizes": [[len(block) for block in self.blocks[layer]] for layer in layers],
        }  # fmt: skip
        body = b"".join(block for layer in layers for block in self.blocks[layer])
        return json.dumps(head).encode() + b"\n" + body

    @staticmethod
    def from_bytes(data: bytes) -> Piece:
        """Raises ValueError for anything else than what to_bytes gives, and with an engine's own reason where it has one."""
        if data.startswith(_REFUSAL):
            raise ValueError(f"an engine cannot say what its attention read: {data.removeprefix(_REFUSAL).decode()}")
        head, newline, body = data.partition(b"\n")
        try:
            said = json.loads(head)
            sizes = said["sizes"]
            if not newline or sum(sum(of_layer) for of_layer in sizes) != len(body):
                raise ValueError("the sizes do not add up")
            at, blocks = 0, {}
            for layer, of_layer in zip(said["layers"], sizes, strict=True):
                found = []
                for size in of_layer:
                    found.append(body[at : at + size])
                    at += size
                blocks[int(layer)] = tuple(found)
            return Piece(int(said["first"]), int(said["end"]), int(said["topk"]), blocks)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{len(data)} bytes are no selections of an engine: {error}") from None


@dataclass(frozen=True)
class Selections:
    """Of a sample: pieces in the order of its tokens. The later of two that tell of a token is right."""

    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.pieces[0].blocks) if self.pieces else ()

    @property
    def end(self) -> int:
        """Tokens up to here are told of, but for gaps."""
        return max((piece.end for piece in self.pieces), default=0)

    def grown(self, pieces: Sequence[Piece], last: int) -> Selections:
        """With the pieces of one more answer, whose engines have read `last` tokens. Raises ValueError for another model's
        than the pieces before, and for pieces of other tokens. What they say of tokens that were told of is newer."""
        for piece in pieces:
            if self.pieces and (piece.topk, tuple(piece.blocks)) != (self.pieces[0].topk, self.layers):
                raise ValueError(
                    f"selections of {piece.topk} in layers {list(piece.blocks)} follow some of {self.pieces[0].topk} in "
                    f"layers {list(self.layers)}: they are another model's"
                )
        end = max(piece.end for piece in pieces)
        if end not in (last, last + 1):  # one more where an answer ended before its decode engine began
            raise ValueError(f"selections end at token {end}, but the engines have read {last}")
        return Selections((*self.pieces, *pieces))

    @property
    def has_gap(self) -> bool:
        """Is there a token of which nothing is said before a piece begins? A piece may be empty, of an engine that lost all."""
        at = self.pieces[0].topk if self.pieces else 0
        for piece in sorted(self.pieces, key=lambda piece: piece.first):
            if at < piece.first:
                return True
            at = max(at, piece.end)
        return False

    def rows(self, layer: int, first: int, end: int, topk: int) -> np.ndarray:
        """int32 [end - first, topk], rising places within the sample; -1 in rows of which nothing is said."""
        out = np.full((end - first, topk), -1, np.int32)
        for piece in self.pieces:
            low, high = max(first, piece.first), min(end, piece.end)
            if low < high:
                out[low - first : high - first] = piece.rows(layer, low, high)
        return out


def _packed(rows: np.ndarray, first: int, layer: int) -> bytes:
    places = np.sort(rows.astype(np.int32), axis=-1)
    gaps = np.diff(places, axis=-1, prepend=np.int32(-1)) - 1
    own = first + np.arange(len(places))
    if (gaps < 0).any() or (places[:, -1] > own).any():
        bad = int(np.flatnonzero((gaps < 0).any(-1) | (places[:, -1] > own))[0])
        raise ValueError(
            f"layer {layer}: the token at place {own[bad]} reads {places[bad, :3].tolist()} ... {places[bad, -1]}, which are "
            f"not {places.shape[1]} different places up to its own"
        )
    flat = gaps.reshape(-1)
    more = flat // 255
    ends = np.cumsum(more + 1) - 1
    data = np.full(ends[-1] + 1 if len(ends) else 0, 255, np.uint8)
    data[ends] = flat - 255 * more
    coder = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data.tobytes()) + coder.flush()


def _unpacked(block: bytes, topk: int) -> np.ndarray:
    data = np.frombuffer(zlib.decompress(block, -15), np.uint8)
    until = np.cumsum(data, dtype=np.int64)[data != 255].reshape(-1, topk)
    before = np.concatenate([[0], until[:-1, -1]])[:, None]
    return (until - before + np.arange(topk)).astype(np.int32)


def refusal(reason: str) -> bytes:
    """In the place of a piece, what Piece.from_bytes raises."""
    return _REFUSAL + reason.encode()
