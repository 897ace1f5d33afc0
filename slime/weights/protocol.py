"""The order in which engines change their weights.

    idle --pause--> paused --flush--> empty --begin--> open --stream--> open
         --end--> sealed --check--> verified --continue--> idle

Between begin and end an engine holds a mixture of two models, so it is paused and answers no request; `check` reads the
version back from every engine before any is allowed to continue, and with `read_back` the weights themselves. An engine that
does not give all of them back by name is compared with itself: its checksums must stay as they are when all is sent once more,
for what it holds already changes nothing. If anything raises on the way, the engines stay paused: a half-updated model never
answers. The same order from its beginning, with every engine alive, is the way on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from slime.weights.stopwatch import Stopwatch, StreamSeconds

logger = logging.getLogger(__name__)


class Engines(Protocol):
    """The engines of the model being trained. Each call returns when all of them have answered."""

    def pause(self) -> None: ...
    def flush(self) -> None: ...
    def begin(self, version: int) -> None: ...
    def load(self, version: int, folder: str) -> None: ...
    def end(self, version: int) -> None: ...
    def versions(self) -> Mapping[str, str]: ...
    def checksums(self, labels: Sequence[str]) -> Mapping[str, list[dict[str, str]]]: ...
    def proceed(self) -> None: ...


class Trainers(Protocol):
    """All ranks of the trainer."""

    def stream(self, version: int) -> StreamReport: ...
    def check(self, version: int) -> Sequence[str]: ...


@dataclass(frozen=True)
class StreamReport:
    """What one trainer group sent for one version."""

    buckets: int
    nbytes: int
    """Bytes of one copy of the model as it travelled."""
    tensors: int
    digest: str = ""
    """Of names, shapes, formats, order and buckets (slime.weights.digest)."""
    published: str = ""
    """Folder of the version, where the engines load it from files."""
    lost: tuple[str, ...] = ()
    """Engines that were gone before they had all of it, with what was seen of that."""
    seconds: StreamSeconds = StreamSeconds()
    """Of the slowest ranks; zeros where weights went by files."""


@dataclass(frozen=True)
class SyncReport:
    version: int
    stream: StreamReport
    pause_seconds: float
    """From the pause to the moment the engines may answer again."""
    steps: Mapping[str, float]
    """Seconds of each step of the order above; `end` with the versions that are read back."""

    @property
    def stream_seconds(self) -> float:
        """From the opening of the update to its end."""
        return sum(self.steps.get(step, 0.0) for step in ("begin", "stream", "load", "end"))

    @property
    def engine_seconds(self) -> float:
        """What engines took besides loading: to pause, empty their cache, open and close the update, and go on."""
        return sum(seconds for step, seconds in self.steps.items() if step not in ("stream", "load", "check"))

    def line(self) -> str:
        return (
            f"weights v{self.version}: {self.stream.buckets} buckets, {self.stream.tensors} tensors, "
            f"{self.stream.nbytes / 1e6:.1f} MB in {self.stream_seconds:.2f} s (pause {self.pause_seconds:.2f} s)"
        )


def sync_weights(engines: Engines, trainers: Trainers, *, version: int, read_back: bool = False) -> SyncReport:
    """Give the engines weight version `version`. Raises RuntimeError if one of them is lost or reports another version.

    read_back: the engines' weights are also compared with what was sent, and RuntimeError is raised if they differ.
    """
    started, clock = time.monotonic(), Stopwatch()
    with clock("pause"):
        engines.pause()
    with clock("flush"):
        engines.flush()
    stream = _update(engines, trainers, version, clock)
    if read_back:
        with clock("check"):
            if silent := trainers.check(version):
                _check_by_sending_again(engines, trainers, version, silent)
    with clock("continue"):
        engines.proceed()
    return SyncReport(version, stream, time.monotonic() - started, dict(clock.spent))


def _update(engines: Engines, trainers: Trainers, version: int, clock: Stopwatch) -> StreamReport:
    """begin, stream, end, check the versions."""
    with clock("begin"):
        engines.begin(version)
    with clock("stream"):
        stream = trainers.stream(version)
    if stream.lost:
        raise RuntimeError(f"lost while weights v{version} were sent: {'; '.join(stream.lost)}")
    if stream.published:
        with clock("load"):
            engines.load(version, stream.published)
    with clock("end"):
        engines.end(version)
        versions = engines.versions()
    stale = {engine: found for engine, found in versions.items() if found != str(version)}
    if stale:
        raise RuntimeError(
            f"after sending weights v{version}, these engines report another version: {stale}; they stay paused. "
            "Look at their logs for a refused update and start the run again: it resumes from the last checkpoint."
        )
    return stream


def _check_by_sending_again(engines: Engines, trainers: Trainers, version: int, labels: Sequence[str]) -> None:
    """labels: of the engines that must hold the same after a second stream. RuntimeError names what does not."""
    held = engines.checksums(labels)
    _update(engines, trainers, version, Stopwatch())
    again = engines.checksums(labels)
    for label in labels:
        ranks = list(zip(held[label], again[label], strict=True))
        wrong = {name: rank for rank, (old, new) in enumerate(ranks) for name in old if new[name] != old[name]}
        if wrong:
            shown = ", ".join(f"{name} (rank {rank})" for name, rank in list(wrong.items())[:5])
            raise RuntimeError(
                f"{label} does not hold weights v{version} as they were sent: {len(wrong)} of {len(ranks[0][0])} parameters "
                f"changed when all were sent once more: {shown}; the engines stay paused. "
                "Look at the engine's log and start the run again: it resumes from the last checkpoint."
            )
        parameters = sum(map(len, held[label]))
        logger.info("weights v%d: %d parameters of %s stay as they are when all is sent again", version, parameters, label)
