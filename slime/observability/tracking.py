"""Where metrics go: TensorBoard, if the flags say so. A further sink is a class with `write`, `close` and a `place`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Sink(Protocol):
    place: str
    """Where a user finds it."""

    def write(self, metrics: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class TensorBoardSink:
    """Event files under tensorboard_log/{project}/{experiment}, or under `directory` if one is given."""

    def __init__(self, directory: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.place = f"tensorboard --logdir {directory}"
        self._writer = SummaryWriter(log_dir=str(directory))

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Tracker:
    """All sinks of a run."""

    def __init__(self, sinks: list[Sink]):
        self._sinks = sinks

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        for sink in self._sinks:
            sink.write(metrics, step)

    def places(self) -> list[str]:
        return [sink.place for sink in self._sinks]

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def tensorboard_directory(*, environment_dir: str | None, project: str | None, experiment: str | None) -> Path:
    """TENSORBOARD_DIR wins; else tensorboard_log/{project}/{experiment or the time now}. One of the two must be given."""
    if environment_dir:
        return Path(environment_dir)
    if not project:
        raise ValueError("--use-tensorboard needs --tb-project-name, or a folder in the environment variable TENSORBOARD_DIR")
    return Path("tensorboard_log") / project / (experiment or time.strftime("%Y%m%d-%H%M%S"))
