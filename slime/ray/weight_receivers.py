"""Weights for engines on GPUs of their own, each rank its share: a process beside every rank takes part in the plan.

Trainer ranks and receivers are one group in which each sends point to point what the plan says; a receiver then hands its
engine rank the bucket as a trainer rank on the same GPU would. Nothing travels that the rank does not serve.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import ray
import torch.distributed as dist
from ray.actor import ActorHandle

from slime.compat.joint_group import give_up, joint_group
from slime.device import Device
from slime.model.hf_config import HfConfig
from slime.ray.calls import gather
from slime.ray.destinations import Beside, EngineTarget, by_name, receivers_of
from slime.ray.fates import Process, this_process
from slime.ray.placement import RECEIVER_SHARE, Placement, Slot, rank_environment
from slime.weights.lanes import Trainer
from slime.weights.plan import SyncPlan, plan_sync
from slime.weights.serving import Receiver

if TYPE_CHECKING:
    from slime.ray.engine_feed import EngineFeed
    from slime.weights.execute import Execution

logger = logging.getLogger(__name__)

JOIN_SECONDS = 120.0
EXPLAIN_SECONDS = 30.0
"""For receivers to end once one of them, or a trainer rank, has gone."""


@dataclass(frozen=True)
class Order:
    """What a receiver has to know of a sync; all make the same plan of it."""

    label: str
    hf: Mapping[str, object]
    with_mtp: bool
    trainer: Trainer
    receivers: tuple[Receiver, ...]
    nodes: tuple[int, ...]
    limit_bytes: int
    engines: tuple[EngineTarget, ...]
    """Those with receivers."""
    homes: tuple[int, ...]


@ray.remote
class WeightReceiver:
    """Sits in the slot of one engine rank. Its calls are collectives of the trainer's ranks and of all receivers."""

    def __init__(self, name: str, device_index: int, log_folder):
        from slime.device import get_device
        from slime.observability.log import setup_logging

        setup_logging(name, folder=log_folder)
        self._who = this_process(world="receivers")
        self._device: Device = get_device()
        self._device.init_process(device_index)
        self._group: dist.ProcessGroup | None = None
        self._feeds: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._made: tuple[tuple, SyncPlan] | None = None
        """The last plan, and what it was made from."""

    def process(self) -> Process:
        return self._who

    def join(self, address: str, port: int, *, name: str, first: int, number: int, count: int, seconds: float) -> None:
        """first: trainer ranks; number: this receiver among `count`; seconds: that it waits for a peer."""
        if self._group is not None:
            self.leave()
        wait = timedelta(seconds=JOIN_SECONDS)
        store = dist.TCPStore(address, port, first + count, is_master=False, timeout=wait)
        beside, patience = dist.PrefixStore(f"{name}-beside", store), timedelta(seconds=seconds)
        dist.init_process_group("gloo", store=beside, rank=number, world_size=count, timeout=patience)
        self._first, self._number = first, number
        told = {"backend": self._device.backend, "timeout": patience}
        self._group = joint_group(store, name=name, rank=first + number, world=first + count, **told)

    def leave(self) -> None:
        self._group, self._feeds = None, {}
        dist.destroy_process_group()

    def receive(self, order: Order) -> list[str]:
        """One sync; the engines of this receiver that were lost, with how. Raises EngineError for one that refuses."""
        try:
            return self._receive(order)
        except Exception as error:
            group, self._group = self._group, None
            give_up(group, error)
            del group
            self.leave()
            raise

    def _receive(self, order: Order) -> list[str]:
        from slime.ray.engine_feed import EngineFeed
        from slime.weights.execute import Execution

        plan, rank = self._plan(order), self._first + self._number
        wait = self._device.synchronize
        execution = Execution(plan, order.homes, rank, self._device.torch_device, None, self._group, wait)
        local = [home - self._first for home in order.homes]
        feeds = [
            EngineFeed(
                engine, local, self._number, self._device, self._beside(engine, local), label=order.label, on_its_gpus=True
            )
            for engine in order.engines
        ]
        mine = next(feed for feed in feeds if feed.gpus)
        hand_on(execution, mine)
        self._device.empty_cache()
        return [mine.lost] if mine.posts and mine.lost is not None else []

    def _plan(self, order: Order) -> SyncPlan:
        from slime.model.names import NameTable

        of = (order.trainer, order.receivers, order.nodes)  # the rest is the same for all of a run
        if self._made is None or self._made[0] != of:
            hf = HfConfig(order.hf)
            table = NameTable.for_model(hf, with_mtp=order.with_mtp)
            plan = plan_sync(table, hf, order.trainer, order.receivers, nodes=order.nodes, limit_bytes=order.limit_bytes)
            self._made = (of, plan)
        return self._made[1]

    def _beside(self, engine: EngineTarget, local: Sequence[int]) -> dist.ProcessGroup | None:
        """Receivers of one engine, a gloo group; all receivers open the groups of all engines in the same order."""
        members = tuple(local[gpu] for gpu in engine.receiver.gpus)
        if len(members) > 1 and members not in self._feeds:
            self._feeds[members] = dist.new_group(list(members), backend="gloo")
        return self._feeds.get(members)


