"""A step that jumps out of its run: told by a running median, which one bad step does not move."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence

WINDOW = 64
"""Steps that the median is taken over."""
FEWEST = 8
"""Steps before the first judgement."""


class Spikes:
    """`judge` each step's figures, and `accept` those of the steps that are taken: a skipped one leaves no trace."""

    def __init__(self, factor: float | None):
        """factor: of the median, above which a figure is a spike; None judges nothing."""
        self._factor = factor
        self._taken: dict[str, deque[float]] = {}

    def judge(self, figures: Mapping[str, float]) -> str | None:
        """Which figure of a step jumps, with the values; None where none does. Figures are positive by nature."""
        for name, value in figures.items():
            taken = self._taken.get(name, ())
            if self._factor is None or len(taken) < FEWEST:
                continue
            median = statistics.median(taken)
            if value > self._factor * median:
                times = f"{value / median:.3g} times {median:.4g}" if median else "not 0"
                return (
                    f"{name} {value:.4g} is {times}, the median of the last {len(taken)} steps (--skip-spike {self._factor:g})"
                )
        return None

    def accept(self, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            if math.isfinite(value):
                self._taken.setdefault(name, deque(maxlen=WINDOW)).append(value)

    def state(self) -> dict[str, list[float]]:
        """For a checkpoint: a resumed run judges as the straight one."""
        return {name: list(taken) for name, taken in self._taken.items()}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        self._taken = {name: deque(taken, maxlen=WINDOW) for name, taken in state.items()}
