"""A plan for a cluster: which layout, engines and batch train a token for least, of all that the rule book and memory allow.

    python3 -m slime.rehearse --plan --nodes 16 --gpu h200 FLAGS

Layouts are ordered by the time of training and engines by the time of generating; from the fastest on they are read and judged
as flags of the run, until enough fit. What is printed has passed the rehearsal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from slime.rehearse.advice.curves import batch_flags, prompts_held
from slime.rehearse.advice.fleets import Fleet, fleets
from slime.rehearse.advice.layouts import Layout, Layouts, layout_flags, on_nodes, smaller_batches
from slime.rehearse.advice.variants import Bench, Outcome, Variant, groups_of, with_engines
from slime.rehearse.assess import Assessment
from slime.rehearse.checks.layout import longest_sample
from slime.rehearse.checks.memory import DEFAULT_LENGTH, assumed_of, prompt_tokens
from slime.rehearse.model.cost import Cost
from slime.rehearse.model.rates import GPUS, rates_of, with_rates
from slime.rehearse.reading import Reading

WANTED = 2
"""Plans for each batch."""
HEADROOM = 0.05
"""Share of a GPU that a plan leaves free where it can: routing is never as even as the arithmetic has it."""
TRIES, MOST_TRIES = 40, 250
"""Layouts that are judged before a batch is given up, and variants before a cluster is."""
MOST_NODES = 128


@dataclass(frozen=True)
class Plan:
    """variant: everything to put behind the run's flags."""

    nodes: int
    layout: Layout
    fleet: Fleet | None
    variant: Variant
    assessment: Assessment

    @property
    def cost(self) -> Cost:
        return self.assessment.cost

    @property
    def peak_gb(self) -> float:
        return max(stage.peak.total for stage in self.assessment.budget.stages) / 1e9

    @property
    def prompts(self) -> int:
        return self.assessment.reading.config.data.rollout_batch_size or 0


@dataclass(frozen=True)
class Planned:
    nodes: int
    gpu: str
    gpu_memory_gb: float
    plans: tuple[Plan, ...]
    """Cheapest trained token first within a batch; the run's own batch before larger ones."""
    nearest: str = ""
    """Where there is none: what is in the way."""
    would_fit: tuple[str, ...] = ()
    """Where there is none: other clusters that would do."""
    tried: int = 0
    understood: bool = True
    """The rule book took some variant; what is in the way is the cluster."""


Judge = Callable[[Sequence[str]], bool]
"""The rehearsal itself, of all the words of a plan."""


