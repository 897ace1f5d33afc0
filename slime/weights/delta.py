"""Differences between two versions of a tensor's bytes, packed, and digests of bytes. Blind to number formats.

xor        new ^ old, of the tensor's length
overwrite  count (u4), the positions of the bytes that differ (u4 each), their new values
Both little-endian and packed with zstd. The formats, with digests of the new bytes, are those of slime's delta sync.
"""

from __future__ import annotations

import zlib
from typing import Literal

import blake3
import numpy as np
import xxhash
import zstandard

Encoding = Literal["xor", "overwrite"]
Checksum = Literal["xxh3-128", "blake3", "adler32"]
_LEVEL = 1
_COUNT = np.dtype("<u4")


def digest(data: np.ndarray, kind: Checksum) -> str:
    """Of uint8 [n], in hexadecimal."""
    view = memoryview(np.ascontiguousarray(data))
    if kind == "xxh3-128":
        return xxhash.xxh3_128_hexdigest(view)
    return blake3.blake3(view).hexdigest() if kind == "blake3" else f"{zlib.adler32(view):08x}"


def encode(old: np.ndarray, new: np.ndarray, encoding: Encoding) -> bytes:
    """old, new: uint8 [n]."""
    if encoding == "xor":
        return zstandard.ZstdCompressor(level=_LEVEL).compress(np.bitwise_xor(old, new).data)
    if len(new) > np.iinfo(np.uint32).max:
        raise ValueError(
            f"a tensor of {len(new)} bytes has positions that u4 cannot count; use --update-weight-delta-encoding xor"
        )
    places = np.flatnonzero(old != new).astype(_COUNT)
    parts = np.array([len(places)], _COUNT).tobytes() + places.tobytes() + new[places].tobytes()
    return zstandard.ZstdCompressor(level=_LEVEL).compress(parts)


def decode(old: np.ndarray, packed: bytes, encoding: Encoding) -> np.ndarray:
    """The new bytes. Raises ValueError when the difference is not one of a tensor of this length."""
    limit = len(old) if encoding == "xor" else 4 + 5 * len(old)
    try:
        raw = np.frombuffer(zstandard.ZstdDecompressor().decompress(packed, max_output_size=limit), np.uint8)
    except zstandard.ZstdError as error:
        raise ValueError(f"it cannot be unpacked ({error})") from None
    if encoding == "xor":
        if len(raw) != len(old):
            raise ValueError(f"it is of {len(raw)} bytes, the tensor has {len(old)}")
        return np.bitwise_xor(old, raw)
    count = int(raw[:4].view(_COUNT)[0]) if len(raw) >= 4 else -1
    if len(raw) != 4 + 5 * count:
        raise ValueError(f"it says {count} bytes and holds {len(raw)}")
    places = raw[4 : 4 + 4 * count].view(_COUNT)
    if count and int(places.max()) >= len(old):
        raise ValueError(f"it changes byte {int(places.max())} of {len(old)}")
    new = old.copy()
    new[places] = raw[4 + 4 * count :]
    return new
