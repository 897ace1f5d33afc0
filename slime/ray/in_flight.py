"""Rollouts that were begun and are not trained yet: one, or, a step ahead of training, two.

A checkpoint goes on with the first of them that it has not trained, so each keeps the data position before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from slime.rollout.reports import Report
from slime.types import RolloutBatch

Answer = tuple[ray.ObjectRef, Report]


@dataclass(frozen=True)
class Rollout:
    """What one generation handed over."""

    rollout_id: int
    batch: RolloutBatch
    batch_ref: ray.ObjectRef
    report: Report
    seconds: float
    """It took; the trainer may have trained meanwhile."""
    waited: float
    """The driver did nothing else."""


class Side(Protocol):
    """What is asked of the rollout actor."""

    def begin_rollout(self, rollout_id: int) -> Callable[[], Answer]: ...
    def state(self, saving: int | None = None) -> dict | None: ...
    def restore(self, state: dict) -> None: ...


Recovering = Callable[[Callable[[], Answer], Callable[[], None]], Answer]
"""Waits for an answer and says it; where dead servers broke it, they are started again, the second is called, and it waits
anew."""


@dataclass
class _Begun:
    position: dict | None
    wait: Callable[[], Answer]
    done: Rollout | None = None


class InFlight:
    """Begins rollouts, waits for them, and knows where the data stood before each."""

    def __init__(self, side: Callable[[], Side], recovering: Recovering):
        self._side, self._recovering = side, recovering
        self._begun: dict[int, _Begun] = {}

    def begin(self, rollout_id: int, *, keeps_position: bool, saving: int | None, anew: bool = False) -> None:
        """saving: the rollout before it, where a checkpoint of that may be written while this one is generated. anew: what is
        being generated already is given up."""
        position = self._side().state(saving) if keeps_position else None
        if anew:
            self._side().restore(position)
        self._begun[rollout_id] = _Begun(position, self._side().begin_rollout(rollout_id))

    def has_begun(self, rollout_id: int) -> bool:
        return rollout_id in self._begun

    def finish(self, rollout_id: int) -> Rollout:
        """Wait for one that has begun. It stays in flight until it is trained."""
        begun, started = self._begun[rollout_id], time.monotonic()
        if begun.done is not None:
            return begun.done

        def again() -> None:
            self._side().restore(begun.position)
            begun.wait = self._side().begin_rollout(rollout_id)

        batch_ref, report = self._recovering(lambda: begun.wait(), again)
        waited = time.monotonic() - started
        seconds = max(waited, report.metrics.get("perf/rollout_time", 0.0))
        begun.done = Rollout(rollout_id, ray.get(batch_ref), batch_ref, report, seconds, waited)
        return begun.done

    def finish_all(self) -> None:
        for rollout_id in list(self._begun):
            self.finish(rollout_id)

    def trained(self, rollout_id: int) -> None:
        del self._begun[rollout_id]

    def position_after(self, rollout_id: int) -> dict[str, Any] | None:
        """Where the data stood when that rollout was the last one begun; None if it still is, or nobody looked."""
        begun = self._begun.get(rollout_id + 1)
        return None if begun is None else begun.position
