"""A piece of the weight stream from the trainer to the engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorMeta:
    """One tensor inside a flat bucket: its Hugging Face name and where its bytes are."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """torch dtype without the prefix, e.g. "float8_e4m3fn"."""
    start: int
    """First byte in the bucket."""
    nbytes: int


@dataclass(frozen=True)
class WeightBucket:
    """Tensors that travel together, packed into one byte buffer.

    flat: [nbytes] uint8. Tensors that an engine fuses on load (q_a_proj with kv_a_proj_with_mqa, a weight with its scale) are
    always in the same bucket, because the engine pairs them only within one update call.
    """

    metas: tuple[TensorMeta, ...]
    flat: Tensor

    @property
    def nbytes(self) -> int:
        return self.flat.numel()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(meta.name for meta in self.metas)
