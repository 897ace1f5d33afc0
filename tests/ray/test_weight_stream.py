"""The weight stream of real trainer ranks into HTTP servers that only unpack what arrives."""

import base64
import json
import pickle
import threading
import time
from collections import defaultdict
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from model.parity import build
from ranks import run_ranks

from slime.device.host import HostDevice
from slime.model.hf_config import read_hf_config
from slime.model.hf_io import SafetensorsReader
from slime.model.names import NameTable
from slime.ray.destinations import Destinations, EngineTarget
from slime.ray.weight_stream import WeightStream
from slime.weights.plan import Receiver
from slime.weights.quantize import WireFormat

pytestmark = pytest.mark.slow


class RecordingEngine:
    """Keeps every tensor that is posted, per rank of the engine; refuses a request without the token."""

    def __init__(self):
        outer = self
        self.ranks: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        self.repeated: list[str] = []
        self.posts, self.breaks_at = 0, 0

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.posts += 1
                if outer.posts == outer.breaks_at:
                    self.close_connection = True
                    return
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                allowed = self.headers["Authorization"] == "Bearer secret"
                for rank, text in enumerate(body["serialized_named_tensors"] if allowed else []):
                    outer._keep(rank, pickle.loads(base64.b64decode(text)))
                answer = json.dumps({"success": allowed}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def _keep(self, rank: int, payload: dict) -> None:
        for meta in payload["metadata"]:
            raw = payload["flattened_tensor"][meta.start_idx : meta.end_idx]
            if meta.name in self.ranks[rank]:
                self.repeated.append(meta.name)
            self.ranks[rank][meta.name] = raw.view(meta.dtype).view(meta.shape).clone()


EXPERTS = 8


def wanted(pair, rank: int, receiver: Receiver, *, mtp: bool) -> dict[str, torch.Tensor]:
    """What a rank of an engine must get, made of the whole tensors of the checkpoint."""
    hf, reader = read_hf_config(str(pair / "fp8")), SafetensorsReader(str(pair / "bf16"))
    wire, expected, share = WireFormat.of_checkpoint(hf), {}, EXPERTS // receiver.ep
    for entry in NameTable.for_model(hf, with_mtp=mtp and receiver.drafts).entries:
        if entry.expert is None or entry.expert // share == rank * receiver.ep // receiver.tp:
            for tensor in entry.hf:
                expected.update(wire.encode(tensor.name, reader.read(tensor, torch.float32)))
    return expected


@pytest.mark.parametrize(
    "layout",
    [{"tp": 2, "pp": 2, "first": 6, "ep": 2, "mtp": True}, {"pp": 2, "vpp": 2, "ep": 2, "send_indices": True}],
    ids=["tp2 pp2 ep2, mtp", "pp2 vpp2 ep2 dp2"],
)
def test_every_rank_of_every_engine_gets_what_it_serves_once_and_bit_for_bit(tiny_pair, layout):
    bf16, fp8, mtp = str(tiny_pair / "bf16"), str(tiny_pair / "fp8"), layout.get("mtp", False)
    # Engines over the devices of ranks 0 and 1, over that of rank 2, and one that shares rank 3's and has another.
    receivers = [Receiver(0, (0, 1), 2, ep=2, drafts=True), Receiver(1, (2,), 1), Receiver(2, (3, 4), 2, ep=2, drafts=True)]
    engines = [RecordingEngine() for _ in receivers]
    to = Destinations(
        tuple(EngineTarget(f"e{i}", engines[i].url, "secret", receiver) for i, receiver in enumerate(receivers)),
        (0, 0, 1, 1, 1),
    )

    def send(rank: int) -> tuple[int, int, str]:
        chunks, ranks, _, _ = build(rank, 4, bf16, **layout)
        stream = WeightStream(chunks, read_hf_config(fp8), ranks, HostDevice(), limit_bytes=200_000, with_mtp=mtp)
        started = time.monotonic()
        report = stream.send(1, to)
        spent, elapsed = asdict(report.seconds), time.monotonic() - started
        assert min(spent.values()) > 0 and sum(spent.values()) < elapsed, "each second counts once"
        return report.buckets, report.tensors, report.digest

    reports = run_ranks(4, send)
    assert len(set(reports)) == 1 and reports[0][0] > 5, "several buckets"
    assert reports[0][1] == len(wanted(tiny_pair, 0, Receiver(0, (0,), 1, drafts=True), mtp=mtp))
    for engine, receiver in zip(engines, receivers, strict=True):
        assert engine.repeated == [] and sorted(engine.ranks) == list(range(receiver.tp))
        for rank, received in engine.ranks.items():
            expected = wanted(tiny_pair, rank, receiver, mtp=mtp)
            assert set(received) == set(expected)
            for name, tensor in expected.items():
                assert received[name].dtype == tensor.dtype, name
                assert torch.equal(received[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def test_an_engine_that_is_lost_is_named_and_the_others_get_everything(tiny_pair):
    """Two ranks share it: the one that does not post must not wait for the other for ever."""
    bf16, hf = str(tiny_pair / "bf16"), read_hf_config(str(tiny_pair / "fp8"))
    engines = [RecordingEngine() for _ in range(2)]
    engines[0].breaks_at = 3  # and is there again for the second time
    to = Destinations(
        (
            EngineTarget("decode-0", engines[0].url, "secret", Receiver(0, (0, 1), 2)),
            EngineTarget("decode-1", engines[1].url, "secret", Receiver(1, (2,), 1)),
        ),
        (0, 0, 0, 0),
    )

    def send_twice(rank: int) -> list[tuple[int, tuple[str, ...]]]:
        chunks, ranks, _, _ = build(rank, 4, bf16, tp=2)
        stream = WeightStream(chunks, hf, ranks, HostDevice(), limit_bytes=200_000)
        return [(report.buckets, report.lost) for report in (stream.send(1, to), stream.send(1, to))]

    (first, second), *others = run_ranks(4, send_twice)
    assert all(other[0] == (first[0], ()) for other in others) and first[0] > 5
    (line,) = first[1]
    assert line.startswith(f"decode-0: POST {engines[0].url}/update_weights_from_tensor: ") and "gone" in line
    assert second == (first[0], ())
    assert engines[0].posts == 3 + second[0], "nothing is posted to it after the first failure"
    assert set(engines[1].ranks[0]) == set(engines[0].ranks[0]) and len(engines[1].ranks[0]) > 100


def test_an_engine_elsewhere_that_is_not_there_is_named_and_the_others_get_everything(tiny_pair):
    """Nobody joins a group that can never be whole."""
    hf, there = read_hf_config(str(tiny_pair / "fp8")), RecordingEngine()
    to = Destinations(
        (
            EngineTarget("decode-0", there.url, "secret", Receiver(0, (0,), 1)),
            EngineTarget("decode-1", "http://127.0.0.1:1", "secret", Receiver(1, (1,), 1)),
        ),
        (0, 0),
    )

    def send(rank: int) -> tuple[str, ...]:
        chunks, ranks, _, _ = build(rank, 1, str(tiny_pair / "bf16"))
        return WeightStream(chunks, hf, ranks, HostDevice(), limit_bytes=200_000).send(1, to).lost

    [(line,)] = run_ranks(1, send)
    assert line.startswith("decode-1: GET http://127.0.0.1:1/server_info: ") and "gone" in line
    assert set(there.ranks[0]) == set(wanted(tiny_pair, 0, Receiver(0, (0,), 1), mtp=False))
