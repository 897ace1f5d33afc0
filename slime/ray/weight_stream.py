"""The weight stream of one trainer rank: a sync's plan carried out round by round, and the engines fed with the rounds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from slime.device import Device
from slime.engine.client import EngineClient, EngineError, EngineGone
from slime.engine.kinds import HOST_MODEL_CLASS
from slime.model.hf_config import HfConfig
from slime.model.hf_io import write_hf
from slime.model.names import NameTable
from slime.parallel import Ranks
from slime.ray.destinations import Destinations, EngineTarget, beside, homes_of
from slime.ray.engine_broadcast import EngineBroadcast
from slime.ray.engine_feed import EngineFeed
from slime.ray.train_actor import meeting_place
from slime.ray.weight_receivers import Order, Receivers
from slime.types.weight_bucket import WeightBucket
from slime.weights.buckets import unpack_bucket
from slime.weights.digest import plan_digest, plan_size
from slime.weights.execute import Execution
from slime.weights.parts import TrainedParts, trainer_of
from slime.weights.plan import Receiver, SyncPlan, Trainer, plan_sync
from slime.weights.protocol import StreamReport
from slime.weights.quantize import WireFormat
from slime.weights.read_back import Expected, ReadBack, answered, read_back
from slime.weights.stopwatch import Stopwatch
from slime.weights.ways import is_elsewhere, planned


class WeightStream:
    """Built once per run on every rank; `send` is a collective of all of them."""

    def __init__(
        self,
        model: Sequence,
        hf_config: HfConfig,
        ranks: Ranks,
        device: Device,
        *,
        limit_bytes: int,
        read_back: bool = False,
        with_mtp: bool = False,
        peer_seconds: float = 600.0,
    ):
        """read_back: a rank that posts to engines keeps a bounded copy of what it sent, for `check`.

        peer_seconds: that ranks and receivers wait for each other.

        with_mtp: the model has its multi-token-prediction layer, which goes to the engines' draft model and into exports.
        """
        self._model, self._hf, self._ranks, self._device = list(model), hf_config, ranks, device
        self._table, self._with_mtp = NameTable.for_model(hf_config, with_mtp=with_mtp), with_mtp
        self._block = WireFormat.of_checkpoint(hf_config).fp8_block or 1
        self._limit_bytes, self._read_back, self._peer_seconds = limit_bytes, read_back, peer_seconds
        self._expected: dict[str, tuple[int | None, Expected]] = {}
        self._broadcast: EngineBroadcast | None = None
        self._others: Receivers | None = None
        self._trainer: Trainer | None = None
        self._plans: dict[tuple, SyncPlan] = {}
        self._summaries: dict[int, tuple[int, int, str]] = {}
        """Bytes, tensors and digest of each of the plans, by its identity."""
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def send(self, version: int, to: Destinations) -> StreamReport:
        """Every weight to every engine: trainer ranks serve an engine that shares their devices, or stand for the rest of one
        that shares some; receivers serve an engine on others, or a trainer rank broadcasts to it.

        The next round is made while the engines load one. An engine that is gone is named in the report and the others get
        everything: the ranks stay together.
        """
        world, label = self._ranks.world_size, f"weights v{version}"
        received = [engine for engine in to.engines if engine.receivers]
        away = [engine for engine in to.engines if not engine.receivers and is_elsewhere(engine.receiver, world)]
        shared = [engine for engine in to.engines if engine not in (*away, *received)]
        served = [self._as_it_serves(engine.receiver) for engine in to.engines]
        receivers = planned(served, trainer_gpus=world, num_gpus=len(to.nodes), broadcasts=bool(away))
        plan = self._plan(self._hf, receivers, (*to.nodes, to.nodes[0]) if away else to.nodes)
        homes = homes_of([*shared, *received], world, len(plan.nodes))
        others = self._receivers(received, to) if received else None
        feeds = [self._feed(engine, homes, label) for engine in shared]
        posts = [feed for feed in feeds if feed.posts]
        lost: list[str] = []
        broadcast = self._joined(away, to, lost) if away and self._ranks.rank == homes[-1] else None
        self._expect([feed.target for feed in posts], away if broadcast is not None else ())
        clock = Stopwatch()
        if others is not None:
            others.begin(self._order(plan, receivers, received, homes, label))
        try:
            for buckets in self._rounds(plan, homes, None if others is None else others.group, clock):
                self._keep(buckets, whole=len(to.nodes))
                with clock("hand_over"):
                    lost += _finish(feeds, broadcast)
                    for feed in feeds:
                        feed.deliver(buckets)
                    if broadcast is not None and len(to.nodes) in buckets:
                        broadcast.deliver(buckets[len(to.nodes)])
                # A feed holds what its engine reads, and a broadcast sends a copy: no third bucket beside the next one.
                del buckets
            with clock("hand_over"):
                lost += _finish(feeds, broadcast)
        except Exception as error:
            if others is not None:
                self._others = None
                others.explain(error)
            raise
        finally:
            for feed in posts:
                feed.close()
        with clock("hand_over"):
            lost += [] if others is None else others.finish()
        self._device.empty_cache()
        lost += [feed.lost for feed in posts if feed.lost is not None]
        if id(plan) not in self._summaries:
            self._summaries[id(plan)] = (*plan_size(plan), plan_digest(plan))
        return StreamReport(plan.rounds, *self._summaries[id(plan)], lost=tuple(lost), seconds=clock.seconds)

    def check(self, version: int, to: Destinations) -> list[ReadBack]:
        """Read what the last `send` gave to this rank's engines back. No collective, engines still paused.

        Raises RuntimeError naming engine, tensors and the largest difference.
        """
        expected, self._expected = self._expected, {}
        found = []
        if self._ranks.rank == 0:  # of these nobody kept what was sent
            found = [ReadBack(engine.name, "", complete=False) for engine in to.engines if engine.receivers]
        with asyncio.Runner() as runner:
            for engine in to.engines:
                if engine.name in expected:
                    (_, sent), ranks = expected[engine.name], len(engine.receiver.gpus)
                    answers = runner.run(_read_back(engine, sent))
                    found.append(read_back(engine.name, version, sent, answers, num_ranks=ranks))
        return found

    def save_hf(self, folder: str, *, origin: str) -> None:
        """The policy as a Hugging Face checkpoint in the trained dtype, written by rank 0; an MTP layer that is not trained is
        left out and no longer announced."""
        plain = HfConfig({name: value for name, value in self._hf.items() if name != "quantization_config"})
        everything = Receiver(0, (0,), tp=1, drafts=True)
        plan = self._plan(plain, (everything,), (0,) * self._ranks.world_size)
        rounds = self._rounds(plan, range(self._ranks.world_size))
        tensors = (named for buckets in rounds for bucket in buckets.values() for named in unpack_bucket(bucket))
        if self._ranks.rank == 0:
            write_hf(folder, tensors, origin=origin, table=self._table, mtp_kept=self._with_mtp)
        else:
            for _ in tensors:
                pass
        dist.barrier()

    def _as_it_serves(self, receiver: Receiver) -> Receiver:
        """On a CPU SGLang keeps a slice of every expert on every rank, whatever the flags say, and our own class of a model has
        the whole vocabulary on each."""
        if self._device.kind != "host":
            return receiver
        if self._hf.model_type in HOST_MODEL_CLASS:
            return replace(receiver, cuts=False, cuts_head=False)
        return replace(receiver, ep=1)

    def _plan(self, hf: HfConfig, receivers: tuple[Receiver, ...], nodes: tuple[int, ...]) -> SyncPlan:
        key = (hf.get("quantization_config") is None, receivers, nodes)
        if self._trainer is None:
            self._trainer = trainer_of(self._model, self._ranks, mtp=self._with_mtp)
        if key not in self._plans:
            nodes = nodes or (0,) * self._ranks.world_size
            self._plans[key] = plan_sync(self._table, hf, self._trainer, receivers, nodes=nodes, limit_bytes=self._limit_bytes)
        return self._plans[key]

    def _rounds(
        self, plan: SyncPlan, homes: Sequence[int], group: dist.ProcessGroup | None = None, clock: Stopwatch | None = None
    ) -> Iterator[Mapping[int, WeightBucket]]:
        """This rank's buckets by GPU, complete in the device's memory when they are given."""
        parts = TrainedParts(self._model, self._table, self._ranks, block=self._block)
        told = {"wait": self._device.synchronize, "clock": clock or Stopwatch()}
        execution = Execution(plan, homes, self._ranks.rank, self._device.torch_device, parts, group, **told)
        for number in range(plan.rounds):
            yield execution.round(number)

    def _feed(self, engine: EngineTarget, homes: Sequence[int], label: str) -> EngineFeed:
        """All ranks open an engine's group in the same order."""
        members = beside(engine, homes)
        if len(members) > 1 and members not in self._groups:
            self._groups[members] = dist.new_group(list(members), backend="gloo")
        return EngineFeed(engine, homes, self._ranks.rank, self._device, self._groups.get(members), label=label)

    def _joined(self, engines: Sequence[EngineTarget], to: Destinations, lost: list[str]) -> EngineBroadcast | None:
        """The group with these engines: the one that they joined, or a new one where one of them was started anew. None where
        one is not there, which is added to `lost`."""
        if self._broadcast is not None and not self._broadcast.serves(engines):
            self._broadcast.close()
            self._broadcast = None
        if self._broadcast is None:
            address, peers = meeting_place(to.hosts)
            try:
                self._broadcast = EngineBroadcast(engines, self._device, address=address, peers=peers)
            except EngineGone as error:
                lost.append(str(error))
        return self._broadcast

    def _receivers(self, engines: Sequence[EngineTarget], to: Destinations) -> Receivers:
        """The group with the receivers of these engines: the one that there is, or a new one where they are others."""
        if self._others is not None and not self._others.serves(engines):
            self._others.close()
            self._others = None
        if self._others is None:
            address, peers = meeting_place(to.hosts)
            told = {"rank": self._ranks.rank, "world": self._ranks.world_size, "seconds": self._peer_seconds}
            self._others = Receivers(engines, **told, device=self._device, address=address, peers=peers)
        return self._others

    def _order(
        self,
        plan: SyncPlan,
        receivers: tuple[Receiver, ...],
        engines: Sequence[EngineTarget],
        homes: Sequence[int],
        label: str,
    ) -> Order:
        return Order(
            label=label,
            hf=dict(self._hf),
            with_mtp=self._with_mtp,
            trainer=self._trainer,
            receivers=receivers,
            nodes=plan.nodes,
            limit_bytes=self._limit_bytes,
            engines=tuple(engines),
            homes=tuple(homes),
        )

    def _expect(self, posted: Sequence[EngineTarget], joined: Sequence[EngineTarget]) -> None:
        """For `check`: what this rank gives to the engines that it posts to, and once what it broadcasts."""
        self._expected = {}
        if self._read_back:
            self._expected = {engine.name: (engine.receiver.gpus[0], Expected(self._block)) for engine in posted}
            whole = Expected(self._block)
            self._expected |= {engine.name: (None, whole) for engine in joined}

    def _keep(self, buckets: Mapping[int, WeightBucket], *, whole: int) -> None:
        """What an engine's first rank gets: it is the one that gives tensors back. whole: the GPU of the broadcast."""
        wanted = {id(expected): (whole if gpu is None else gpu, expected) for gpu, expected in self._expected.values()}
        for gpu, expected in wanted.values():
            if gpu in buckets:
                expected.add(unpack_bucket(buckets[gpu]))


def _finish(feeds: Sequence[EngineFeed], broadcast: EngineBroadcast | None) -> list[str]:
    """Wait until all engines have loaded what they were given last; those that a broadcast found gone."""
    for feed in feeds:
        feed.finish()
    return broadcast.finish() if broadcast is not None else []


async def _read_back(target: EngineTarget, expected: Expected) -> dict[str, Tensor]:
    """The tensors that the engine gives back by name; it answers 400 for one that it keeps fused or on another rank."""
    client, answers = EngineClient(target.url, target.token), {}
    try:
        for name, value in expected.values.items():
            try:
                answers[name] = answered(await client.weights_by_name(name, rows=len(value)))
            except EngineError as error:
                if error.status != 400:
                    raise
    finally:
        await client.close()
    return answers