def hand_on(execution: Execution, feed: EngineFeed) -> None:
    """All rounds of a sync in a receiver: one arrives while its engine rank loads the one before."""
    try:
        for number in range(execution.plan.rounds):
            buckets = execution.round(number)
            with execution.clock("hand_over"):
                feed.finish()
                feed.deliver(buckets)
        with execution.clock("hand_over"):
            feed.finish()
    finally:
        feed.close()


def start_receiver(placement: Placement, slot: Slot, name: str, log_folder: Path) -> ActorHandle:
    """In the engine's slot; its process is on the engine's device."""
    one_node = len({slot.node_ip for slot in (*placement.trainer_slots, *placement.engine_slots)}) == 1
    return WeightReceiver.options(
        num_gpus=RECEIVER_SHARE,
        num_cpus=RECEIVER_SHARE,
        scheduling_strategy=placement.strategy(slot),
        runtime_env={"env_vars": rank_environment(one_node=one_node)},
    ).remote(name, slot.device_index, log_folder)


def with_processes(actors: Mapping[str, Sequence[ActorHandle]]) -> dict[str, tuple[Beside, ...]]:
    """The receivers of each engine, once all have a process."""
    asked = {name: actor.process.remote() for name, actor in by_name(actors).items()}
    found = iter(gather(asked, doing="starting its process").values())
    return {engine: tuple(Beside(actor, next(found)) for actor in those) for engine, those in actors.items()}


class Receivers:
    """One trainer rank's view of all receivers, for as long as they are the same."""

    def __init__(
        self,
        engines: Sequence[EngineTarget],
        *,
        rank: int,
        world: int,
        device: Device,
        address: str,
        peers: Sequence[str],
        seconds: float,
    ):
        """A collective of the trainer's ranks: rank 0 opens the store and calls the receivers. address, peers: as for
        `serve_store`. seconds: that anybody waits for a peer."""
        from slime.compat.store import serve_store

        self._all, self._seconds = receivers_of(engines), seconds
        self._processes = {name: receiver.process for name, receiver in self._all.items()}
        self._rank, total = rank, world + len(self._all)
        where: list[tuple[str, int, str] | None] = [None]
        calls = {}
        if rank == 0:
            self._store = serve_store(address, peers, world_size=total, timeout=timedelta(seconds=JOIN_SECONDS))
            where = [(address, self._store.port, f"slime-{secrets.token_hex(4)}")]
        dist.broadcast_object_list(where, src=0)
        host, port, name = where[0]
        if rank == 0:
            common = {"name": name, "first": world, "count": len(self._all), "seconds": seconds}
            for number, (label, receiver) in enumerate(self._all.items()):
                calls[label] = receiver.actor.join.remote(host, port, number=number, **common)
        else:
            self._store = dist.TCPStore(host, port, total, is_master=False, timeout=timedelta(seconds=JOIN_SECONDS))
        told = {"backend": device.backend, "timeout": timedelta(seconds=seconds)}
        self.group = joint_group(self._store, name=name, rank=rank, world=total, **told)
        if calls:
            gather(calls, doing="joining the group for weights", processes=self._processes, timeout=JOIN_SECONDS)
            logger.info("%d receivers of %d engines joined", len(calls), len(engines))
        self._calls: dict[str, ray.ObjectRef] = {}

    def serves(self, engines: Sequence[EngineTarget]) -> bool:
        return receivers_of(engines) == self._all

    def begin(self, order: Order) -> None:
        """Rank 0 sets all receivers going; the others take part by the plan alone."""
        if self._rank == 0:
            told = ray.put(order)
            self._calls = {label: receiver.actor.receive.remote(told) for label, receiver in self._all.items()}

    def finish(self) -> list[str]:
        """Engines that were lost. Raises RuntimeError naming a receiver that failed."""
        calls, self._calls = self._calls, {}
        told = {"processes": self._processes, "timeout": self._seconds}
        answers = gather(calls, doing="handing weights to engines", **told) if calls else {}
        return [line for lost in answers.values() for line in lost]

    def explain(self, error: Exception) -> None:
        """After a send to a receiver has failed: leaves the group, so that nobody waits for this rank, and raises what became
        of the receiver, where that is the cause. error: of here, which stands where no receiver has more to say."""
        group, self.group = self.group, None
        give_up(group, error)
        del group
        calls, self._calls = self._calls, {}
        if calls:
            logger.warning("sending weights to receivers: %s; asking these what has happened", error)
            gather(calls, doing="receiving weights", processes=self._processes, timeout=EXPLAIN_SECONDS)

    def close(self) -> None:
        dist.destroy_process_group(self.group)
