"""What a real engine serves after a sync equals what the trainer sent; one wrong value in one tensor is found. Who dies amid a
transfer to receivers is named, and nobody waits for ever: real actors and gloo, a model on its way."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import torch
from by_hand import by_hand
from engine.engines import TOKEN, make_checkpoint, payload, spec
from model.parity import build
from one_trainer import OneTrainer, spoil_next
from ranks import run_ranks
from recording_engine import RecordingEngine

from slime.config.cluster import EngineConfig
from slime.device.host import HostDevice
from slime.engine.client import EngineClient, EngineError, EngineGone, sync
from slime.engine.process import EngineProcess
from slime.model.hf_config import read_hf_config
from slime.model.hf_io import SafetensorsReader
from slime.model.names import NameTable
from slime.ray import calls
from slime.ray.calls import gather
from slime.ray.destinations import Beside, Destinations, EngineTarget, by_name, receivers_of
from slime.ray.engine_broadcast import lost_of
from slime.ray.fates import Process, end
from slime.ray.standstill import Patience
from slime.ray.weight_files import WeightFiles
from slime.ray.weight_receivers import WeightReceiver, with_processes
from slime.ray.weight_stream import WeightStream
from slime.weights.plan import Receiver
from slime.weights.protocol import StreamReport, sync_weights
from slime.weights.published import LocalCopy, wrong_tensors
from slime.weights.quantize import WireFormat
from tools.bench.one_engine import OneEngine

pytestmark = pytest.mark.slow

CORRUPTED = "model.layers.5.mlp.experts.3.down_proj.weight"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(url of an engine that serves the seed-1 model, that model's checkpoint, checkpoint folder of a seed-2 model)."""
    folder = tmp_path_factory.mktemp("read_back")
    serving = make_checkpoint("cpu", folder / "served", seed=1) / "fp8"
    engine = EngineProcess(
        spec("regular", 0, serving, max_total_tokens=2048),
        device_kind="host",
        token=TOKEN,
        log_path=folder / "engine.log",
    )
    trained = make_checkpoint("cpu", folder / "trained", seed=2)
    try:
        engine.start()
        engine.wait_ready()
        yield engine.url, serving, trained
    finally:
        engine.stop()


def one_value_flipped(trained) -> list[tuple[str, torch.Tensor]]:
    """The corrupted tensor as it travels, the sign bit of its code at [2, 5] turned."""
    hf = read_hf_config(str(trained / "fp8"))
    (tensor,) = [tensor for tensor in NameTable.for_model(hf).hf_tensors() if tensor.name == CORRUPTED]
    value = SafetensorsReader(str(trained / "bf16")).read(tensor, torch.float32)
    wire = list(WireFormat.of_checkpoint(hf).encode(CORRUPTED, value))
    wire[0][1].view(torch.uint8)[2, 5] ^= 0x80
    return wire


@pytest.mark.parametrize("gpu", [0, 1], ids=["in the request, on the rank's device", "by a broadcast, elsewhere"])
def test_what_the_engine_serves_equals_what_was_sent_and_one_flipped_value_is_named(served, gpu):
    url, _, trained = served
    to = Destinations((EngineTarget("default-regular-0", url, TOKEN, Receiver(0, (gpu,), 1)),), (0, 0))
    flipped = one_value_flipped(trained)

    async def call(method: str, *args) -> None:
        client = EngineClient(url, TOKEN)
        await getattr(client, method)(*args)
        await client.close()

    def send_and_check(rank: int) -> tuple[int, list[str], str]:
        chunks, ranks, _, _ = build(rank, 1, str(trained / "bf16"))
        hf = read_hf_config(str(trained / "fp8"))
        stream = WeightStream(chunks, hf, ranks, HostDevice(), limit_bytes=200_000, read_back=True)
        asyncio.run(call("pause_generation"))
        lines, error = [], ""
        for version in (1, 2, 3):
            asyncio.run(call("begin_weight_update", version))
            if version == 3:  # broken off, as when another engine dies: the whole order again
                stream.send(version, to)
                asyncio.run(call("pause_generation"))
                asyncio.run(call("begin_weight_update", version))
            report = stream.send(version, to)
            if version == 2:
                asyncio.run(call("update_weights_from_tensor", [payload(flipped)]))
            asyncio.run(call("end_weight_update", version))
            try:
                lines += [found.line for found in stream.check(version, to) if found.complete]
            except RuntimeError as found:
                error = str(found)
        return report.tensors, lines, error

    ((wire_tensors, lines, error),) = run_ranks(1, send_and_check, timeout=240)
    hf = read_hf_config(str(trained / "fp8"))
    weights = len(list(NameTable.for_model(hf, with_mtp=False).hf_tensors()))
    assert wire_tensors > weights, "scales travel too"
    assert lines == [f"weights v{v}: {weights} of {weights} tensors read back equal from default-regular-0" for v in (1, 3)]
    codes, scale = (tensor for _, tensor in flipped)
    gap = 2 * abs(codes[2, 5].float() * scale[0, 0]).item()
    assert gap > 0
    assert f"weights v2 as they were sent: 1 of {weights} tensors differ: {CORRUPTED} (largest difference {gap:.6g});" in error
    assert error.startswith("default-regular-0 ")


