"""The order in which engines change their weights.

    idle --pause--> paused --flush--> empty --begin--> open --stream--> open
         --end--> sealed --check--> verified --continue--> idle

Between begin and end an engine holds a mixture of two models, so it is paused and answers no request; `check` reads the
version back from every engine before any is allowed to continue, and with `read_back` the weights themselves. If anything
raises on the way, the engines stay paused: a half-updated model never answers. The same order from its beginning, with every
engine alive, is the way on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


class Engines(Protocol):
    """The engines of the model being trained. Each call returns when all of them have answered."""

    def pause(self) -> None: ...
    def flush(self) -> None: ...
    def begin(self, version: int) -> None: ...
    def end(self, version: int) -> None: ...
    def versions(self) -> Mapping[str, str]: ...
    def proceed(self) -> None: ...


class Trainers(Protocol):
    """All ranks of the trainer."""

    def stream(self, version: int) -> StreamReport: ...
    def check(self, version: int) -> None: ...


@dataclass(frozen=True)
class StreamReport:
    """What one trainer group sent for one version."""

    buckets: int
    nbytes: int
    """Bytes of one copy of the model as it travelled."""
    tensors: int
    digest: str = ""
    """Of names, shapes, formats, order and buckets (slime.weights.digest)."""
    lost: tuple[str, ...] = ()
    """Engines that were gone before they had all of it, with what was seen of that."""


@dataclass(frozen=True)
class SyncReport:
    version: int
    stream: StreamReport
    pause_seconds: float
    """From the pause to the moment the engines may answer again."""
    stream_seconds: float

    def line(self) -> str:
        return (
            f"weights v{self.version}: {self.stream.buckets} buckets, {self.stream.tensors} tensors, "
            f"{self.stream.nbytes / 1e6:.1f} MB in {self.stream_seconds:.2f} s (pause {self.pause_seconds:.2f} s)"
        )


def sync_weights(engines: Engines, trainers: Trainers, *, version: int, read_back: bool = False) -> SyncReport:
    """Give the engines weight version `version`. Raises RuntimeError if one of them is lost or reports another version.

    read_back: the trainers also compare the engines' weights with what they sent, and raise RuntimeError if they differ.
    """
    started = time.monotonic()
    engines.pause()
    engines.flush()
    engines.begin(version)
    streaming = time.monotonic()
    stream = trainers.stream(version)
    streamed = time.monotonic()
    if stream.lost:
        raise RuntimeError(f"lost while weights v{version} were sent: {'; '.join(stream.lost)}")
    engines.end(version)
    stale = {engine: found for engine, found in engines.versions().items() if found != str(version)}
    if stale:
        raise RuntimeError(
            f"after sending weights v{version}, these engines report another version: {stale}; they stay paused. "
            "Look at their logs for a refused update and start the run again: it resumes from the last checkpoint."
        )
    if read_back:
        trainers.check(version)
    engines.proceed()
    return SyncReport(version, stream, time.monotonic() - started, streamed - streaming)
