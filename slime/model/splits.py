"""Cuts of the layers into pipeline stages that index sharing allows. Pure arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from slime.model.hf_config import HfConfig


def computing_layers(hf: HfConfig) -> list[int]:
    """Layers that run an indexer of their own, 1-based as logs and flags count them."""
    return [layer + 1 for layer in range(hf.num_layers) if hf.runs_indexer(layer)]


def stages_can_start(hf: HfConfig, sizes: Sequence[int]) -> bool:
    """Whether no stage begins on a layer that reuses the indices of an earlier stage. sizes: layers per stage."""
    return not hf.has_indexer or all(hf.runs_indexer(layer) for layer in accumulate(sizes[:-1]))


def legal_splits(hf: HfConfig, num_stages: int, *, any_start: bool = False) -> list[tuple[int, ...]]:
    """Layers per stage for every --decoder-first/last-pipeline-num-layers whose middle stages are equal and start legally.

    any_start: indices travel between stages (--dsa-send-indices), so that every layer may begin one.
    """
    found = []
    for first in range(1, hf.num_layers) if num_stages > 1 else ():
        for last in range(1, hf.num_layers - first + 1):
            rest, middle = hf.num_layers - first - last, num_stages - 2
            if (rest % middle or not rest) if middle else rest:
                continue
            sizes = (first, *[rest // middle] * middle, last) if middle else (first, last)
            if any_start or stages_can_start(hf, sizes):
                found.append(sizes)
    return found
