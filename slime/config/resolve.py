"""From values as said to final values: the rule book, stopped at the first stage with a mistake."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from slime.config.facts import Facts
from slime.config.rules import STAGES, Values, stop_at_first

MAPPINGS = ("model.megatron", "optimizer.megatron", "optimizer.ddp")


def values_of(
    start: Mapping[str, object], *, given: Iterable[str], door: str, facts: Facts, env: Mapping[str, str] | None = None
) -> Values:
    """`start` has each attribute's word or default, and the three mappings; `given` names those that were said."""
    v = Values(start, given=given, door=door, facts=facts, env=env)
    v.update({name: dict(v[name]) for name in MAPPINGS})
    return v


def resolve(
    start: Mapping[str, object], *, given: Iterable[str], door: str, facts: Facts, env: Mapping[str, str] | None = None
) -> Values:
    """Final values for every attribute. Raises ConfigError with all contradictions of a stage at once."""
    v = values_of(start, given=given, door=door, facts=facts, env=env)
    stop_at_first(STAGES, v)
    return v
