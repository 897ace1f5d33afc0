"""Cross-field rules: what follows from what was said, and what contradicts it. Pure: words and facts in, values out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from slime.config import resolve_model, resolve_rollout
from slime.config.errors import ConfigError
from slime.config.facts import Facts


class Values(dict):
    """Attribute -> value while rules run, with the reason of each change."""

    def __init__(self, start: Mapping[str, object], *, given: Iterable[str], door: str, facts: Facts) -> None:
        super().__init__(start)
        self.given = frozenset(given)
        self.door = door
        self.facts = facts
        self.notes: list[str] = []
        self.mistakes: list[str] = []

    def derive(self, name: str, value: object, why: str) -> None:
        """Set a value that was not said, and write down why. Says nothing when the value is already that."""
        if self[name] != value:
            self[name] = value
            self.notes.append(f"{name} = {value!r}, because {why}")

    def require(self, condition: object, mistake: str) -> None:
        if not condition:
            self.mistakes.append(mistake)

    def stop_if_wrong(self) -> None:
        """Raise all mistakes so far as one error; rules after this may rely on the rules before it."""
        if self.mistakes:
            raise ConfigError("\n".join(self.mistakes))


def resolve(start: Mapping[str, object], *, given: Iterable[str], door: str, facts: Facts) -> Values:
    """Final values for every attribute. `start` has each attribute's word or default; `given` names those that were said.

    The three mappings "model.megatron", "optimizer.megatron" and "optimizer.ddp" are entries too. Raises ConfigError with all
    contradictions of a stage at once.
    """
    v = Values(start, given=given, door=door, facts=facts)
    v.update({name: dict(v[name]) for name in ("model.megatron", "optimizer.megatron", "optimizer.ddp")})
    resolve_model.dtype_and_optimizer(v)
    resolve_model.shape(v)
    resolve_model.checkpoint_fields(v)
    resolve_model.mtp(v)
    v.stop_if_wrong()
    if door != "convert":
        resolve_rollout.debug_modes(v)
        resolve_rollout.placement(v)
        v.stop_if_wrong()
    resolve_model.layout(v)
    v.stop_if_wrong()
    if door != "convert":
        resolve_rollout.algorithm(v)
        resolve_rollout.batch(v)
        resolve_rollout.lengths(v)
        resolve_rollout.evaluation(v)
        resolve_rollout.engines(v)
        resolve_rollout.saving(v)
        resolve_rollout.initial_weights(v)
        v.stop_if_wrong()
    return v
