"""Who dies amid a transfer to receivers is named, and nobody waits for ever: real actors and gloo, a model on its way."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
from by_hand import by_hand

from slime.engine.client import EngineError, EngineGone
from slime.ray.calls import gather
from slime.ray.destinations import Destinations, EngineTarget
from slime.ray.engine_broadcast import lost_of
from slime.ray.weight_receivers import WeightReceiver
from slime.weights.plan import Receiver

pytestmark = pytest.mark.slow
LIMIT = 300.0
"""Seconds; who waits for a peer has 30 minutes otherwise."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@ray.remote(num_cpus=0)
class Trainer:
    """The one rank of a trainer."""

    def send(self, pair: str, to: Destinations) -> tuple[str, ...]:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        import torch.distributed as dist
        from model.parity import build

        from slime.device.host import HostDevice
        from slime.model.hf_config import read_hf_config
        from slime.ray.weight_stream import WeightStream

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        chunks, ranks, _, _ = build(0, 1, f"{pair}/bf16")
        hf = read_hf_config(f"{pair}/fp8")
        return WeightStream(chunks, hf, ranks, HostDevice(), limit_bytes=200_000).send(1, to).lost


class Engine:
    """Takes all that is posted; with its third bucket something happens."""

    def __init__(self):
        outer, self.then, self.posts = self, lambda: None, 0

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                outer.posts += 1
                if outer.posts == 3:
                    outer.then()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b'{"success": true}')

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def started(cluster, tiny_pair, tmp_path) -> Iterator[tuple[Callable[[], Exception | dict], Engine, dict[str, int], list]]:
    """(sends and gives what came of it, the engine, pids by name, the receivers)"""
    engine, trainer = Engine(), Trainer.remote()
    receivers = [WeightReceiver.options(num_cpus=0).remote(f"receiver-{number}", 0, tmp_path) for number in range(2)]
    actors = {"trainer rank 0": trainer} | {f"receiver {number}": one for number, one in enumerate(receivers)}
    asked = {name: actor.__ray_call__.remote(lambda self: os.getpid()) for name, actor in actors.items()}
    target = EngineTarget("decode-0", engine.url, "secret", Receiver(0, (1, 2), 2), receivers=tuple(receivers))
    to = Destinations((target,), (0, 0, 0))

    def send() -> Exception | dict:
        try:
            return gather(
                {"trainer rank 0": trainer.send.remote(str(tiny_pair), to)}, doing="sending weights v1", timeout=LIMIT
            )
        except RuntimeError as error:
            return error

    yield send, engine, {name: ray.get(ref) for name, ref in asked.items()}, receivers
    for actor in (trainer, *receivers):
        ray.kill(actor)
    engine.server.shutdown()


def test_a_receiver_that_is_killed_is_named_with_its_process(started):
    # The other receiver gives up and lives: the trainer, which waits for it, hears that it has left the group.
    send, engine, pids, _ = started
    engine.then = lambda: os.kill(pids["receiver 1"], signal.SIGKILL)
    said = str(send())
    assert f"receiver 1 of engine decode-0 (pid {pids['receiver 1']} on " in said and "while receiving weights" in said, said
    assert "did not answer" not in said and 3 <= engine.posts <= 4


@by_hand("a minute")
def test_a_trainer_rank_that_is_killed_is_named_and_the_receivers_are_free_again(started):
    send, engine, pids, receivers = started
    engine.then = lambda: os.kill(pids["trainer rank 0"], signal.SIGKILL)
    said = str(send())
    assert said.startswith("trainer rank 0 ") and "died" in said and "while sending weights v1" in said, said
    # An actor does one thing after another: it answers once its part of the sync has ended.
    assert ray.get([one.__ray_call__.remote(lambda self: "here") for one in receivers], timeout=LIMIT) == ["here"] * 2


def test_engines_that_do_not_come_back_from_a_broken_broadcast_are_named_after_a_bounded_wait():
    """As over NCCL; gloo's engines hear of it at once, and one that refused for that is not lost."""
    calls: list[Future] = [Future() for _ in range(4)]
    calls[0].set_exception(EngineGone("POST /update: ConnectError"))
    calls[1].set_exception(EngineError("connection closed by peer", 400))
    calls[3].set_result(None)
    engines = [EngineTarget(f"decode-{number}", "", "", Receiver(number, (number,), 1)) for number in range(4)]
    assert lost_of(engines, calls, 0.2) == [
        "decode-0: POST /update: ConnectError",
        "decode-2: no answer within 0 s since another engine of its group was gone",
    ]