class Planner:
    """Of one run. bench: its flags; those of the cluster, the layout, the engines and the batch do not matter."""

    def __init__(self, bench: Bench):
        self._bench = bench
        self._reading, _ = bench.read(Variant())
        if self._reading.table is None or self._reading.hf is None:
            raise ValueError(
                "--plan needs the model: its config.json is not here and MODEL_ARGS do not describe it; give --hf-checkpoint a "
                "folder with config.json"
            )
        assumed, config = assumed_of(bench.options.assume), self._reading.config
        longest = longest_sample(config, prompt=int(assumed.prompt_tokens))
        told = {"longest": longest, "prompt": prompt_tokens(config, assumed)}
        self._layouts = Layouts(self._reading, bench.rates, length=bench.options.length or longest or DEFAULT_LENGTH, **told)
        self.tried, self.refused = 0, ""
        self._by_memory = False  # the refusal is of memory, which says more than one of a size that does not divide
        self.understood = False  # the rule book took some variant, whatever memory says
        self._most_prompts = 0  # that some fleet holds at once
        self._able: list[Layout] = []  # whose weights and gradients leave room

    def plans(self, nodes: int) -> Iterator[Plan]:
        """For the run's own batch, then for the batch that fills the engines."""
        found = self._for_batch(nodes, None)
        yield from found
        if found and self._most_prompts > found[0].prompts:
            yield from self._for_batch(nodes, self._most_prompts)

    def first(self, nodes: int) -> Plan | None:
        """The cheapest with the run's own batch."""
        return next(iter(self._for_batch(nodes, None)), None)

    def _places(self, nodes: int) -> list[tuple[int, int | None]]:
        """(nodes of the trainer, GPUs of engines besides)."""
        config = self._reading.config
        if config.debug.debug_train_only or config.cluster.colocate:
            return [(nodes, None)]
        per_node = config.cluster.num_gpus_per_node
        return [(part, (nodes - part) * per_node) for part in sorted({nodes // 4, nodes // 2, nodes * 3 // 4} - {0, nodes})]

    def _for_batch(self, nodes: int, prompts: int | None) -> list[Plan]:
        found: list[Plan] = []
        before = self.tried
        for trainer, rollout in self._places(nodes):
            for extra in _relaxations(self._reading):
                if self.tried > before + MOST_TRIES:
                    break
                here = list(self._fitting(nodes, trainer, rollout, prompts, extra))
                found += here
                if here or not self._able:
                    break
        return sorted(found, key=lambda plan: plan.cost.per_million)[:WANTED]

    def _fitting(self, nodes: int, trainer: int, rollout: int | None, prompts: int | None, extra: Variant) -> Iterator[Plan]:
        config = self._reading.config
        per_node = config.cluster.actor_num_gpus_per_node
        own = config.data.rollout_batch_size or 1
        layouts = self._layouts.on(trainer * per_node, prompts_times=max(1, (prompts or own) // own))
        limit = self._bench.options.gpu_memory_gb - assumed_of(self._bench.options.assume).overhead_gb
        able = self._able = [layout for layout in layouts if layout.least_gb < limit]
        base = on_nodes(self._reading, trainer, rollout) + extra
        base += Variant(batch_flags(config, prompts)) if prompts else Variant()
        served = self._engines(base, able, trainer * per_node if rollout is None else rollout) if able else []
        if not able:
            least = min(layouts, key=lambda layout: layout.least_gb, default=None)
            self.refused = (
                f"weights and gradients alone take {least.least_gb:.1f} GB of a GPU in the thinnest layout ({least.said()})"
                if least
                else "no layout divides over these GPUs"
            )
        tight: list[Plan] = []
        kinds: set[tuple] = set()
        for layout in able[:TRIES] if served else ():
            kind = layout.grid.tp, layout.grid.pp
            if kind in kinds:
                continue
            for fleet, engines in served:
                variant = base + layout_flags(self._reading, layout) + engines
                outcome = self._tried(variant)
                if not outcome.fits:
                    continue
                plan = Plan(nodes, layout, fleet, variant, outcome.assessment)
                if plan.peak_gb > self._bench.options.gpu_memory_gb * (1 - HEADROOM):
                    tight.append(plan)
                    continue
                kinds.add(kind)
                yield plan
                break
            if len(kinds) == WANTED:
                return
        if not kinds:
            yield from tight[:WANTED]

    def _tried(self, variant: Variant) -> Outcome:
        self.tried += 1
        outcome = self._bench.tried(variant)
        self.understood = self.understood or outcome.assessment is not None
        if outcome.wrong and (not self.refused or (outcome.assessment is not None and not self._by_memory)):
            self.refused, self._by_memory = outcome.wrong[0], outcome.assessment is not None
        return outcome

    def _engines(self, base: Variant, layouts: Sequence[Layout], gpus: int) -> list[tuple[Fleet | None, Variant]]:
        """Fleets whose cache holds a sample, the fastest first; with whatever layout the rule book takes."""
        config = self._reading.config
        if not config.engine.groups or config.debug.debug_train_only:
            return [(None, Variant())]
        apart = {"prefill", "decode"} <= {group.role for group in groups_of(config)}
        for ways in (True, False) if apart else (False,):
            told = {"per_node": config.cluster.num_gpus_per_node, "apart": ways}
            found = self._serving(base, layouts, list(fleets(config, self._reading.hf, gpus, **told)))
            if found:
                return found
        return []

    def _serving(self, base: Variant, layouts: Sequence[Layout], choices: Sequence[Fleet]) -> list[tuple[Fleet, Variant]]:
        config = self._reading.config
        found: list[tuple[float, Fleet, Variant]] = []
        for layout in layouts[:: max(1, len(layouts) // 3)][:4]:
            for fleet in choices:
                engines = with_engines(config, fleet.groups)
                outcome = self._tried(base + layout_flags(self._reading, layout) + engines)
                if outcome.assessment is None or not serves(outcome.assessment):
                    continue
                times = {phase.name: phase.seconds for phase in outcome.assessment.cost.phases}
                seconds = sum(times.get(name, 0.0) for name in ("prefill", "rollout", "weight sync"))
                found.append((seconds, fleet, engines))
                self._most_prompts = max(self._most_prompts, prompts_held(outcome.assessment))
            if found:
                break
        return [(fleet, engines) for _, fleet, engines in sorted(found, key=lambda one: one[0])[:3]]


def serves(found: Assessment) -> bool:
    """Every engine has room for its weights, and a decoding one for a sample of the longest."""
    bounded = any(cache.longest for cache in found.budget.caches)
    held = not bounded or all(kind.held for kind in found.engines.decode)
    return held and all(cache.tokens for cache in found.budget.caches)


def _relaxations(reading: Reading) -> Iterator[Variant]:
    """What the run may give up to fit: nothing, tokens of a micro-batch, the optimizer's place on the GPU."""
    offload = Variant(("--optimizer-cpu-offload",))
    already = reading.config.optimizer.optimizer_cpu_offload or reading.config.model.params_dtype == "fp32"
    for more in (Variant(),) if already else (Variant(), offload):
        for smaller in smaller_batches(reading):
            yield smaller + more


def make_plan(bench: Bench, *, nodes: int, gpu: str, judge: Judge) -> Planned:
    """judge: whether a plan's words pass the rehearsal; those that do not are left out."""
    planner = Planner(bench)
    memory = bench.options.gpu_memory_gb
    plans = tuple(plan for plan in planner.plans(nodes) if judge(bench.words(plan.variant)))
    if plans:
        return Planned(nodes, gpu, memory, plans, tried=planner.tried)
    understood = planner.understood or not planner.tried
    elsewhere = tuple(_elsewhere(bench, nodes, gpu)) if understood else ()
    return Planned(nodes, gpu, memory, (), planner.refused, elsewhere, planner.tried, understood)


def _elsewhere(bench: Bench, nodes: int, gpu: str) -> Iterator[str]:
    """The fewest nodes, of this kind of GPU and of H200, on which something fits."""
    for kind in (gpu, *(("h200",) if GPUS["h200"].memory_gb > bench.options.gpu_memory_gb else ())):
        options = bench.options if kind == gpu else replace(bench.options, gpu_memory_gb=GPUS[kind].memory_gb)
        rates = bench.rates if kind == gpu else with_rates(rates_of(kind), options.rates)
        planner = Planner(replace(bench, options=options, rates=rates))
        counts = [nodes << doubling for doubling in range(0 if kind != gpu else 1, 8) if nodes << doubling <= MOST_NODES]
        for count in counts:
            plan = planner.first(count)
            if plan is not None:
                yield f"{count} nodes of {kind}: {plan.layout.said()}, {plan.peak_gb:.1f} GB in the largest phase"
                break
