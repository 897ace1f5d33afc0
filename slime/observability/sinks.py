"""The sinks that the flags ask for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from slime.config.dotted import Call, find_callable
from slime.observability.tracking import JsonLinesSink, Sink, Start, TensorBoardSink, Tracker, tensorboard_directory
from slime.observability.wandb_sink import WandbOptions, WandbSink

if TYPE_CHECKING:
    from slime.config import Config

CUSTOM = Call("a class taking (args), with write(metrics, axis, position) and close()", 1)


def open_tracker(config: Config, folder: Path, done: Start) -> Tracker:
    """folder: of the run. Raises ValueError for a sink that cannot be made: a wrong flag, not a failing disk."""
    tracking = config.tracking
    sinks: list[Sink] = [JsonLinesSink(folder / "metrics.jsonl", done)]
    if tracking.use_tensorboard:
        directory = tensorboard_directory(
            environment_dir=os.environ.get("TENSORBOARD_DIR"),
            project=tracking.tb_project_name,
            experiment=tracking.tb_experiment_name,
        )
        sinks.append(TensorBoardSink(directory, done))
    if tracking.use_wandb:
        sinks.append(WandbSink(_wandb_options(config, folder), done, vars(config.args)))
    if tracking.custom_metrics_sink_path:
        sinks.append(_custom_sink(config, tracking.custom_metrics_sink_path))
    return Tracker(sinks)


def _wandb_options(config: Config, folder: Path) -> WandbOptions:
    tracking = config.tracking
    return WandbOptions(
        mode=tracking.wandb_mode,
        folder=Path(tracking.wandb_dir) if tracking.wandb_dir else folder,
        project=tracking.wandb_project,
        team=tracking.wandb_team,
        group=tracking.wandb_group,
        random_suffix=tracking.wandb_random_suffix,
        key=tracking.wandb_key,
        host=tracking.wandb_host,
        run_id=tracking.wandb_run_id,
        count_train_steps=tracking.wandb_always_use_train_step,
    )


def _custom_sink(config: Config, path: str) -> Sink:
    flag = "--custom-metrics-sink-path"
    made = find_callable(flag, path, CUSTOM)(config.args.for_call())
    missing = [name for name in ("write", "close") if not callable(getattr(made, name, None))]
    if missing:
        raise ValueError(f"{flag} {path}: {type(made).__name__} has no {' and no '.join(missing)}; expected {CUSTOM.shown}")
    if not isinstance(getattr(made, "place", None), str):
        made = _Named(made, path)
    return made


class _Named:
    """A sink that does not say where it writes."""

    def __init__(self, sink, place: str):
        self.place, self.write, self.close = place, sink.write, sink.close
