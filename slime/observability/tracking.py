"""Where metrics go: metrics.jsonl always, other sinks if the flags say so (slime.observability.sinks). None of them ends a run.

A metric has one axis: figures of an optimizer step (`train/*`) are written at the number of steps done, all others at the
number of rollouts done. Both count from 1, and on from the checkpoint where a run continues; 0 is before the first.
A further sink is a class with `write`, `close` and a `place`.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Protocol

logger = logging.getLogger(__name__)


class Axis(StrEnum):
    """What a metric is counted along. The values are the keys of the lines of metrics.jsonl."""

    ROLLOUT = "rollout"
    TRAIN_STEP = "train_step"


@dataclass(frozen=True)
class Start:
    """What the loaded checkpoint has done; zeros for a run from the beginning."""

    rollouts: int = 0
    train_steps: int = 0

    def on(self, axis: Axis) -> int:
        return self.rollouts if axis is Axis.ROLLOUT else self.train_steps


class Sink(Protocol):
    place: str
    """Where a user finds it."""

    def write(self, metrics: Mapping[str, float], axis: Axis, position: int) -> None: ...
    def close(self) -> None: ...


class JsonLinesSink:
    """One JSON object a line: {"rollout": 3, "time": 1764480000.0, "rollout/raw_reward": 0.5, ...}, or with "train_step".

    A NaN or an infinity is null: JSON has neither. Lines of an earlier run beyond `start` would be there twice: the file is
    kept under the next free name (metrics.1.jsonl, ...), and its lines up to `start` begin the new one.
    """

    def __init__(self, file: Path, start: Start):
        self.place, self._file, self._start, self._is_begun = str(file), file, start, False

    def write(self, metrics: Mapping[str, float], axis: Axis, position: int) -> None:
        if not self._is_begun:
            self._begin()
            self._is_begun = True
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = json.dumps({axis: position, "time": round(time.time(), 3)} | finite)
        _append(self._file, f"{line}\n".encode())

    def close(self) -> None:
        pass

    def _begin(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        if not self._file.exists():
            return
        lines = self._file.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _is_before(line, self._start)]
        if len(kept) < len(lines):
            aside = _set_aside(self._file, b"".join(kept), f"{self._file.stem}.{{}}{self._file.suffix}")
            logger.info("metrics of an earlier run from here on are kept in %s", aside)


def _is_before(line: bytes, start: Start) -> bool:
    """Whether a line is of what the checkpoint has done. A run from the beginning has done nothing, also no evaluation."""
    try:
        record = json.loads(line)
        return start.rollouts > 0 and all(record.get(axis, 0) <= start.on(axis) for axis in Axis)
    except (ValueError, TypeError, AttributeError):  # a torn line
        return False


class TensorBoardSink:
    """One event file in a folder. Written with TensorBoard's record format directly: the usual writer hands events to a thread,
    which dies with a traceback when the disk is full."""

    def __init__(self, directory: Path, start: Start):
        # As a plain shell would call it: the program lies beside the interpreter.
        self.place = shlex.join(
            [str(Path(sys.prefix).resolve() / "bin" / "tensorboard"), "--logdir", str(directory.absolute())]
        )
        self._directory, self._start = directory, start
        self._file: Path | None = None

    def write(self, metrics: Mapping[str, float], axis: Axis, position: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        record = _record(step=position, summary=Summary(value=values))
        if self._file is not None:
            _append(self._file, record)
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        for file in sorted(self._directory.glob("*tfevents*")):
            self._cut(file)
        # TensorBoard reads the files of a folder in the order of their names.
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        file = self._directory / f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{socket.gethostname()}.{os.getpid()}"
        _append(file, _record(file_version="brain.Event:2") + record)
        self._file = file

    def close(self) -> None:
        pass

    def _cut(self, file: Path) -> None:
        """What an earlier run wrote beyond the start goes, else it would be there twice. The whole file stays under a name that
        TensorBoard does not read."""
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
        from tensorboard.compat.proto.event_pb2 import Event

        records = [Event.FromString(record) for record in RawEventFileLoader(str(file)).Load()]
        kept = [record for record in records if self._is_before(record)]
        if len(kept) < len(records):
            content = b"".join(map(_framed, kept))
            _set_aside(file, content, f"{file.name.replace('tfevents', 'earlier')}.{{}}")

    def _is_before(self, record) -> bool:
        """Whether a record of an event file is of what the checkpoint has done, or no metric at all."""
        axes = {Axis.TRAIN_STEP if value.tag.startswith("train/") else Axis.ROLLOUT for value in record.summary.value}
        return not axes or (self._start.rollouts > 0 and all(record.step <= self._start.on(axis) for axis in axes))


def _record(**event: object) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event

    return _framed(Event(wall_time=time.time(), **event))


def _framed(event) -> bytes:
    """An event as it stands in an event file: length, event, and a checksum of each."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    record = io.BytesIO()
    RecordWriter(record).write(event.SerializeToString())
    return record.getvalue()


