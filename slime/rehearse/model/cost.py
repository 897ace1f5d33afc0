"""What one rollout costs: FLOPs, bytes, and a step time by phase. Rates are assumptions, printed and replaceable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from slime.engine.spec import EngineSpec
from slime.model.hf_config import HfConfig
from slime.model.names import NameTable
from slime.model.placement import Grid
from slime.rehearse.model.decode import Generation
from slime.rehearse.model.engine_memory import alike, engine_weights
from slime.rehearse.model.flops import ModelWork
from slime.rehearse.model.kinds import kinds
from slime.rehearse.model.rates import Rates
from slime.rehearse.model.stages import balance
from slime.weights.wire import Format


@dataclass(frozen=True)
class SyncBytes:
    """Bytes of one weight sync, in the serving checkpoint's format."""

    experts: int
    rest: int
    per_gpu: int
    """What the main model takes of one engine GPU."""
    draft_per_gpu: int
    """What the draft model (MTP layer) takes beside it where engines speculate."""
    lands_per_gpu: int
    """What one engine GPU keeps of a sync: the draft model's part too where the MTP layer is trained."""
    per_engine: int
    all_engines: int
    lower_bound_s: float
    """Experts over each GPU's own NIC; the rest once per node over its NICs, with NVLink behind it."""
    load_s: float
    """What one GPU keeps, at the rate at which engines load; it goes on while more comes in."""
    broadcast_s: float
    """The simple way beside it: every source broadcasts to all ranks, one after another."""
    steps_s: float
    """What engines take around it."""

    @property
    def seconds(self) -> float:
        """Without a plan, which knows which link waits for which."""
        return max(self.lower_bound_s, self.load_s) + self.steps_s


@dataclass(frozen=True)
class CostPhase:
    name: str
    seconds: float
    why: str
    limit: str = ""
    """What takes the most of it."""


def of_one_every(rollouts: int) -> str:
    return f"of one every {rollouts} rollouts: " if rollouts > 1 else ""


SYNC = "weight sync"
GENERATION = ("prefill", "rollout")
"""Phases in which the trainer may train, on GPUs of its own."""


@dataclass(frozen=True)
class Cost:
    tokens: int
    flops_per_token_forward: float
    flops_per_token_training: float
    flops: float
    phases: tuple[CostPhase, ...]
    sync: SyncBytes | None
    gpus: int
    overlaps: bool = False
    """Generation and training go on at the same time; only a weight sync holds both up."""

    @property
    def generation(self) -> tuple[CostPhase, ...]:
        return tuple(phase for phase in self.phases if phase.name in GENERATION)

    @property
    def training(self) -> tuple[CostPhase, ...]:
        return tuple(phase for phase in self.phases if phase.name not in (*GENERATION, SYNC))

    @property
    def path(self) -> tuple[CostPhase, ...]:
        """The phases that make up an iteration's time: all, or of two that overlap the longer."""
        if not self.overlaps:
            return self.phases
        longer = max(self.generation, self.training, key=lambda phases: sum(phase.seconds for phase in phases))
        return (*longer, *(phase for phase in self.phases if phase.name == SYNC))

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.path)

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.gpus / 3600

    @property
    def dominant(self) -> CostPhase:
        return max(self.path, key=lambda phase: phase.seconds)

    @property
    def per_million(self) -> float:
        """GPU-hours per million trained tokens."""
        return self.gpu_hours / self.tokens * 1e6

    @property
    def limit(self) -> str:
        """What to make faster first."""
        return self.dominant.limit


