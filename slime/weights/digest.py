"""The digest of a weight stream: which tensors travel, in which order, shape and format, in which bucket.

A rehearsal computes it from arithmetic, a run from the buckets that it really sent; equal digests mean that the run moves the
weights as rehearsed. No torch: a rehearsal runs without it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable
from pathlib import Path

SCALE = "_scale_inv"
KEY_VARIABLE = "SLIME_REHEARSAL_KEY"
"""Environment variable with the secret that reports are signed with; without it they are not."""


class StreamDigest:
    """Fed bucket by bucket. A tensor's FP8 scale travels in its bucket and counts into its bytes."""

    def __init__(self) -> None:
        self._sha, self._buckets = hashlib.sha256(), 0

    def add(self, tensors: Iterable[tuple[str, tuple[int, ...], int]]) -> None:
        """(name, shape, bytes) of every tensor of the next bucket, scales among them or counted in already."""
        sizes: dict[str, int] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape, nbytes in tensors:
            base = name.removesuffix(SCALE)
            sizes[base] = sizes.get(base, 0) + nbytes
            if base == name:
                shapes[name] = tuple(shape)
        for name, nbytes in sizes.items():
            shape = "x".join(map(str, shapes.get(name, ())))
            self._sha.update(f"{self._buckets}\t{name}\t{shape}\t{nbytes}\n".encode())
        self._buckets += 1

    def hex(self) -> str:
        return self._sha.hexdigest()


def sign(digest: str, key: str) -> str:
    """HMAC-SHA256 of a digest."""
    return hmac.new(key.encode(), digest.encode(), hashlib.sha256).hexdigest()


def rehearsed_digest(report: str, *, key: str | None) -> str:
    """The stream digest in a rehearsal's JSON report. Raises ValueError for another file, or one not signed with `key`."""
    try:
        told = json.loads(Path(report).read_text())
        launchable, weights = told["launchable"], told["weights"]
        digest, signature = weights["stream_digest"], weights["signature"]
    except OSError as error:
        raise ValueError(
            f"--rehearsed {report} cannot be read ({error.strerror}); write it with --rehearse --json FILE"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"--rehearsed {report} is no complete rehearsal report ({type(error).__name__}: {error})") from None
    if not launchable:
        raise ValueError(f"--rehearsed {report} says that the run is not launchable; rehearse it again and follow its fixes")
    if key and not hmac.compare_digest(signature or "", sign(digest, key)):
        raise ValueError(
            f"--rehearsed {report} is not signed with this {KEY_VARIABLE}; rehearse the run again where the variable is set"
        )
    return digest
