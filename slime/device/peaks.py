"""The largest memory of this process in each named phase of a run: what a rehearsal's prediction is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from slime.device.base import Device, MemoryUse


@dataclass(frozen=True)
class PhasePeak:
    """Bytes. `reserved` counts what the allocator caches too."""

    tensors: int
    reserved: int


class Peaks:
    """Phases must not overlap: each counts from its own start. The names are those of the rehearsal's memory model."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.phases: dict[str, PhasePeak] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._device.reset_peak()
        try:
            yield
        finally:
            self.note(phase, self._device.memory())

    def note(self, phase: str, memory: MemoryUse) -> None:
        """Keep the larger of `memory`'s peaks and those noted before."""
        kept = self.phases.get(phase, PhasePeak(0, 0))
        self.phases[phase] = PhasePeak(max(kept.tensors, memory.peak), max(kept.reserved, memory.peak_reserved))
