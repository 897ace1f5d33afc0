"""Where the seconds of a weight stream go."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class StreamSeconds:
    """Of one rank; the rest of the stream's time went into planning, groups of processes and the allocator's cache."""

    make: float = 0.0
    """Tensors gathered and written into the buffers that travel, in the engines' number formats."""
    exchange: float = 0.0
    """The plan's sends and receives, hop by hop, and parts put in their places; where the next round is made meanwhile, what is
    left of both when the host has done its part of the making."""
    hand_over: float = 0.0
    """Buckets given to engines, and waits until these have loaded: what is not hidden behind the next round. A broadcast's wire
    is in it."""

    def __str__(self) -> str:
        return f"make {self.make:.2f} s, exchange {self.exchange:.2f} s, hand over {self.hand_over:.2f} s"

    @staticmethod
    def slowest(ranks: Iterable[StreamSeconds]) -> StreamSeconds:
        """The most of each over all ranks, which need not be one rank's."""
        each = [(one.make, one.exchange, one.hand_over) for one in ranks]
        return StreamSeconds(*(max(column) for column in zip(*each, strict=True))) if each else StreamSeconds()


class Stopwatch:
    """Adds up seconds by phase."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.spent[phase] += time.monotonic() - started

    @property
    def seconds(self) -> StreamSeconds:
        return StreamSeconds(**{phase: self.spent[phase] for phase in ("make", "exchange", "hand_over")})