def test_published_versions_whole_and_as_differences_give_the_engine_what_a_stream_does(served, tmp_path):
    """Two ranks write; the engine holds anything before it loads."""
    url, serving, trained = served
    client = EngineClient(url, TOKEN)
    hf, to = read_hf_config(str(serving)), Destinations((EngineTarget("e", url, TOKEN, Receiver(0, (0,), 1)),), (0, 0))

    def stream(rank: int) -> None:
        chunks, ranks, _, _ = build(rank, 2, str(trained / "bf16"), tp=2)
        WeightStream(chunks, hf, ranks, HostDevice(), limit_bytes=1 << 20).send(1, to)

    def publish(rank: int, mode: str) -> StreamReport:
        chunks, ranks, _, _ = build(rank, 2, str(trained / "bf16"), tp=2)
        options = EngineConfig(
            update_weight_transport="disk", update_weight_mode=mode, update_weight_disk_dir=str(tmp_path / mode)
        )
        told: list[tuple[bool, tuple[str, ...]]] = []

        def hook(folder: str, engines: tuple[EngineTarget, ...]) -> None:
            told.append(((Path(folder) / "version.json").is_file(), tuple(engine.name for engine in engines)))
            if rank == 1 and len(told) == 1:
                raise KeyError("upload")

        files = WeightFiles(chunks, hf, ranks, options, origin=str(serving), with_mtp=False, post_write=hook)
        with pytest.raises(RuntimeError, match=r"--custom-update-weight-post-write-path failed: rank 1: KeyError: 'upload'"):
            files.publish(1, to.engines)
        report = files.publish(1, to.engines)
        assert files.publish(1, to.engines) is report, "what is sent again has not changed"
        assert told == [(True, ("e",))] * 2, "when it is whole, and again after a failure"
        return report

    def holding(load) -> list[dict[str, str]]:
        sync(client.call("POST", "/weights_checker", {"action": "reset_tensors"}, timeout=60))
        sync(client.begin_weight_update(1))
        load()
        sync(client.end_weight_update(1))
        return sync(client.weights_checksums())

    sync(client.pause_generation())
    streamed = holding(lambda: run_ranks(2, stream))
    whole, other = run_ranks(2, publish, "full")
    assert whole == other and whole.tensors > 400 and wrong_tensors(whole.published) == []
    assert holding(lambda: sync(client.update_weights_from_disk(whole.published))) == streamed
    changes, _ = run_ranks(2, publish, "delta")
    copy = LocalCopy(tmp_path / "local", origin=serving)
    assert copy.follow(tmp_path / "delta", 1) == [1] and changes.tensors == whole.tensors and 0 < changes.nbytes
    assert holding(lambda: sync(client.update_weights_from_disk(str(copy.folder)))) == streamed
    sync(client.continue_generation())


# ---------------------------------------------------------------------- receivers

LIMIT = 300.0
"""Seconds; who waits for a peer has 30 minutes otherwise."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@dataclass(frozen=True)
class Actors:
    """A trainer of one rank, and two receivers."""

    trainer: ray.actor.ActorHandle
    rank: Process
    receivers: tuple[Beside, ...]

    @staticmethod
    def start(pair: Path, logs: Path, *, peer_seconds: float = 1800.0) -> Actors:
        trainer = OneTrainer.remote(str(pair), peer_seconds)
        receivers = [WeightReceiver.options(num_cpus=0).remote(f"receiver-{number}", 0, logs) for number in range(2)]
        return Actors(trainer, ray.get(trainer.process.remote()), with_processes({"e": receivers})["e"])

    def to(self, name: str, url: str, token: str, size: int) -> Destinations:
        """An engine of so many ranks, each with a receiver."""
        gpus = tuple(range(1, 1 + size))
        engine = EngineTarget(name, url, token, Receiver(0, gpus, size), receivers=self.receivers[:size])
        return Destinations((engine,), (0,) * (1 + size))

    def send(self, url: str) -> Exception | dict:
        """What came of a sync to an engine of two ranks."""
        to = self.to("decode-0", url, "secret", 2)
        told = {"processes": {"trainer rank 0": self.rank}, "timeout": LIMIT}
        told["beside"] = {name: one.process for name, one in receivers_of(to.engines).items()}
        try:
            return gather({"trainer rank 0": self.trainer.send.remote(1, to)}, doing="sending weights v1", **told)
        except RuntimeError as error:
            return error

    def stop(self) -> None:
        for actor in (self.trainer, *(one.actor for one in self.receivers)):
            ray.kill(actor)
        end({str(number): one.process for number, one in enumerate(self.receivers)})  # a stopped one does not hear Ray


@pytest.fixture(scope="module")
def actors(cluster, served, tmp_path_factory) -> Iterator[Actors]:
    found = Actors.start(served[2], tmp_path_factory.mktemp("receivers"))
    yield found
    found.stop()


class Sending:
    """The trainer's side of it."""

    def __init__(self, trainer: ray.actor.ActorHandle, to: Destinations):
        self._trainer, self._to = trainer, to

    def stream(self, version: int) -> StreamReport:
        return ray.get(self._trainer.send.remote(version, self._to))

    def check(self, version: int) -> list[str]:
        return [found.engine for found in ray.get(self._trainer.check.remote(version, self._to)) if not found.complete]


