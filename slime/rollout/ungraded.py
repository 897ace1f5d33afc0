"""What becomes of a sample whose grading gave no verdict: it stays in its group, masked, where most of the group was graded.

Dropping the group instead would lose 57 % of all groups of 8 when 10 % of the gradings fail; taking the sample out would change
how many trajectories a step has; a reward of 0 would teach that the answer was wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slime.types.sample import Sample, Status


def keep_ungraded(samples: list[Sample]) -> None:
    """Give samples that only their grader failed (`metadata["ungraded"]`) the mean reward of the group, and train none of their
    tokens. Changes nothing unless more than half of the group was graded and nothing else in it failed."""
    ungraded = [sample for sample in samples if sample.status is Status.FAILED and "ungraded" in sample.metadata]
    graded = [sample for sample in samples if sample.reward is not None]
    if not ungraded or len(ungraded) + len(graded) < len(samples) or len(graded) <= len(ungraded):
        return
    for sample in ungraded:
        told = sample.metadata["ungraded"]
        sample.reward = _mean([other.reward for other in graded], told["reason"])
        sample.status, sample.remove_sample = Status(told["status"]), True


def _mean(rewards: list[Any], reason: str) -> Any:
    """The mean of numbers; of mappings, entry by entry, an entry that is no number becoming the reason."""
    if not isinstance(rewards[0], Mapping):
        return sum(map(float, rewards)) / len(rewards)
    keys = [key for key in rewards[0] if all(isinstance(reward, Mapping) and key in reward for reward in rewards)]
    columns = {key: [reward[key] for reward in rewards] for key in keys}
    return {
        key: sum(column) / len(column) if all(isinstance(value, int | float) for value in column) else reason
        for key, column in columns.items()
    }
