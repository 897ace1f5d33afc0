"""Watching engines while they generate: nobody waits for a dead one, and one that hangs is ended like one that died."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

# A loaded server may miss one check; one that misses three in a row has stopped working.
_STRIKES = 3
# How often processes are looked after, which costs nothing.
_LOOK_SECONDS = 5.0


class Strikes:
    """Counts missed checks in a row, per engine."""

    def __init__(self, limit: int = _STRIKES):
        self._limit, self._missed = limit, Counter()

    def count(self, missed: Mapping[str, str | None]) -> list[str]:
        """missed: engine -> why it did not answer, or None if it did. The engines that have now missed `limit` in a row."""
        out = []
        for engine, why in missed.items():
            self._missed[engine] = 0 if why is None else self._missed[engine] + 1
            if self._missed[engine] == self._limit:
                out.append(engine)
        return out


class HealthWatch:
    """`with HealthWatch(...)`: a thread looks every few seconds and asks every `interval`, first after `first_wait` more.

    `ask` gives for each engine why it did not answer (None: it did); `end` kills one, whose requests then fail at once. With an
    interval of math.inf nobody is asked.
    """

    def __init__(
        self,
        look: Callable[[], None],
        ask: Callable[[], Mapping[str, str | None]],
        end: Callable[[str], None],
        *,
        interval: float,
        first_wait: float,
    ):
        self._look, self._ask, self._end = look, ask, end
        self._interval, self._first_wait = interval, first_wait
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="engine-health", daemon=True)

    def __enter__(self) -> HealthWatch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._leave.set()
        self._thread.join()

    def _watch(self) -> None:
        strikes = Strikes()
        next_check = time.monotonic() + self._first_wait + self._interval
        while not self._leave.wait(min(_LOOK_SECONDS, self._interval)):
            self._look()
            if time.monotonic() < next_check:
                continue
            next_check = time.monotonic() + self._interval
            missed = self._ask()
            for engine in strikes.count(missed):
                logger.error("engine %s missed %d health checks in a row (%s): ending it", engine, _STRIKES, missed[engine])
                self._end(engine)
