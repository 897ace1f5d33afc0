"""What a GPU-hour buys: the cost of a trained token over one choice at a time, where more of it stops paying, and what limits.

Every point is the run with other flags, read and judged like the run itself; one that is refused has no cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from slime.config import Config
from slime.rehearse.advice.variants import Bench, Group, Variant, groups_of, with_count, with_engines
from slime.rehearse.assess import Assessment, num_steps
from slime.rehearse.model.cost import Cost
from slime.rehearse.model.decode import draft_steps
from slime.rehearse.model.engine_memory import speculates

WORTH = 0.05
"""A choice within this share of the lowest cost is as good as the lowest."""
DOUBLINGS = 7
MOST_SPLITS = 8
MOST_DRAFTS = 7


@dataclass(frozen=True)
class Point:
    """One choice."""

    value: float
    label: str
    variant: Variant
    cost: Cost | None
    refused: str = ""
    """Why there is no cost."""
    own: bool = False
    """What the run has now."""

    @property
    def per_million(self) -> float | None:
        return None if self.cost is None else self.cost.per_million


@dataclass(frozen=True)
class Curve:
    over: str
    points: tuple[Point, ...]
    """Ascending."""
    most: float | None = None
    """The knee lies at or below this value: beyond it samples wait for room."""

    @property
    def known(self) -> tuple[Point, ...]:
        return tuple(point for point in self.points if point.cost is not None)

    @property
    def knee(self) -> Point:
        """The run's own choice where no other is cheaper by more than WORTH, else the first of those that are as good as the
        best."""
        able = [point for point in self.known if self.most is None or point.value <= self.most or point.own]
        good = min(point.cost.per_million for point in able) * (1 + WORTH)
        return next(point for point in sorted(able, key=lambda point: not point.own) if point.cost.per_million <= good)

    @property
    def own(self) -> Point | None:
        return next((point for point in self.known if point.own), None)

    @property
    def gain(self) -> float:
        """Cost of a token as the run is / at the knee; 1 where the run is not on the curve."""
        return self.own.cost.per_million / self.knee.cost.per_million if self.own else 1.0


def curves(bench: Bench, now: Assessment) -> tuple[Curve, ...]:
    """Those that have at least two points that can run."""
    found = []
    for over, points in (
        ("rollout batch", batches(bench, now)),
        ("prefill/decode split", splits(bench, now)),
        ("nodes", nodes(bench, now)),
        ("response length", responses(bench, now)),
        ("accepted draft tokens", drafts(bench, now)),
    ):
        most = prompts_held(now) if over == "rollout batch" else None
        curve = Curve(over, tuple(points), most)
        if len(curve.known) > 1:
            found.append(curve)
    return tuple(found)


def _point(bench: Bench, value: float, label: str, variant: Variant, *, own: bool = False) -> Point:
    outcome = bench.tried(variant)
    cost = outcome.assessment.cost if outcome.fits else None
    return Point(value, label, variant, cost, outcome.wrong[0] if outcome.wrong else "", own)


def batch_flags(config: Config, prompts: int) -> tuple[str, ...]:
    """Another rollout batch in the same number of steps."""
    samples = prompts * config.data.n_samples_per_prompt
    flags = ["--rollout-batch-size", str(prompts), "--global-batch-size", str(samples // num_steps(config))]
    own, over = config.data.rollout_batch_size, config.rollout.over_sampling_batch_size
    if own and over and not any(note.startswith("over_sampling_batch_size ") for note in config.notes):
        flags += ["--over-sampling-batch-size", str(-(-over * prompts // own))]
    return tuple(flags)


def prompts_held(now: Assessment) -> int:
    """Prompts whose longest samples fill the decode engines once, divided over the steps of a rollout."""
    config = now.reading.config
    steps = num_steps(config)
    return now.engines.held // config.data.n_samples_per_prompt // steps * steps


def batches(bench: Bench, now: Assessment) -> Iterator[Point]:
    config = now.reading.config
    own, whole = config.data.rollout_batch_size or 0, prompts_held(now)
    if not own or not now.engines.decode:
        return
    wanted = {own, whole, *(own << doubling for doubling in range(1, DOUBLINGS))}
    for prompts in sorted(count for count in wanted if own <= count <= max(4 * whole, own)):
        label = f"{prompts:,} prompts, {prompts * config.data.n_samples_per_prompt:,} samples"
        variant = Variant() if prompts == own else Variant(batch_flags(config, prompts))
        yield _point(bench, prompts, label, variant, own=prompts == own)


def splits(bench: Bench, now: Assessment) -> Iterator[Point]:
    """Engines that prefill, of all; where both kinds have engines of one size."""
    config = now.reading.config
    groups = groups_of(config)
    by_role = {group.role: group for group in groups}
    total = sum(group.engines for group in groups)
    alike = len(by_role) == len(groups) == 2 and "decode" in by_role and len({group.gpus for group in groups}) == 1
    if not alike or total < 3:
        return
    stride = -(-(total - 1) // MOST_SPLITS)
    own = by_role["prefill"].engines
    for prefill in sorted({own, *range(1, total, stride)}):
        parts = [with_count(by_role["prefill"], prefill), with_count(by_role["decode"], total - prefill)]
        variant = Variant() if prefill == own else with_engines(config, parts)
        yield _point(bench, prefill, f"{prefill} of {total} engines prefill", variant, own=prefill == own)


def nodes(bench: Bench, now: Assessment) -> Iterator[Point]:
    """Context and expert parallelism and the number of engines follow; the rest stays. Where trainer and engines share GPUs."""
    own = now.reading.config.cluster.actor_num_nodes
    for count in sorted({own, 1, 2, 4, 8, 16, 32, 64, 128}) if now.reading.config.cluster.colocate else ():
        variant = Variant() if count == own else node_variant(now, count)
        if variant is not None:
            yield _point(bench, count, f"{count} node{'s' if count > 1 else ''}", variant, own=count == own)


def node_variant(now: Assessment, count: int) -> Variant | None:
    """The run on another number of nodes; None where its sizes do not divide."""
    config, grid = now.reading.config, now.reading.grid
    per_node = config.cluster.actor_num_gpus_per_node
    world, experts = count * per_node, now.reading.hf.num_experts
    ranks = world // grid.pp
    if world % grid.pp or ranks % grid.tp or ranks % grid.etp:
        return None
    cp = min(grid.cp, ranks // grid.tp)
    ep = min(grid.ep, ranks // grid.etp) if experts else 1
    if ranks % (grid.tp * cp) or ranks % (grid.etp * ep):
        return None
    sizes = ("--actor-num-nodes", str(count), "--context-parallel-size", str(cp), "--expert-model-parallel-size", str(ep))
    if config.engine.sglang_config is None and config.engine.prefill_num_servers is None:
        return Variant(sizes)
    groups = scaled(groups_of(config), count, config.cluster.actor_num_nodes)
    return None if groups is None else Variant(sizes) + with_engines(config, groups)


def scaled(groups: tuple[Group, ...], nodes: int, own: int) -> list[Group] | None:
    """As many engines of each kind as there are nodes more or fewer, at least one; the last kind takes what is left."""
    gpus = sum(group.engines * group.gpus for group in groups) * nodes // own
    found = []
    for group in groups[:-1]:
        found.append(with_count(group, max(1, group.engines * nodes // own)))
    left = gpus - sum(group.engines * group.gpus for group in found)
    if not groups or left < groups[-1].gpus or left % groups[-1].gpus:
        return None
    return [*found, with_count(groups[-1], left // groups[-1].gpus)]


def responses(bench: Bench, now: Assessment) -> Iterator[Point]:
    own = now.reading.config.rollout.rollout_max_response_len or 0
    if own < 8 or not now.engines.decode:
        return
    for tokens in (own // 8, own // 4, own // 2, own, own * 2):
        variant = Variant() if tokens == own else Variant(("--rollout-max-response-len", str(tokens)))
        yield _point(bench, tokens, f"responses of up to {tokens:,} tokens", variant, own=tokens == own)


def acceptance(accepted: float, steps: int) -> float:
    """Chance that a draft token is right, from the tokens that a step of so many drafts brings: 1 + p + ... + p^steps."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if accepted_tokens(middle, steps) < accepted else (low, middle)
    return low


def accepted_tokens(chance: float, steps: int) -> float:
    return sum(chance**power for power in range(steps + 1))


def drafts(bench: Bench, now: Assessment) -> Iterator[Point]:
    """Draft steps, each right with the chance that the assumed accepted tokens give; chains alone."""
    specs = [kind.spec for kind in now.engines.decode]
    chain = bool(specs) and all(
        speculates(spec) and str(spec.settings.get("speculative_eagle_topk", "1")) == "1" for spec in specs
    )
    own = draft_steps(specs[0]) if chain else 0
    if not own:
        return
    chance = acceptance(bench.rates.tokens_per_decode_step, own)
    for steps in sorted({own, *range(1, MOST_DRAFTS + 1)}):
        tokens = accepted_tokens(chance, steps)
        words = ("--sglang-speculative-num-steps", str(steps), "--sglang-speculative-num-draft-tokens", str(steps + 1))
        variant = Variant() if steps == own else Variant(words)
        other = replace(bench, rates=replace(bench.rates, tokens_per_decode_step=tokens))
        label = f"{steps} draft{'s' if steps > 1 else ''}, {tokens:.2f} tokens a step"
        yield _point(other, tokens, label, variant, own=steps == own)
