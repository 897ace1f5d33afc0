"""How old the weights are that wrote a sample: versions between them and the newest that the engines have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def oldest_version(versions: Iterable[str]) -> int | None:
    """None where no version is a number: a generate function of the user's recorded none."""
    numbers = [int(version) for version in versions if version.lstrip("-").isdigit()]
    return min(numbers, default=None)


def staleness_metrics(samples: Iterable[Sequence[str]], newest: int) -> dict[str, float]:
    """rollout/weight_staleness/mean and max of samples that are about to be trained, each with the versions that wrote it."""
    ages = [newest - oldest for versions in samples if (oldest := oldest_version(versions)) is not None]
    if not ages:
        return {}
    return {"rollout/weight_staleness/mean": sum(ages) / len(ages), "rollout/weight_staleness/max": float(max(ages))}
