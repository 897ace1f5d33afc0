"""Copies of all weights on the host, by tag: one model in device memory plays actor and reference in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Module


class Snapshots:
    """`take("ref")` remembers the current weights; `with playing("ref"):` runs with them and then restores what was there."""

    def __init__(self, chunks: Sequence[Module]) -> None:
        self._chunks = chunks
        self._kept: dict[str, list[Tensor]] = {}

    def __contains__(self, tag: str) -> bool:
        return tag in self._kept

    @torch.no_grad()
    def take(self, tag: str) -> None:
        """Copy every parameter and buffer to the host; a second time overwrites in place."""
        live = list(weights_of(self._chunks))
        if tag not in self._kept:
            pin = live[0].is_cuda
            self._kept[tag] = [torch.empty(w.shape, dtype=w.dtype, device="cpu", pin_memory=pin) for w in live]
        for kept, weight in zip(self._kept[tag], live, strict=True):
            kept.copy_(weight)

    def kept(self, tag: str) -> list[Tensor]:
        """The copies themselves, in the order of `weights_of`."""
        return self._kept[tag]

    @torch.no_grad()
    def put(self, tag: str) -> None:
        """Write the copies back into the model. The optimizer's main parameters are not touched."""
        for kept, weight in zip(self._kept[tag], weights_of(self._chunks), strict=True):
            weight.copy_(kept)

    @contextmanager
    def playing(self, tag: str) -> Iterator[None]:
        """The model has the weights of `tag` inside the block, and its own again afterwards, bit for bit."""
        if tag not in self._kept:
            raise ValueError(f"no snapshot {tag!r}; there are {sorted(self._kept)}")
        self.take("_own")
        self.put(tag)
        try:
            yield
        finally:
            self.put("_own")


def weights_of(chunks: Sequence[Module]) -> Iterator[Tensor]:
    """Every parameter and persistent state tensor (router expert bias included), in a fixed order."""
    for chunk in chunks:
        for _, parameter in chunk.named_parameters():
            yield parameter.data
        for _, buffer in chunk.named_buffers():
            yield buffer