def sync_bytes(
    table: NameTable, hf: HfConfig, engines: Sequence[EngineSpec], rates: Rates, *, gpus_per_node: int, mtp: bool = False
) -> SyncBytes | None:
    """mtp: the MTP layer is trained, so a sync carries it."""
    receivers = [engine for engine in engines if engine.update_weights]
    if not receivers:
        return None
    nbytes = _on_the_wire(table, Format.of(hf))
    weights = {key: engine_weights(table, hf, engine) for key, engine in {alike(one): one for one in receivers}.items()}
    fullest = max(weights.values(), key=lambda kept: kept.main)
    of_engine = {key: kept.main + (kept.draft if mtp else 0) for key, kept in weights.items()}
    first = receivers[0]
    experts, rest = (nbytes[False, kind] + (nbytes[True, kind] if mtp else 0) for kind in (True, False))
    own_experts, own_rest = experts // first.tp_size, rest // (first.tp_size // first.dp_size)
    lands = of_engine[alike(first)]
    gb = 1e9
    bound = own_experts / gb / rates.nic_gb_per_s
    # The rest comes once per node; its copies over NVLink hide behind the network.
    bound += max(
        own_rest / gb / (rates.nic_gb_per_s * gpus_per_node),
        own_rest * (gpus_per_node - 1) / gpus_per_node / gb / rates.nvlink_gb_per_s,
    )
    return SyncBytes(
        experts=experts,
        rest=rest,
        per_gpu=fullest.main,
        draft_per_gpu=fullest.draft,
        lands_per_gpu=lands,
        per_engine=lands * first.num_gpus,
        all_engines=sum(of_engine[alike(engine)] * engine.num_gpus for engine in receivers),
        lower_bound_s=bound,
        load_s=lands / gb / rates.engine_load_gb_per_s,
        broadcast_s=(experts + rest) / gb / rates.nic_gb_per_s,
        steps_s=rates.sync_steps_s,
    )


@lru_cache(maxsize=8)
def _on_the_wire(table: NameTable, form: Format) -> Mapping[tuple[bool, bool], int]:
    """(of the MTP layer, of a routed expert) -> bytes."""
    nbytes = {(mtp, expert): 0 for mtp in (False, True) for expert in (False, True)}
    for entry, count in kinds(table):
        for tensor in entry.hf:
            kind = entry.name.startswith("mtp."), entry.expert is not None
            nbytes[kind] += form.nbytes(entry, tensor) * count
    return nbytes


@dataclass(frozen=True)
class Shape:
    """What a rollout is, for the cost."""

    samples: int
    mean_tokens: int
    trainer_gpus: int
    rollout_gpus: int
    micro_batches: int
    steps: int
    passes: int
    """Forward passes over every token beside training."""
    trains_critic: bool
    colocate: bool
    overlaps: bool = False
    """The schedule runs ahead."""
    sync_every: int = 1
    """Rollouts."""
    vpp: int = 1
    longest_sample: int = 0
    """Tokens; 0 where nothing bounds it."""


def bubble(pp: int, micro_batches: int, vpp: int = 1) -> float:
    """Idle share of one-forward-one-backward: (p - 1) / (v m + p - 1), with v chunks per stage."""
    return (pp - 1) / (vpp * micro_batches + pp - 1)


def spread(tokens: float, longest: int, dp: int) -> float:
    """Mean work of a data-parallel rank / that of the rank with the longest sample, which nobody shares. tokens: of a step."""
    return min(1.0, tokens / dp / longest) if longest and tokens else 1.0


