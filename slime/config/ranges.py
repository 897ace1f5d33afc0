"""Which numbers a flag takes, declared where the flag is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Bounds of a number; `above` and `below` leave the bound itself out. No bound at all still means a finite number."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()
    """Numbers outside the bounds that have a meaning of their own (-1 for "off")."""

    def __contains__(self, value: float) -> bool:
        if value in self.also:
            return True
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """`above 0`, `at least 1`, `at least 0 and below 1`, `-1 or at least 1`; empty without bounds."""
        words = [
            f"{word} {bound:{'d' if isinstance(bound, int) else 'g'}}"
            for word, bound in (("at least", self.low), ("above", self.above), ("below", self.below), ("at most", self.high))
            if bound is not None
        ]
        return "".join(f"{value:g} or " for value in self.also) + " and ".join(words)

    def refuse(self, value: object) -> None:
        """Raises ValueError for a number outside, or one that is not finite; other values pass."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        if not math.isfinite(value):
            raise ValueError(f"must be a finite number, got {value}")
        if value not in self:
            raise ValueError(f"must be {self}, got {value:g}" if isinstance(value, float) else f"must be {self}, got {value}")


ANY = Range()


def within(convert: Callable[[str], object], bounds: Range) -> Callable[[str], object]:
    """The converter, which then refuses what lies outside; for a list every number counts."""

    def converted(text: str) -> object:
        value = convert(text)
        for one in value if isinstance(value, list | tuple) else (value,):
            bounds.refuse(one)
        return value

    converted.bounds = bounds  # type: ignore[attr-defined]
    converted.inner = convert  # type: ignore[attr-defined]
    if hasattr(convert, "choices"):
        converted.choices = convert.choices  # type: ignore[attr-defined]
    return converted
