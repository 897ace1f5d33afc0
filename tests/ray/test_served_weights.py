"""What a real engine serves after a sync equals what the trainer sent; one wrong value in one tensor is found."""

import asyncio
from pathlib import Path

import pytest
import torch
from engine.engines import TOKEN, make_checkpoint, payload, spec
from model.parity import build
from ranks import run_ranks

from slime.config.cluster import EngineConfig
from slime.device.host import HostDevice
from slime.engine.client import EngineClient, sync
from slime.engine.process import EngineProcess
from slime.model.hf_config import read_hf_config
from slime.model.hf_io import SafetensorsReader
from slime.model.names import NameTable
from slime.ray.destinations import Destinations, EngineTarget
from slime.ray.weight_files import WeightFiles
from slime.ray.weight_stream import WeightStream
from slime.weights.plan import Receiver
from slime.weights.protocol import StreamReport
from slime.weights.published import LocalCopy, wrong_tensors
from slime.weights.quantize import WireFormat

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