def predict(
    work: ModelWork,
    stage_cost: Sequence[float],
    grid: Grid,
    shape: Shape,
    sync: SyncBytes | None,
    rates: Rates,
    *,
    generates: Generation | None,
    prefill: float,
    exchange: Mapping[str, float],
    recompute: bool,
    trainer_bytes_per_gpu: int,
    optimizer_bytes_per_node: int,
    checkpoint_bytes: int,
    save_interval: int | None,
) -> Cost:
    """generates: None without engines. prefill: seconds of reading prompts. exchange: of the trainer, seconds by axis."""
    tokens = shape.samples * shape.mean_tokens
    forward, training = work.forward, work.training(recompute=recompute)
    usable = shape.trainer_gpus * rates.peak_tflops * 1e12 * rates.training_mfu
    evenness = balance(stage_cost) if stage_cost else 1.0
    idle = bubble(grid.pp, max(shape.micro_batches, 1), shape.vpp)
    alike = spread(tokens / shape.steps, shape.longest_sample, grid.dp)
    busy = evenness * (1 - idle) * alike
    passes, models = shape.passes, 2 if shape.trains_critic else 1  # with the critic
    phases = []
    if generates is not None:
        step = generates.step
        parts = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in step.parts.items() if seconds >= 5e-5)
        waves = f", {generates.waves:.1f} times what the engines hold" if generates.waves > 1 else ""
        phases += [
            CostPhase("prefill", prefill, "every sample's prompt is read", "prefill FLOPs"),
            CostPhase(
                "rollout",
                generates.seconds,
                f"{generates.steps:,.0f} steps of {step.seconds * 1e3:.1f} ms ({parts}){waves}",
                generates.limit,
            ),
        ]
    moved = trainer_bytes_per_gpu / 1e9 / rates.host_link_gb_per_s
    if shape.colocate:
        phases.append(
            CostPhase(
                "hand over to trainer", moved, f"{trainer_bytes_per_gpu / 1e9:.1f} GB per GPU from main memory", "hand-over"
            )
        )
    if passes:
        seconds = passes * tokens * forward / usable / busy
        phases.append(
            CostPhase(
                "log-probs",
                seconds,
                f"{passes} forward pass{'es' if passes > 1 else ''} over {tokens:,} tokens",
                "training FLOPs",
            )
        )
    phases.append(
        CostPhase(
            "train",
            models * tokens * training / usable / busy,
            f"{tokens:,} tokens x {training / 1e9:.0f} GF{' x 2 models' if models > 1 else ''}, "
            f"stages {evenness:.0%} even, bubble {idle:.0%}" + (f", data-parallel ranks {alike:.0%} even" if alike < 1 else ""),
            "training FLOPs",
        )
    )
    if sum(exchange.values()) > 0:
        told = ", ".join(f"{axis} {seconds:.1f}" for axis, seconds in exchange.items() if seconds >= 0.05)
        phases.append(
            CostPhase("trainer exchange", sum(exchange.values()), f"between the trainer's GPUs: {told}", "trainer exchange")
        )
    if optimizer_bytes_per_node:
        seconds = shape.steps * optimizer_bytes_per_node / 1e9 / rates.host_optimizer_gb_per_s
        phases.append(
            CostPhase(
                "optimizer",
                seconds,
                f"{optimizer_bytes_per_node / 1e9:.0f} GB of state per node, {shape.steps} step(s)",
                "optimizer",
            )
        )
    if sync is not None:
        phases.append(
            CostPhase(
                SYNC,
                sync.seconds / shape.sync_every,
                of_one_every(shape.sync_every) + f"at least {sync.lower_bound_s:.2f} s on the wire, {sync.load_s:.2f} s of "
                f"loading at the same time, {sync.steps_s:.2f} s of the engines around it; "
                f"broadcast to all it would be {sync.broadcast_s:.1f} s",
                "sync",
            )
        )
    if shape.colocate:
        phases.append(
            CostPhase(
                "hand over to engines", moved, f"{trainer_bytes_per_gpu / 1e9:.1f} GB per GPU to main memory", "hand-over"
            )
        )
    if save_interval:
        phases.append(
            CostPhase(
                "checkpoint",
                checkpoint_bytes / 1e9 / rates.disk_gb_per_s / save_interval,
                f"{checkpoint_bytes / 1e12:.2f} TB every {save_interval} rollouts",
                "disk",
            )
        )
    gpus = max(shape.trainer_gpus, shape.rollout_gpus) if shape.colocate else shape.trainer_gpus + shape.rollout_gpus
    return Cost(tokens, forward, training, tokens * (training + passes * forward), tuple(phases), sync, gpus, shape.overlaps)
