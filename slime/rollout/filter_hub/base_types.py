"""What a dynamic sampling filter answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DynamicFilterOutput:
    """Keep or drop one group."""

    keep: bool
    reason: str | None = None
    """Why it is dropped; counted as rollout/dynamic_filter/drop_{reason}."""
    keep_when_insufficient: bool = False
    """Keep it all the same when dropping it would leave fewer candidates than the rollout needs."""


def call_dynamic_filter(function: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> DynamicFilterOutput:
    """What a filter says of a group; without one, every group is kept."""
    return DynamicFilterOutput(keep=True) if function is None else filter_output(function(*args, **kwargs))


class MetricGatherer:
    """Counts drops by reason, for rollout functions of a plugin's own."""

    def __init__(self) -> None:
        self._drops: Counter[str] = Counter()

    def on_dynamic_filter_drop(self, reason: str | None) -> None:
        if reason:
            self._drops[reason] += 1

    def collect(self) -> dict[str, float]:
        """As metrics of the rollout."""
        return {f"rollout/dynamic_filter/drop_{reason}": float(count) for reason, count in sorted(self._drops.items())}


def filter_output(value: Any) -> DynamicFilterOutput:
    """A filter may answer with a bare truth value."""
    return value if isinstance(value, DynamicFilterOutput) else DynamicFilterOutput(keep=bool(value))
