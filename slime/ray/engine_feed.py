"""Handing an engine its buckets, round by round: one process posts what all processes beside the engine's ranks hold."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import torch
import torch.distributed as dist

from slime.device import Device
from slime.device.host import HostDevice
from slime.engine.client import EngineClient, EngineError, EngineGone, sync, sync_later
from slime.engine.payload import bucket_payload
from slime.ray.destinations import EngineTarget, beside
from slime.types.weight_bucket import WeightBucket


class EngineFeed:
    """One process's part in feeding one engine; made anew for each sync.

    `deliver` and `finish` are collectives of the processes that hold its buckets. What was delivered must stay as it is until
    `finish`: the engine reads it from where it lies.
    """

    def __init__(
        self,
        target: EngineTarget,
        homes: Sequence[int],
        rank: int,
        device: Device,
        group: dist.ProcessGroup | None,
        *,
        label: str,
        on_its_gpus: bool = False,
    ):
        """group: gloo, of the processes beside the engine where there are several. label: of the sync, for errors. on_its_gpus:
        each of them sits on the GPU of the engine rank whose bucket it holds, whatever the homes' numbers."""
        self.target, self._rank, self._group, self._label = target, rank, group, label
        self._members = beside(target, homes)
        self.gpus = tuple(gpu for gpu in target.receiver.gpus if homes[gpu] == rank)
        # A handle names memory of this device; on the way to an engine on others only bytes make sense.
        shares = on_its_gpus or all(homes[gpu] == gpu for gpu in target.receiver.gpus)
        self._device = device if shares else HostDevice()
        self._client: EngineClient | None = None
        self._flying: Future[None] | None = None
        self.lost: str | None = None
        """How the engine was lost."""
        self._calls = 0
        self._held: Mapping[int, WeightBucket] = {}

    @property
    def posts(self) -> bool:
        return self._rank == self._members[0]

    def deliver(self, buckets: Mapping[int, WeightBucket]) -> None:
        """Give the engine one round's buckets (by GPU; a rank without one gets nothing) and return while it loads."""
        if self._rank not in self._members:
            return
        self._held = buckets
        own = {gpu: self._payload(buckets.get(gpu)) for gpu in self.gpus}
        held: list[dict[int, tuple[bool, bytes]]] | None = [own]
        if len(self._members) > 1:
            held = [{}] * len(self._members) if self.posts else None
            dist.gather_object(own, held, dst=self._members[0], group=self._group)
        if held is None or self.lost is not None:
            return
        payloads = {gpu: payload for part in held for gpu, payload in part.items()}
        self._flying = sync_later(self._post(payloads))

    def finish(self) -> None:
        """Wait until the engine has loaded what was delivered last. Raises EngineError for a refusal."""
        if self._rank not in self._members:
            return
        flying, self._flying = self._flying, None
        if flying is not None:
            try:
                flying.result()
            except EngineGone as error:
                self.lost = f"{self.target.name}: {error}"
        if len(self._members) > 1:
            # The buffers of the others are mapped into the engine until it has answered.
            dist.barrier(group=self._group)
        self._held = {}

    def close(self) -> None:
        if self._client is not None:
            sync(self._client.close())

    def _payload(self, bucket: WeightBucket | None) -> tuple[bool, bytes]:
        """(has tensors, what the rank's process loads)."""
        if bucket is None:
            return False, bucket_payload(WeightBucket((), torch.empty(0, dtype=torch.uint8)), HostDevice())
        flat = bucket.flat.cpu() if self._device.kind == "host" else bucket.flat
        return True, bucket_payload(WeightBucket(bucket.metas, flat), self._device)

    async def _post(self, payloads: Mapping[int, tuple[bool, bytes]]) -> None:
        """One call per pipeline stage: every stage is given the same list and skips the layers of others."""
        if self._client is None:
            self._client = EngineClient(self.target.url, self.target.token)
        receiver, started = self.target.receiver, time.monotonic()
        for first in range(0, len(receiver.gpus), receiver.tp):
            ranks = [payloads[gpu] for gpu in receiver.gpus[first : first + receiver.tp]]
            if not any(has_tensors for has_tensors, _ in ranks):
                continue
            self._calls += 1
            try:
                await self._client.update_weights_from_tensor([payload for _, payload in ranks])
            except EngineGone:
                raise
            except EngineError as error:
                seconds = time.monotonic() - started
                where = f"engine {self.target.name}, loading bucket {self._calls} of {self._label}, after {seconds:.1f} s"
                raise EngineError(f"{where}: {error}", error.status) from None
