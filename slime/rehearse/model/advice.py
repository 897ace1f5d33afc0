"""What a GPU-hour buys: the cost of a trained token over the rollout batch, up to what the decode engines hold at once.

The longest response decides how long engines generate, whatever the batch: samples beside it are free until engines are full,
and from then on come in further waves. Every rate is one of `slime.rehearse.model.cost.Rates`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slime.engine.spec import EngineSpec
from slime.rehearse.model.cost import Cost
from slime.rehearse.model.engine_memory import KvCache

DOUBLINGS = 7


@dataclass(frozen=True)
class Batch:
    """One rollout batch."""

    prompts: int
    samples: int
    waves: int
    """How often the decode engines are filled."""
    gpu_hours: float
    """Of one rollout."""
    per_million: float
    """GPU-hours per million trained tokens."""


@dataclass(frozen=True)
class Advice:
    batches: tuple[Batch, ...]
    """Rising; the first is the run's own."""
    held: int
    """Longest samples that all decode engines hold at once."""
    knee: Batch
    """The largest batch that is generated in one wave, or the run's own where it already needs more."""
    flags: str
    """To be put behind the launcher's."""

    @property
    def gain(self) -> float:
        """Cost of a token now / at the knee."""
        return self.batches[0].per_million / self.knee.per_million


def held_at_once(specs: Sequence[EngineSpec], caches: Sequence[KvCache]) -> int:
    """By cache, and by max_running_requests where that is less; prefill engines keep nothing."""
    found = 0
    by_kind = {(cache.role.partition(" ")[0], cache.gpus): cache.at_once or 0 for cache in caches}
    for spec in specs:
        if spec.role != "prefill" and spec.update_weights:
            said = str(spec.settings.get("max_running_requests", ""))
            cached = by_kind.get((spec.role, spec.num_gpus), 0)
            found += min(cached, int(said)) if said.isdigit() else cached
    return found


def advise(
    cost_of: Callable[[int, int], Cost], *, prompts: int, samples_per_prompt: int, steps: int, held: int
) -> Advice | None:
    """cost_of(prompts, waves) -> the predicted rollout. None where nothing bounds a sample, or no engine decodes."""
    if held < samples_per_prompt or prompts < 1:
        return None
    whole = held // samples_per_prompt // steps * steps  # prompts of one wave that divide into the steps of a rollout
    wanted = sorted({prompts, whole, *(prompts << doubling for doubling in range(1, DOUBLINGS))} - {0})
    batches = []
    for count in (count for count in wanted if count >= prompts and count <= max(4 * whole, prompts)):
        samples = count * samples_per_prompt
        waves = -(-samples // held)
        cost = cost_of(count, waves)
        batches.append(Batch(count, samples, waves, cost.gpu_hours, cost.gpu_hours / cost.tokens * 1e6))
    knee = max((batch for batch in batches if batch.waves == 1), key=lambda batch: batch.samples, default=batches[0])
    flags = f"--rollout-batch-size {knee.prompts} --global-batch-size {knee.samples // steps}"
    return Advice(tuple(batches), held, knee, flags)
