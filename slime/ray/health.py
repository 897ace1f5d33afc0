"""Watching engines while they generate: nobody waits for a dead one, and one that hangs is ended like one that died."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

logger = logging.getLogger(__name__)

# A loaded server may miss one check; one that misses three in a row has stopped working.
_STRIKES = 3
_LEAVE_SECONDS = 30.0
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
                self._missed[engine] = 0
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
        self._told: set[str] = set()
        self._thread = threading.Thread(target=self._watch, name="engine-health", daemon=True)

    def __enter__(self) -> HealthWatch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._leave.set()
        self._thread.join(_LEAVE_SECONDS)  # a look may wait for an actor that does not answer

    def _watch(self) -> None:
        strikes = Strikes()
        next_check = time.monotonic() + self._first_wait + self._interval
        while not self._leave.wait(min(_LOOK_SECONDS, self._interval)):
            self._safely(self._look, "whether engines live")
            if time.monotonic() < next_check:
                continue
            next_check = time.monotonic() + self._interval
            self._safely(lambda: self._check(strikes), "whether engines answer")

    def _check(self, strikes: Strikes) -> None:
        missed = self._ask()
        for engine in strikes.count(missed):
            logger.error("%s missed %d health checks in a row (%s): ending it", engine, _STRIKES, missed[engine])
            self._safely(partial(self._end, engine), f"that {engine} ends")

    def _safely(self, step: Callable[[], object], what: str) -> None:
        """Whatever a step meets, the watch goes on: it is there for the case that something is wrong."""
        try:
            step()
        except Exception as error:
            line = f"{what}: {type(error).__name__}: {error}"
            if line not in self._told and not self._leave.is_set():
                self._told.add(line)
                logger.warning("the watch could not see %s (the watch goes on)", line)
