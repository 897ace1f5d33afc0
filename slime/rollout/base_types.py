"""What a rollout function gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slime.types.sample import Sample

Group = list[Sample]
"""The samples of one prompt. With fan-out, an element may itself be a list of samples of one trajectory."""


@dataclass
class RolloutFnTrainOutput:
    """Groups to train on, and metrics of how they came about."""

    samples: list[Group]
    metrics: dict[str, float] | None = None
    default_log: bool = True
    """False when the rollout function has logged everything itself, so that nothing goes to the trackers."""


@dataclass
class RolloutFnEvalOutput:
    """Per data set: {"rewards": [...], "truncated": [...], "samples": [...]}, position i of each list is one sample."""

    data: dict[str, dict[str, Any]]
    metrics: dict[str, float] | None = None
    default_log: bool = True


def train_output(value: Any) -> RolloutFnTrainOutput:
    """A rollout function may give its groups bare."""
    return value if isinstance(value, RolloutFnTrainOutput) else RolloutFnTrainOutput(samples=value)


def eval_output(value: Any) -> RolloutFnEvalOutput:
    return value if isinstance(value, RolloutFnEvalOutput) else RolloutFnEvalOutput(data=value)


def flatten(group: list) -> list[Sample]:
    """The samples of a group, whatever its nesting."""
    flat: list[Sample] = []
    for item in group:
        if isinstance(item, list):
            flat.extend(flatten(item))
        else:
            flat.append(item)
    return flat
