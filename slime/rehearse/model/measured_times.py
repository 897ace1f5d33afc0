"""Seconds that a run measured, beside the predicted ones.

`metrics.jsonl` lies beside `memory.json` in a run's folder: one line per rollout with what the driver waited for. The first
rollout compiles kernels; where there are more, it is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from slime.rehearse.model.cost import Cost

COMPARED: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "generate": (("perf/rollout_time",), ("prefill", "rollout")),
    "log-probs": (("perf/log_probs_time", "perf/ref_log_probs_time", "perf/teacher_log_probs_time"), ("log-probs",)),
    "steps": (("perf/actor_train_time",), ("train", "trainer exchange", "optimizer")),
    "weight update": (("perf/update_weights_time",), ("weight sync",)),
}
"""What it is called -> metrics whose sum is measured, phases whose sum is predicted."""


@dataclass(frozen=True)
class MeasuredTimes:
    rollouts: int
    medians: Mapping[str, float]
    """Metric -> its median over the rollouts."""

    @property
    def mean_response(self) -> float | None:
        """Trained tokens of a response."""
        return self.medians.get("rollout/response_len/mean")


@dataclass(frozen=True)
class TimeComparison:
    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Above 0 where the prediction is too large."""
        return (self.predicted - self.measured) / self.measured


def read_times(memory_file: str) -> MeasuredTimes | None:
    """Of the run that wrote `memory_file`; None where no metrics lie beside it, or none of a rollout."""
    file = Path(memory_file).parent / "metrics.jsonl"
    if not file.is_file():
        return None
    lines = [line for line in map(_line, file.read_text(errors="replace").splitlines()) if "perf/rollout_time" in line]
    kept = lines[1:] or lines
    names = {name for line in kept for name, value in line.items() if isinstance(value, (int, float))}
    values = {name: [line[name] for line in kept if isinstance(line.get(name), (int, float))] for name in names}
    return MeasuredTimes(len(kept), {name: median(found) for name, found in values.items()}) if kept else None


def _line(text: str) -> Mapping[str, object]:
    """Nothing of a line that was cut short."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def compare_times(measured: MeasuredTimes, cost: Cost) -> Sequence[TimeComparison]:
    """Side by side, what was measured."""
    predicted = {phase.name: phase.seconds for phase in cost.phases}
    rows = []
    for name, (metrics, phases) in COMPARED.items():
        found = sum(measured.medians.get(metric, 0.0) for metric in metrics)
        if found > 0:
            rows.append(TimeComparison(name, sum(predicted.get(phase, 0.0) for phase in phases), found))
    return tuple(rows)
