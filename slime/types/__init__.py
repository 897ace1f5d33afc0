"""The five words that travel between the rooms.

`Sample` (one trajectory) -> `RolloutBatch` (frozen columns, row i = one sample) -> `StepPlan` (which sample goes where, and
how much it weighs) -> `MicroBatch` (one packed stream on one rank) -> `WeightBucket` (tensors on their way to the engines).
Lengths are checked at every border. `Sample`, `RolloutBatch` and `StepPlan` know no torch; `MicroBatch` and `WeightBucket`
hold tensors. Each is imported on first use, so that a rollout worker never loads torch for its words, nor a rehearsal numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slime.types.micro_batch import MicroBatch
    from slime.types.rollout_batch import RolloutBatch
    from slime.types.sample import Sample
    from slime.types.step_plan import StepPlan
    from slime.types.weight_bucket import WeightBucket

_LATER = {
    "MicroBatch": "micro_batch",
    "RolloutBatch": "rollout_batch",
    "Sample": "sample",
    "StepPlan": "step_plan",
    "WeightBucket": "weight_bucket",
}

__all__ = ["MicroBatch", "RolloutBatch", "Sample", "StepPlan", "WeightBucket"]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"slime.types.{_LATER[name]}"), name)
    raise AttributeError(f"module 'slime.types' has no attribute {name!r}")