def _set_aside(file: Path, kept: bytes, name: str) -> Path:
    """`file` goes on with what is `kept` of it; all of it stays beside under `name`, whose {} is the first free number."""
    number = 1
    while (aside := file.with_name(name.format(number))).exists():
        number += 1
    part = aside.with_name(f"{aside.name}.part")
    part.write_bytes(kept)
    file.rename(aside)
    part.rename(file)
    return aside


def _append(file: Path, content: bytes) -> None:
    """All of it or nothing: half a record would spoil what comes after it."""
    with open(file, "ab", buffering=0) as opened:
        end = opened.tell()
        if opened.write(content) < len(content):
            opened.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Tracker:
    """All sinks of a run. One that fails is named in one warning, and tried again with the next metrics."""

    def __init__(self, sinks: Sequence[Sink] = ()):
        self._sinks = list(sinks)
        self._failing: set[str] = set()
        self._no_numbers: set[str] = set()

    def write(self, metrics: Mapping[str, object], axis: Axis, position: int) -> None:
        """position: how many rollouts or steps are done."""
        numbers = self._numbers(metrics)
        if not numbers:
            return
        for sink in self._sinks:
            self.attempt(sink.place, partial(sink.write, numbers, axis, position))

    def _numbers(self, metrics: Mapping[str, object]) -> dict[str, float]:
        """A user's function may report anything."""
        numbers: dict[str, float] = {}
        for name, value in metrics.items():
            try:
                numbers[name] = float(value)
            except (TypeError, ValueError, OverflowError):
                if name not in self._no_numbers:
                    self._no_numbers.add(name)
                    logger.warning("metric %s is left out: %.80r is no number", name, value)
        return numbers

    def attempt(self, place: str, write: Callable[[], None]) -> None:
        """`write()`, whatever becomes of it; the first failure in a row at a place is one warning."""
        try:
            write()
        except Exception as error:
            if place not in self._failing:
                self._failing.add(place)
                told = f"{type(error).__name__}: {' '.join(str(error).split())}"
                logger.warning("%s cannot be written (%s); the run goes on, and tries again", place, told)
        else:
            self._failing.discard(place)

    def places(self) -> list[str]:
        return [sink.place for sink in self._sinks]

    def close(self) -> None:
        for sink in self._sinks:
            self.attempt(sink.place, sink.close)


def tensorboard_directory(*, environment_dir: str | None, project: str | None, experiment: str | None) -> Path:
    """TENSORBOARD_DIR wins; else tensorboard_log/{project}/{experiment or the time now}. One of the two must be given."""
    if environment_dir:
        return Path(environment_dir)
    if not project:
        raise ValueError("--use-tensorboard needs --tb-project-name, or a folder in the environment variable TENSORBOARD_DIR")
    return Path("tensorboard_log") / project / (experiment or time.strftime("%Y%m%d-%H%M%S"))
