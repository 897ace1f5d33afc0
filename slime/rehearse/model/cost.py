"""What one rollout costs: FLOPs, bytes, and a step time by phase. Rates are assumptions, printed and replaceable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

from slime.engine.spec import EngineSpec
from slime.model.hf_config import HfConfig
from slime.model.names import NameTable
from slime.model.placement import Grid
from slime.rehearse.model.engine_memory import alike, engine_weights
from slime.rehearse.model.flops import ModelWork
from slime.rehearse.model.stages import balance
from slime.weights.wire import fp8_format, wire_bytes

Numbers = TypeVar("Numbers")


@dataclass(frozen=True)
class Rates:
    """Assumed rates; `--rate NAME=VALUE` replaces one."""

    peak_tflops: float = 989.0
    """Dense bf16 of one GPU (H100)."""
    training_mfu: float = 0.30
    """Share of the peak that a busy stage reaches, pipeline bubbles and imbalance not included."""
    nic_gb_per_s: float = 50.0
    """Network of one GPU."""
    nvlink_gb_per_s: float = 450.0
    """Between GPUs of a node, one direction."""
    host_link_gb_per_s: float = 50.0
    """GPU to main memory (offload, CPU optimizer)."""
    host_optimizer_gb_per_s: float = 100.0
    """Optimizer state that the CPUs of a node update per second."""
    disk_gb_per_s: float = 10.0
    """Shared file system, all nodes together."""
    decode_step_ms: float = 40.0
    """One decode step of a wide-EP engine at its batch."""
    tokens_per_decode_step: float = 2.5
    """Accepted tokens of speculative decoding; 1 is taken where the engines do not speculate."""
    mean_response_share: float = 0.5
    """Mean response / --rollout-max-response-len."""


def with_rates(rates: Rates, given: Sequence[str]) -> Rates:
    """NAME=VALUE words replace rates. Raises ValueError naming the legal ones."""
    return replaced(rates, given, flag="--rate")


def replaced(values: Numbers, words: Sequence[str], *, flag: str) -> Numbers:
    """A dataclass of numbers with NAME=VALUE words in their fields' place. Raises ValueError naming flag and legal names."""
    known = {item.name for item in fields(values)}
    for word in words:
        name, _, value = word.partition("=")
        if name not in known:
            raise ValueError(f"{flag} {word}: legal names are {', '.join(sorted(known))}")
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"{flag} {word}: {value!r} is no number; write {name}=NUMBER") from None
        if not 0 <= number < math.inf:
            raise ValueError(f"{flag} {word}: give a finite number that is not negative")
        values = replace(values, **{name: number})
    return values


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
    as_built_s: float
    """The stream as it is: every source broadcasts to all ranks, one after another."""


@dataclass(frozen=True)
class CostPhase:
    name: str
    seconds: float
    why: str


@dataclass(frozen=True)
class Cost:
    tokens: int
    flops_per_token_forward: float
    flops_per_token_training: float
    flops: float
    phases: tuple[CostPhase, ...]
    sync: SyncBytes | None
    gpus: int

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.gpus / 3600

    @property
    def dominant(self) -> CostPhase:
        return max(self.phases, key=lambda phase: phase.seconds)


def sync_bytes(
    table: NameTable, hf: HfConfig, engines: Sequence[EngineSpec], rates: Rates, *, gpus_per_node: int, mtp: bool = False
) -> SyncBytes | None:
    """mtp: the MTP layer is trained, so a sync carries it."""
    receivers = [engine for engine in engines if engine.update_weights]
    if not receivers:
        return None
    block, kept = fp8_format(hf)
    # (of the MTP layer, of a routed expert) -> bytes
    nbytes = {(mtp, expert): 0 for mtp in (False, True) for expert in (False, True)}
    for entry in table.entries:
        for tensor in entry.hf:
            fp8 = block is not None and tensor.fp8 and tensor.name.removesuffix(".weight") not in kept
            kind = entry.name.startswith("mtp."), entry.expert is not None
            nbytes[kind] += wire_bytes(tensor, fp8=fp8, block=block or 0, float32=entry.float32)
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
        as_built_s=(experts + rest) / gb / rates.nic_gb_per_s,
    )


