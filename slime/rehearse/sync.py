"""The plan of the weight sync that the flags ask for, and what it costs: the plan that the run itself carries out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from slime.engine.plan import slots_of
from slime.engine.spec import EngineSpec
from slime.rehearse.model.cost import SYNC, Cost, of_one_every
from slime.rehearse.model.rates import Rates
from slime.rehearse.reading import Reading
from slime.weights.digest import plan_digest
from slime.weights.plan import Receiver, SyncPlan, Trainer, nodes_of, plan_sync
from slime.weights.price import Links, PlanPrice, price
from slime.weights.ways import planned


@dataclass(frozen=True)
class PlannedSync:
    plan: SyncPlan
    price: PlanPrice
    most_tensors: int
    """Tensors that the engine rank with the most of them is given, a weight and its scale as two."""
    links: Links
    carried_out: SyncPlan
    """What the run does. Engines wholly on GPUs of their own get a broadcast, and not what `plan` has for them: for all of
    them together the run gathers the whole model on one rank."""

    @property
    def broadcasts(self) -> bool:
        return self.carried_out is not self.plan

    @property
    def digest(self) -> str:
        return plan_digest(self.carried_out)


def plan_of_sync(reading: Reading, specs: Sequence[EngineSpec], rates: Rates) -> PlannedSync | None:
    """None where no engine takes weights."""
    slots = slots_of(reading.config)
    receivers = [Receiver.of(spec, first_gpu=slots.first_rollout_gpu) for spec in specs if spec.update_weights]
    if not receivers:
        return None
    plan = _plan(reading, receivers)
    num_gpus = max(slots.trainer_gpus, slots.first_rollout_gpu + slots.rollout_num_gpus)
    broadcasts = reading.config.engine.update_weight_transport != "receivers"
    carried_out = planned(receivers, trainer_gpus=slots.trainer_gpus, num_gpus=num_gpus, broadcasts=broadcasts)
    whole = plan if carried_out == tuple(receivers) else _plan(reading, carried_out)
    links = Links(network=rates.nic_gb_per_s, nvlink=rates.nvlink_gb_per_s, load=rates.engine_load_gb_per_s)
    return PlannedSync(plan, price(plan, links), _most_tensors(plan), links, whole)


def _plan(reading: Reading, receivers: Sequence[Receiver]) -> SyncPlan:
    config, last = reading.config, max(gpu for receiver in receivers for gpu in receiver.gpus)
    return plan_sync(
        reading.table,
        reading.hf,
        trainer_of(reading),
        receivers,
        nodes=nodes_of(max(reading.grid.world, last + 1), config.cluster.num_gpus_per_node),
        limit_bytes=config.engine.update_weight_buffer_size,
    )


def trainer_of(reading: Reading) -> Trainer:
    padded = reading.config.model.padded_vocab_size
    return Trainer(reading.grid, tuple(reading.chunks), mtp=reading.trains_mtp, padded_vocab=padded)


def _most_tensors(plan: SyncPlan) -> int:
    counts: dict[int, int] = {}
    for lane in plan.lanes:
        tensors = [tensor for unit in lane.units for entry in unit.entries for tensor in entry.hf]
        count = len(tensors) + sum(map(plan.wire.form.is_fp8, tensors))
        for gpu in lane.gpus:
            counts[gpu] = counts.get(gpu, 0) + count
    return max(counts.values())


def with_planned_sync(cost: Cost, sync: PlannedSync, *, every: int) -> Cost:
    """The same cost with what the run's way of sending takes in place of the estimate. every: rollouts, a sync."""
    found, steps = sync.price, cost.sync.steps_s
    seconds, why = (
        found.seconds + steps,
        (
            f"{found.wire_seconds:.2f} s on the wire, {found.load_seconds:.2f} s of loading, a round while the last one loads, "
            f"{steps:.2f} s of the engines around it; broadcast to all it would be {cost.sync.broadcast_s:.1f} s"
        ),
    )
    if sync.broadcasts:
        # Gathered on one rank and sent from there, round after round: its port carries the model twice, once each way.
        gathered = price(sync.carried_out, sync.links).wire_seconds
        seconds = max(gathered, cost.sync.broadcast_s) + steps
        why = (
            f"gathered on one rank in {gathered:.1f} s and broadcast to engines elsewhere, {steps:.2f} s of the engines around "
            f"it; by the plan {found.seconds:.2f} s"
        )
    told = {"seconds": seconds / every, "why": of_one_every(every) + why}
    phases = [replace(phase, **told) if phase.name == SYNC else phase for phase in cost.phases]
    return replace(cost, phases=tuple(phases))
