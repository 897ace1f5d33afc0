"""The weight stream of one trainer rank: export, quantise, bucket, broadcast, hand to the engine on the same device."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from slime.device import Device
from slime.device.host import HostDevice
from slime.engine.client import EngineClient, EngineError, EngineGone
from slime.engine.payload import bucket_payload
from slime.model.export import export_weights
from slime.model.hf_config import HfConfig
from slime.model.hf_io import write_hf
from slime.model.names import NameTable
from slime.parallel import Ranks
from slime.ray.train_actor import EngineTarget
from slime.types.weight_bucket import WeightBucket
from slime.weights.buckets import fill_buckets, unpack_bucket
from slime.weights.digest import StreamDigest
from slime.weights.protocol import StreamReport
from slime.weights.quantize import WireFormat
from slime.weights.read_back import Expected, ReadBack, answered, read_back
from slime.weights.stream import Source, broadcast_buckets

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Place:
    """What every rank must know of every other to take part in the right exports."""

    rank: int
    is_dense_source: bool
    is_expert_source: bool
    tp_ranks: tuple[int, ...]
    etp_ranks: tuple[int, ...]

    @staticmethod
    def of(ranks: Ranks) -> _Place:
        tp, etp = (tuple(dist.get_process_group_ranks(group)) for group in (ranks.tp_group, ranks.etp_group))
        return _Place(ranks.rank, ranks.is_dense_source, ranks.is_expert_source, tp, etp)


class _Post:
    """Posts buckets to one engine while it is there."""

    def __init__(self, target: EngineTarget, runner: asyncio.Runner):
        self._name, self._client, self._runner = target.name, EngineClient(target.url, target.token), runner
        self.lost: str | None = None
        """How the engine was lost."""

    def __call__(self, payloads: list[bytes]) -> None:
        if self.lost is not None:
            return
        try:
            self._runner.run(self._client.update_weights_from_tensor(payloads))
        except EngineGone as error:
            self.lost = f"{self._name}: {error}"

    def close(self) -> None:
        self._runner.run(self._client.close())


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
    ):
        """read_back: a rank that posts to engines keeps a bounded copy of what it sent, for `check`.

        with_mtp: the model has its multi-token-prediction layer, which goes to the engines' draft model and into exports.
        """
        self._model, self._ranks, self._device = model, ranks, device
        self._table, self._with_mtp = NameTable.for_model(hf_config, with_mtp=with_mtp), with_mtp
        self._places: list[_Place] | None = None
        self._wire = WireFormat.of_checkpoint(hf_config)
        self._limit_bytes, self._read_back = limit_bytes, read_back
        self._expected: Expected | None = None
        self._sharing_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def send(self, version: int, targets: Sequence[EngineTarget]) -> StreamReport:
        """Every weight to every engine. Trainer ranks serve an engine that shares their devices, rank 0 the others.

        An engine that is gone is named in the report and the others get everything: the ranks stay together.
        """
        self._open_groups(targets)
        buckets = self._buckets_of_all(self._wire)
        count = nbytes = tensors = 0
        digest = StreamDigest()
        keeps = self._read_back and any(self._posts(target) for target in targets)
        self._expected = Expected(self._wire.fp8_block or 1) if keeps else None
        with asyncio.Runner() as runner:
            posts = {target.name: _Post(target, runner) for target in targets if self._posts(target)}
            try:
                for bucket in buckets:
                    if self._expected is not None:
                        self._expected.add(unpack_bucket(bucket))
                    for target in targets:
                        self._deliver(bucket, target, posts.get(target.name))
                    digest.add((meta.name, meta.shape, meta.nbytes) for meta in bucket.metas)
                    count, nbytes, tensors = count + 1, nbytes + bucket.nbytes, tensors + len(bucket.metas)
                    del bucket  # the last one would be held while the cache is emptied
            finally:
                for post in posts.values():
                    post.close()
        self._device.empty_cache()
        lost = tuple(post.lost for post in posts.values() if post.lost is not None)
        return StreamReport(count, nbytes, tensors, digest.hex(), lost)

    def check(self, version: int, targets: Sequence[EngineTarget]) -> list[ReadBack]:
        """Read what the last `send` gave to this rank's engines back. No collective, engines still paused.

        Raises RuntimeError naming engine, tensors and the largest difference.
        """
        expected, self._expected = self._expected, None
        if expected is None:
            return []
        found = []
        with asyncio.Runner() as runner:
            for target in filter(self._posts, targets):
                answers = runner.run(_read_back(target, expected))
                found.append(read_back(target.name, version, expected, answers, num_ranks=target.num_ranks))
        return found

    def save_hf(self, folder: str, *, origin: str) -> None:
        """The policy as a Hugging Face checkpoint in the trained dtype, written by rank 0; an MTP layer that is not trained is
        left out and no longer announced."""
        wire = WireFormat(self._wire.dtype, None, frozenset(), self._wire.float32_names)
        tensors = (named for bucket in self._buckets_of_all(wire) for named in unpack_bucket(bucket))
        if self._ranks.rank == 0:
            write_hf(folder, tensors, origin=origin, table=self._table, mtp_kept=self._with_mtp)
        else:
            for _ in tensors:
                pass
        dist.barrier()

    def _buckets_of_all(self, wire: WireFormat) -> Iterator[WeightBucket]:
        return broadcast_buckets(self._sources(wire), rank=self._ranks.rank, device=self._device.torch_device)

    def _sources(self, wire: WireFormat) -> list[Source]:
        """Per pipeline stage the rank that sends the dense weights, and per expert shard the one that sends its experts."""
        if self._places is None:
            mine = _Place.of(self._ranks)
            self._places = [mine] * self._ranks.world_size
            dist.all_gather_object(self._places, mine)
        sources = []
        for place in self._places:
            if place.is_dense_source:
                sources.append(
                    Source(place.rank, self._buckets(wire, experts=False) if self._ranks.rank in place.tp_ranks else None)
                )
        for place in self._places:
            if place.is_expert_source:
                sources.append(
                    Source(place.rank, self._buckets(wire, experts=True) if self._ranks.rank in place.etp_ranks else None)
                )
        return sources

    def _buckets(self, wire: WireFormat, *, experts: bool) -> Iterator[WeightBucket]:
        groups = export_weights(self._model, self._table, self._ranks, gather_to_source=False, experts=experts)
        encoded = (wire.encode_group(group) for group in groups if group)
        return fill_buckets(encoded, limit_bytes=self._limit_bytes)

    def _posts(self, target: EngineTarget) -> bool:
        poster = target.sharing_ranks[0] if target.sharing_ranks else 0
        return self._ranks.rank == poster

    def _open_groups(self, targets: Sequence[EngineTarget]) -> None:
        """A gloo group per engine that several ranks share, opened by all ranks in the same order."""
        for target in targets:
            if len(target.sharing_ranks) > 1 and target.sharing_ranks not in self._sharing_groups:
                self._sharing_groups[target.sharing_ranks] = dist.new_group(list(target.sharing_ranks), backend="gloo")

    def _deliver(self, bucket: WeightBucket, target: EngineTarget, post: _Post | None) -> None:
        """Each sharing rank gives the handle of its own copy; one of them posts all handles in the engine's rank order."""
        if not target.sharing_ranks:
            if post is not None:
                # On the way to other devices only bytes make sense: a handle would name memory that they cannot open.
                payload = bucket_payload(WeightBucket(bucket.metas, bucket.flat.cpu()), HostDevice())
                post([payload] * target.num_ranks)
            return
        if self._ranks.rank not in target.sharing_ranks:
            return
        payloads: list[bytes] = [bucket_payload(bucket, self._device)]
        if len(target.sharing_ranks) > 1:
            gathered: list | None = [None] * len(target.sharing_ranks) if post is not None else None
            group = self._sharing_groups[target.sharing_ranks]
            dist.gather_object(payloads[0], gathered, dst=target.sharing_ranks[0], group=group)
            payloads = gathered or []
        if post is not None:
            post(payloads)
        if len(target.sharing_ranks) > 1:
            # The other ranks' buffers are mapped into the engine until it has answered.
            dist.barrier(group=self._sharing_groups[target.sharing_ranks])


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