def test_one_value_that_turns_in_a_receiver_is_named(served, actors):
    url, name = served[0], "default-regular-0"
    sides = OneEngine(name, url, TOKEN), Sending(actors.trainer, actors.to(name, url, TOKEN, 1))
    sync_weights(*sides, version=1, read_back=True)
    ray.get(actors.receivers[0].actor.__ray_call__.remote(spoil_next(CORRUPTED)))
    named = r"1 of \d+ parameters changed when all were sent once more: model\.layers\.5\.mlp\.down \(rank 0\);"
    with pytest.raises(RuntimeError, match=rf"^{name} does not hold weights v2 as they were sent: {named}"):
        sync_weights(*sides, version=2, read_back=True)


@pytest.fixture
def recording() -> Iterator[RecordingEngine]:
    engine = RecordingEngine()
    yield engine
    engine.close()


def test_a_receiver_that_is_killed_is_named_with_its_process(actors, recording):
    # The other receiver gives up and lives: the trainer, which waits for it, hears that it has left the group.
    victim = actors.receivers[1].process
    recording.then = lambda: os.kill(victim.pid, signal.SIGKILL)
    said = str(actors.send(recording.url))
    assert f"receiver 1 of engine decode-0 ({victim}) was killed" in said and "while receiving weights" in said, said
    assert "did not answer" not in said and 2 <= len(recording.digests) <= 4


@by_hand("a minute")
def test_a_receiver_that_is_stopped_is_explained_and_ends_the_wait_with_its_name(
    cluster, recording, served, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(calls, "_LOOK_SECONDS", 4.0)
    actors = Actors.start(served[2], tmp_path, peer_seconds=15.0)
    other, victim = (one.process for one in actors.receivers)
    stopped = f"receiver 1 of engine decode-0 ({victim}){{}} is stopped (SIGSTOP, or a debugger; kill -CONT {victim.pid} there"
    hit, patience = threading.Event(), Patience()
    patience.processes |= {"trainer rank 0": actors.rank} | by_name({"decode-0": (other, victim)})

    def stop() -> None:
        os.kill(victim.pid, signal.SIGSTOP)
        hit.set()

    recording.then = stop
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(actors.send, recording.url)
        assert hit.wait(LIMIT)
        report: list[str] = []
        while (
            not (any("round (execute.py:" in line for line in report) and " finish (engine" in str(report)) and not sent.done()
        ):
            report = patience.explain().splitlines()
    said = {line.strip().partition("): ")[0] + ")": line for line in report}
    assert "round (execute.py:" in said[f"trainer rank 0 ({actors.rank})"], report
    # It has its own share, and waits for its neighbour before the engine is told.
    assert " < finish (engine_feed.py:" in said[f"receiver 0 of engine decode-0 ({other})"], report
    assert any(line.strip().startswith(stopped.format(":")) for line in report), report
    compared = [line.strip() for line in report if "has begun on" in line]
    assert compared and all(" of the receivers (ranks 0, 1)" in line and "trainer" not in line for line in compared), compared
    assert any(
        record.getMessage().startswith(f"{stopped.format('')} lets it go on); sending weights v1 has lasted ")
        for record in caplog.records
    )
    ends = " lets it go on), while sending weights v1; trainer rank 0 waited for it:"
    assert str(sent.result()).splitlines()[0] == stopped.format("") + ends, sent.result()
    actors.stop()


@by_hand("a minute")
def test_a_trainer_rank_that_is_killed_is_named_and_the_receivers_are_free_again(cluster, recording, served, tmp_path):
    actors = Actors.start(served[2], tmp_path)
    recording.then = lambda: os.kill(actors.rank.pid, signal.SIGKILL)
    said = str(actors.send(recording.url))
    assert said.startswith(f"trainer rank 0 ({actors.rank}) was killed") and "while sending weights v1" in said, said
    # An actor does one thing after another: it answers once its part of the sync has ended.
    free = [one.actor.__ray_call__.remote(lambda self: "here") for one in actors.receivers]
    assert ray.get(free, timeout=LIMIT) == ["here"] * 2
    actors.stop()


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
