"""An actor that is the one rank of a trainer and sends its weights, and a fault for a receiver of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import ray


@ray.remote(num_cpus=0)
class OneTrainer:
    def __init__(self, pair: str, peer_seconds: float = 1800.0):
        """pair: folder with bf16/ and fp8/ of one model. peer_seconds: as of WeightStream."""
        sys.path.insert(0, str(Path(__file__).parent))
        import torch.distributed as dist
        from model.parity import build

        from slime.device.host import HostDevice
        from slime.model.hf_config import read_hf_config
        from slime.ray.weight_stream import WeightStream

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        chunks, ranks, _, _ = build(0, 1, f"{pair}/bf16")
        told = {"limit_bytes": 200_000, "read_back": True, "peer_seconds": peer_seconds}
        self._stream = WeightStream(chunks, read_hf_config(f"{pair}/fp8"), ranks, HostDevice(), **told)

    def process(self):
        """-> Process"""
        from slime.ray.fates import this_process

        return this_process()

    def send(self, version: int, to):
        """-> StreamReport"""
        return self._stream.send(version, to)

    def check(self, version: int, to):
        """-> [ReadBack]"""
        return self._stream.check(version, to)


def spoil_next(name: str) -> Callable[[object], None]:
    """For a receiver's process: the next tensor of this name has one bit turned between its arrival and the engine."""

    def spoil(receiver: object) -> None:
        from slime.ray.engine_feed import EngineFeed

        deliver = EngineFeed.deliver

        def spoiled(self, buckets) -> None:
            for bucket in buckets.values():
                for meta in bucket.metas:
                    if meta.name == name:
                        bucket.flat[meta.start + 7] ^= 0x80
                        EngineFeed.deliver = deliver
            deliver(self, buckets)

        EngineFeed.deliver = spoiled

    return spoil
