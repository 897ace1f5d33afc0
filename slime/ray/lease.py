"""Who holds the devices. With --colocate trainer and engines share them, one at a time.

An engine may die while it gives or takes memory, as at any other time. With --use-fault-tolerance it is started again, and the
hand-over goes on with it.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

logger = logging.getLogger(__name__)


class Holder(enum.Enum):
    """The states of shared devices, in the order in which they follow one another."""

    ENGINES = "engines"
    """Engines hold weights and KV cache and answer requests; the trainer sleeps."""
    TRAINER = "trainer"
    """The trainer is awake; the engines have given back weights and KV cache."""
    SYNC = "sync"
    """Engines have room for weights but no KV cache yet; the trainer sends them, its optimizer and gradients asleep."""


class EngineMemory(Protocol):
    def release_memory(self, labels: Sequence[str] | None = None, what: str = "everything") -> None: ...
    def resume_memory(self, what: str, labels: Sequence[str] | None = None) -> None: ...


class TrainerMemory(Protocol):
    def sleep(self, what: str) -> None: ...
    def wake(self) -> None: ...


class Awake:
    """A trainer that keeps its memory while engines hold the devices (--no-offload-train)."""

    def sleep(self, what: str) -> None:
        pass

    def wake(self) -> None:
        pass


Revive = Callable[[Callable[[], None]], list[str]]
"""Starts dead engines again, after a call of its argument, and says which; [] where none is dead or may be started."""


DiedLately = Callable[[], bool]
"""Whether an engine is dead that may be started again, waiting some seconds for one that is about to be."""


def nobody_died(prepare: Callable[[], None]) -> list[str]:
    return []


class Lease:
    """Hands the devices over in the one legal order: engines -> trainer -> sync -> engines.

    After release and resume an engine's weights are garbage (its allocator keeps no copy), so `sync` is the only way back to
    `ENGINES`; asking for another order is our mistake and fails at once.
    """

    def __init__(
        self,
        engines: EngineMemory,
        trainers: TrainerMemory,
        *,
        holder: Holder,
        revive: Revive = nobody_died,
        died_lately: DiedLately = lambda: False,
    ):
        self._engines, self._trainers, self.holder = engines, trainers, holder
        self._revive, self._died_lately = revive, died_lately

    @contextmanager
    def training(self) -> Iterator[None]:
        """Engines give up their memory, the trainer wakes."""
        self._expect(Holder.ENGINES)
        self._revive(lambda: None)  # who died after the last answer
        self.release_engines()
        self._trainers.wake()
        self.holder = Holder.TRAINER
        yield

    @contextmanager
    def syncing(self) -> Iterator[None]:
        """The trainer keeps its weights only and the engines take memory for theirs; at the end it gives up the rest."""
        self._expect(Holder.TRAINER)
        # Who died beside training. A new engine takes what is free for its cache, so the trainer sleeps until it stands.
        self._revive_beside(self._sleep)
        self._trainers.sleep("steps")
        self.holder = Holder.SYNC
        try:
            self._engines.resume_memory("weights")
        except RuntimeError as broken:
            if not self._died_lately() or not self.restart_engines():
                raise
            logger.warning("taking memory for weights went on with a new engine; what broke: %s", broken)
        yield
        self._trainers.sleep("weights")
        try:
            self._engines.resume_memory("kv_cache")
        except RuntimeError as broken:
            # All others have their caches, and the new weights. The next to ask for an engine finds the dead one.
            if not self._died_lately():
                raise
            logger.warning("an engine died while it took memory for its cache: %s", broken)
        self.holder = Holder.ENGINES

    def release_engines(self) -> None:
        """Engines that share devices give up weights and cache; one that dies of it is started again, and does so too."""
        try:
            self._engines.release_memory()
        except RuntimeError as broken:
            if not self._died_lately() or not (revived := self._revive(lambda: None)):
                raise
            logger.warning("giving memory back went on with a new engine; what broke: %s", broken)
            self._engines.release_memory(revived)

    def restart_engines(self) -> bool:
        """Within `syncing`, after a death: the dead are started while the trainer sleeps, then all is as before, but for their
        weights. False: nobody was dead."""
        self._expect(Holder.SYNC)
        revived, woken = self._revive_beside(lambda: self._trainers.sleep("weights"))
        if woken:
            self._trainers.sleep("steps")
        if revived:
            self._engines.resume_memory("weights", revived)
        return bool(revived)

    def restart_trainers(self, restart: Callable[[RuntimeError], None], lost: RuntimeError) -> None:
        """Within `syncing`: new ranks need more room than those that sent weights and are lost, so engines make it again."""
        self._expect(Holder.SYNC)
        self._engines.release_memory(what="weights")
        restart(lost)
        self._trainers.sleep("steps")
        self._engines.resume_memory("weights")

    def _revive_beside(self, sleep: Callable[[], None]) -> tuple[list[str], bool]:
        """(who was started again while the trainer slept, whether it did). It is awake again, even where nobody was started:
        one that was taken for dead may be back by then."""
        slept = False

        def prepare() -> None:
            nonlocal slept
            sleep()
            slept = True

        revived = self._revive(prepare)
        if revived:
            self._engines.release_memory(revived)
        if slept:
            self._trainers.wake()
        return revived, slept

    def _sleep(self) -> None:
        self._trainers.sleep("steps")
        self._trainers.sleep("weights")

    def _expect(self, holder: Holder) -> None:
        assert self.holder is holder, f"the devices are with {self.holder.value}, but this step needs them with {holder.value}"


class FreeLease(Lease):
    """Trainer and engines on devices of their own: nothing changes hands."""

    def __init__(self, revive: Revive = nobody_died):
        self.holder, self._revive = Holder.ENGINES, revive

    @contextmanager
    def training(self) -> Iterator[None]:
        yield

    @contextmanager
    def syncing(self) -> Iterator[None]:
        self._revive(lambda: None)
        yield

    def restart_engines(self) -> bool:
        return bool(self._revive(lambda: None))

    def restart_trainers(self, restart: Callable[[RuntimeError], None], lost: RuntimeError) -> None:
        restart(lost)
