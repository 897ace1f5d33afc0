"""Weights for engines on devices of their own: one trainer rank and every rank of those engines in a group, and a broadcast.

SGLang's ranks join by `/init_weights_update_group` and receive by `/update_weights_from_distributed`; group rank 0 sends. All
engines get every byte, at the same time.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta

import torch.distributed as dist

from slime.compat.joint_group import joint_group
from slime.compat.store import serve_store
from slime.device import Device
from slime.engine.client import EngineClient, EngineError, EngineGone, sync, sync_later
from slime.engine.versions import capabilities
from slime.ray.destinations import EngineTarget
from slime.types.weight_bucket import WeightBucket
from slime.weights.buckets import dense_bucket

logger = logging.getLogger(__name__)

JOIN_SECONDS = 120.0
SEND_SECONDS = 1800.0
_LOOK_SECONDS = 0.002


class EngineBroadcast:
    """Held by one trainer rank for as long as the same engines live."""

    def __init__(self, engines: Sequence[EngineTarget], device: Device, *, address: str, peers: Sequence[str]):
        """Opens the group. address, peers: where its store listens, and who may connect (slime.compat.store).

        Raises EngineError where an engine does not join, EngineGone where one is not there.
        """
        self.engines, self._device = tuple(engines), device
        self._clients = [EngineClient(engine.url, engine.token) for engine in engines]
        self._name = f"slime-{secrets.token_hex(4)}"
        sizes = [len(engine.receiver.gpus) for engine in engines]
        world = 1 + sum(sizes)
        self._store = serve_store(address, peers, world_size=world, timeout=timedelta(seconds=JOIN_SECONDS))
        self._group: dist.ProcessGroup | None = None
        self._held: WeightBucket | None = None
        self._loads: list[Future] = []
        self._ask_all()
        started = time.monotonic()
        joins = [
            sync_later(
                client.init_weights_group(
                    address=address,
                    port=self._store.port,
                    first_rank=1 + sum(sizes[:number]),
                    world_size=world,
                    group=self._name,
                    backend=device.backend,
                    timeout=JOIN_SECONDS,
                )
            )
            for number, client in enumerate(self._clients)
        ]
        own = threading.Thread(target=self._join, args=(world,), name="weights-group", daemon=True)
        own.start()
        self._wait(joins, lambda: not own.is_alive(), JOIN_SECONDS, "joining the group for weights")
        if self._group is None:
            raise RuntimeError(f"the group for weights of {world} ranks was not made; see the engines' logs")
        logger.info("%d ranks of %d engines joined in %.1f s", world - 1, len(engines), time.monotonic() - started)

    def _ask_all(self) -> None:
        """Before anybody joins, since those that do wait for the others: does each answer, and does its draft get weights?"""
        for engine, client in zip(self.engines, self._clients, strict=True):
            try:
                found = sync(client.sglang_version())
            except EngineGone as error:
                raise EngineGone(f"{engine.name}: {error}") from None
            if engine.receiver.drafts and not capabilities(found).broadcast_reaches_draft:
                raise EngineError(
                    f"engine {engine.name} speculates, and sglang {found} gives broadcast weights to the main model alone: its "
                    "draft would stay behind. Let it share the trainer's GPUs (--colocate), or install a newer sglang"
                )

    def _join(self, world: int) -> None:
        told = {"backend": self._device.backend, "timeout": timedelta(seconds=SEND_SECONDS)}
        self._group = joint_group(self._store, name=self._name, rank=0, world=world, **told)

    def serves(self, engines: Sequence[EngineTarget]) -> bool:
        """Whether these are the engines that joined, none of them started anew since, and the group is whole."""
        return self._group is not None and self.engines == tuple(engines)

    def deliver(self, bucket: WeightBucket) -> None:
        """Send one bucket to all engines and return while it travels and is loaded."""
        if self._group is None:
            return
        self._held = dense_bucket(bucket)
        self._device.synchronize()
        self._loads = [
            sync_later(client.update_weights_from_group(self._name, self._held.metas, timeout=SEND_SECONDS))
            for client in self._clients
        ]
        self._work = dist.broadcast(self._held.flat, group=self._group, group_src=0, async_op=True)

    def finish(self) -> list[str]:
        """Wait until all have loaded it. The engines that are gone, with what was seen of that: the group is broken then, and
        nobody gets anything more. Raises EngineError for a refusal."""
        loads, self._loads = self._loads, []
        if not loads:
            return []
        try:
            self._wait(loads, self._work.is_completed, SEND_SECONDS, "loading a broadcast bucket")
        except EngineGone:
            self.close()
            return lost_of(self.engines, loads, JOIN_SECONDS)
        finally:
            self._held = None
        return []

    def _wait(self, calls: Sequence[Future], done: Callable[[], bool], seconds: float, doing: str) -> None:
        """Until all engines have answered and `done`. The first error of an engine is raised at once: without it nothing would
        ever be done."""
        started = time.monotonic()
        while not (all(call.done() for call in calls) and done()):
            for engine, call in zip(self.engines, calls, strict=True):
                if call.done() and (error := call.exception()) is not None:
                    where = f"engine {engine.name}, {doing}, after {time.monotonic() - started:.1f} s"
                    raise type(error)(f"{where}: {error}") from None
            if time.monotonic() - started > seconds:
                late = [engine.name for engine, call in zip(self.engines, calls, strict=True) if not call.done()]
                who = ", ".join(late) or "the group"
                raise EngineError(f"{who}: {doing} has taken {seconds:.0f} s, which is all that is expected")
            time.sleep(_LOOK_SECONDS)
        for call in calls:
            call.result()

    def close(self) -> None:
        """Leave the group; engines that live forget it."""
        group, self._group = self._group, None
        if group is not None:
            dist.destroy_process_group(group)


def lost_of(engines: Sequence[EngineTarget], calls: Sequence[Future], seconds: float) -> list[str]:
    """After one of a group is gone, the engines that are gone or do not come back, each with what was seen of that.

    Over gloo the others hear of it at once. Over NCCL an engine may wait for the one that is gone for longer than `seconds`.
    """
    found, deadline = [], time.monotonic() + seconds
    for engine, call in zip(engines, calls, strict=True):
        try:
            error = call.exception(timeout=max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            found.append(f"{engine.name}: no answer within {seconds:.0f} s since another engine of its group was gone")
            continue
        if isinstance(error, EngineGone):
            found.append(f"{engine.name}: {error}")
    return found