@dataclass(frozen=True)
class Shape:
    """What a rollout is, for the cost."""

    samples: int
    mean_tokens: int
    longest_response: int
    trainer_gpus: int
    rollout_gpus: int
    micro_batches: int
    steps: int
    needs_reference: bool
    needs_teacher: bool
    needs_old_log_probs: bool
    colocate: bool
    speculates: bool = True
    """The engines that decode draft tokens."""
    vpp: int = 1


def bubble(pp: int, micro_batches: int, vpp: int = 1) -> float:
    """Idle share of one-forward-one-backward: (p - 1) / (v m + p - 1), with v chunks per stage."""
    return (pp - 1) / (vpp * micro_batches + pp - 1)


def predict(
    work: ModelWork,
    stage_cost: Sequence[float],
    grid: Grid,
    shape: Shape,
    sync: SyncBytes | None,
    rates: Rates,
    *,
    recompute: bool,
    trainer_bytes_per_gpu: int,
    optimizer_bytes_per_node: int,
    checkpoint_bytes: int,
    save_interval: int | None,
) -> Cost:
    tokens = shape.samples * shape.mean_tokens
    forward, training = work.forward, work.training(recompute=recompute)
    usable = shape.trainer_gpus * rates.peak_tflops * 1e12 * rates.training_mfu
    evenness = balance(stage_cost) if stage_cost else 1.0
    idle = bubble(grid.pp, max(shape.micro_batches, 1), shape.vpp)
    busy = evenness * (1 - idle)
    passes = int(shape.needs_old_log_probs) + int(shape.needs_reference) + int(shape.needs_teacher)
    accepted = rates.tokens_per_decode_step if shape.speculates else 1.0
    decode = shape.longest_response / accepted * rates.decode_step_ms / 1e3
    phases = [
        CostPhase(
            "rollout",
            decode,
            f"longest response {shape.longest_response:,} tokens, {accepted:g} per {rates.decode_step_ms:g} ms",
        )
    ]
    moved = trainer_bytes_per_gpu / 1e9 / rates.host_link_gb_per_s
    if shape.colocate:
        phases.append(
            CostPhase("hand over to trainer", moved, f"{trainer_bytes_per_gpu / 1e9:.1f} GB per GPU from main memory")
        )
    if passes:
        seconds = passes * tokens * forward / usable / busy
        phases.append(
            CostPhase("log-probs", seconds, f"{passes} forward pass{'es' if passes > 1 else ''} over {tokens:,} tokens")
        )
    phases.append(
        CostPhase(
            "train",
            tokens * training / usable / busy,
            f"{tokens:,} tokens x {training / 1e9:.0f} GF, stages {evenness:.0%} even, bubble {idle:.0%}",
        )
    )
    if optimizer_bytes_per_node:
        seconds = shape.steps * optimizer_bytes_per_node / 1e9 / rates.host_optimizer_gb_per_s
        phases.append(
            CostPhase("optimizer", seconds, f"{optimizer_bytes_per_node / 1e9:.0f} GB of state per node, {shape.steps} step(s)")
        )
    if sync is not None:
        phases.append(
            CostPhase(
                "weight sync",
                sync.as_built_s,
                f"{(sync.experts + sync.rest) / 1e9:.0f} GB broadcast one source after another; "
                f"well scheduled {sync.lower_bound_s:.2f} s",
            )
        )
    if shape.colocate:
        phases.append(CostPhase("hand over to engines", moved, f"{trainer_bytes_per_gpu / 1e9:.1f} GB per GPU to main memory"))
    if save_interval:
        phases.append(
            CostPhase(
                "checkpoint",
                checkpoint_bytes / 1e9 / rates.disk_gb_per_s / save_interval,
                f"{checkpoint_bytes / 1e12:.2f} TB every {save_interval} rollouts",
            )
        )
    gpus = max(shape.trainer_gpus, shape.rollout_gpus) if shape.colocate else shape.trainer_gpus + shape.rollout_gpus
    return Cost(tokens, forward, training, tokens * (training + passes * forward), tuple(phases), sync, gpus)


def rates_shown(rates: Rates) -> Mapping[str, float]:
    return {item.name: getattr(rates, item.name) for item in fields(Rates)}
