"""Who holds the devices. With --colocate trainer and engines share them, one at a time."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol


class Holder(enum.Enum):
    """The states of shared devices, in the order in which they follow one another."""

    ENGINES = "engines"
    """Engines hold weights and KV cache and answer requests; the trainer sleeps."""
    TRAINER = "trainer"
    """The trainer is awake; the engines have given back weights and KV cache."""
    SYNC = "sync"
    """Engines have room for weights but no KV cache yet; the trainer sends them, its optimizer and gradients asleep."""


class EngineMemory(Protocol):
    def release_memory(self, labels: Sequence[str] | None = None) -> None: ...
    def resume_memory(self, what: str, labels: Sequence[str] | None = None) -> None: ...


class TrainerMemory(Protocol):
    def sleep(self, what: str) -> None: ...
    def wake(self) -> None: ...


Revive = Callable[[Callable[[], None]], list[str]]
"""Starts dead engines again, after a call of its argument, and says which; [] where none is dead or may be started."""


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
    ):
        self._engines, self._trainers, self.holder, self._revive = engines, trainers, holder, revive

    @contextmanager
    def training(self) -> Iterator[None]:
        """Engines give up their memory, the trainer wakes."""
        self._expect(Holder.ENGINES)
        self._revive(lambda: None)  # who died after the last answer
        self._engines.release_memory()
        self._trainers.wake()
        self.holder = Holder.TRAINER
        yield

    @contextmanager
    def syncing(self) -> Iterator[None]:
        """The trainer keeps its weights only and the engines take memory for theirs; at the end it gives up the rest."""
        self._expect(Holder.TRAINER)
        # Who died beside training. A new engine takes what is free for its cache, so the trainer sleeps until it stands.
        revived = self._revive(self._sleep)
        if revived:
            self._engines.release_memory(revived)
            self._trainers.wake()
        self._trainers.sleep("steps")
        self._engines.resume_memory("weights")
        self.holder = Holder.SYNC
        yield
        self._trainers.sleep("weights")
        self._engines.resume_memory("kv_cache")
        self.holder = Holder.ENGINES

    def restart_engines(self) -> bool:
        """Within `syncing`, after a death: the dead are started while the trainer sleeps, then all is as before, but for their
        weights. False: nobody was dead."""
        self._expect(Holder.SYNC)
        revived = self._revive(lambda: self._trainers.sleep("weights"))
        if revived:
            self._engines.release_memory(revived)
            self._trainers.wake()
            self._trainers.sleep("steps")
            self._engines.resume_memory("weights", revived)
        return bool(revived)

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
