"""What a dynamic sampling filter answers."""

from __future__ import annotations

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


def filter_output(value: Any) -> DynamicFilterOutput:
    """A filter may answer with a bare truth value."""
    return value if isinstance(value, DynamicFilterOutput) else DynamicFilterOutput(keep=bool(value))
