"""What a real engine serves after a sync equals what the trainer sent; one wrong value in one tensor is found."""

import asyncio

import pytest
import torch
from engine.engines import TOKEN, make_checkpoint, payload, spec
from model.parity import build
from ranks import run_ranks

from slime.device.host import HostDevice
from slime.engine.client import EngineClient
from slime.engine.process import EngineProcess
from slime.model.hf_config import read_hf_config
from slime.model.hf_io import SafetensorsReader
from slime.model.names import NameTable
from slime.ray.train_actor import EngineTarget
from slime.ray.weight_stream import WeightStream
from slime.weights.quantize import WireFormat

pytestmark = pytest.mark.slow

CORRUPTED = "model.layers.5.mlp.experts.3.down_proj.weight"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(url of an engine that serves the seed-1 model, checkpoint folder of a seed-2 model)."""
    folder = tmp_path_factory.mktemp("read_back")
    engine = EngineProcess(
        spec("regular", 0, make_checkpoint("cpu", folder / "served", seed=1) / "fp8", max_total_tokens=2048),
        device_kind="host",
        token=TOKEN,
        log_path=folder / "engine.log",
    )
    trained = make_checkpoint("cpu", folder / "trained", seed=2)
    try:
        engine.start()
        engine.wait_ready()
        yield engine.url, trained
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


def test_what_the_engine_serves_equals_what_was_sent_and_one_flipped_value_is_named(served):
    url, trained = served
    target = EngineTarget("default-regular-0", url, TOKEN, (), 1)
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
                stream.send(version, [target])
                asyncio.run(call("pause_generation"))
                asyncio.run(call("begin_weight_update", version))
            report = stream.send(version, [target])
            if version == 2:
                asyncio.run(call("update_weights_from_tensor", [payload(flipped)]))
            asyncio.run(call("end_weight_update", version))
            try:
                lines += [found.line for found in stream.check(version, [target]) if found.complete]
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
