"""While a round is on its way, the next one is made, and what an engine has not answered for stays as it is.

Real trainer ranks, receivers and models; whoever must wait for another's step waits for a file, so that no wrong order ends."""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
import threading
import time
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from model.parity import build
from ranks import run_ranks

from slime.compat.joint_group import give_up, joint_group
from slime.config.stages import Cut, cut_layers
from slime.device.host import HostDevice
from slime.model.build import padded_vocab_size
from slime.model.hf_config import read_hf_config
from slime.model.hf_io import SafetensorsReader
from slime.model.names import NameTable
from slime.model.placement import Grid
from slime.ray import weight_stream
from slime.ray.destinations import Destinations, EngineTarget
from slime.ray.engine_feed import EngineFeed
from slime.ray.weight_stream import WeightStream
from slime.types.weight_bucket import WeightBucket
from slime.weights import execute
from slime.weights.buckets import unpack_bucket
from slime.weights.execute import Execution
from slime.weights.parts import TrainedParts
from slime.weights.plan import Receiver, SyncPlan, Trainer, plan_sync
from slime.weights.quantize import WireFormat

pytestmark = pytest.mark.slow

TRAINERS, LIMIT = 2, 400_000
WAIT = timedelta(seconds=60)


class Watched(Execution):
    """Notes in a folder which rounds it begins to make. May fail at one."""

    folder: Path
    fails_at = -1

    def make(self, number: int) -> execute.Round:
        for begun in (number, *([number + 1] if number + 1 == self.plan.rounds else [])):  # behind the last one nothing is made
            (self.folder / f"making-{self.rank}-{begun}").touch()
        if number == self.fails_at:
            raise ValueError(f"round {number} cannot be made")
        return super().make(number)


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + WAIT.total_seconds()
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, f"none of it within {WAIT}: {[file.name for file in files if not file.exists()]}"
        time.sleep(0.005)


def digests(bucket: WeightBucket) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in unpack_bucket(bucket)}


def digest(tensor: torch.Tensor) -> str:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"


def wanted(pair: Path) -> dict[str, str]:
    hf, reader, found = read_hf_config(str(pair / "fp8")), SafetensorsReader(str(pair / "bf16")), {}
    form = WireFormat.of_checkpoint(hf)
    for entry in NameTable.for_model(hf, with_mtp=False).entries:
        for tensor in entry.hf:
            found |= {name: digest(value) for name, value in form.encode(tensor.name, reader.read(tensor, torch.float32))}
    return found


# ------------------------------------------------------------- to receivers


def apart(rank: int, pair: Path, folder: Path, waits: bool, tp: int, fails: int | None) -> tuple[dict[str, str], int, str]:
    """Trainer ranks 0 and 1, a receiver behind them: (what it got, rounds, the error that ended this process's part)."""
    trains = rank < TRAINERS
    dist.barrier()
    dist.destroy_process_group()
    place = {"rank": rank, "world_size": TRAINERS} if trains else {"rank": 0, "world_size": 1}
    dist.init_process_group("gloo", init_method=f"file://{folder}/{'trainers' if trains else 'receiver'}", **place)
    group = joint_group(
        dist.FileStore(f"{folder}/joint", 3), name="joint", rank=rank, world=3, backend="gloo", timeout=WAIT
    )  # fmt: skip
    plan, parts = _plan_and_parts(rank, pair, tp)
    execution = Watched(plan, [0, 1, 2], rank, torch.device("cpu"), parts, group)
    execution.folder, execution.fails_at = folder, 2 if rank == fails else -1
    held: dict[str, str] = {}
    error = ""
    try:
        for number in range(plan.rounds):
            if not trains and waits and number + 1 < plan.rounds:
                wait_for(*(folder / f"making-{one}-{number + 1}" for one in range(TRAINERS)))
            for bucket in execution.round(number).values():
                held |= digests(bucket)
    except (RuntimeError, ValueError) as failed:
        error = f"{type(failed).__name__}: {failed}"
        del execution
        give_up(group, failed)
    return held, plan.rounds, error


def _plan_and_parts(rank: int, pair: Path, tp: int) -> tuple[SyncPlan, TrainedParts | None]:
    serving, parts = read_hf_config(str(pair / "fp8")), None
    trainer = Trainer(Grid(TRAINERS, tp, 1, 1, 2, 1), tuple(cut_layers(Cut(serving.num_layers, 1))), padded_vocab=320)
    if rank < TRAINERS:
        chunks, ranks, hf, config = build(rank, TRAINERS, str(pair / "bf16"), tp=tp, ep=2)
        assert padded_vocab_size(config, hf) == trainer.padded_vocab
        parts = TrainedParts(chunks, NameTable.for_model(serving), ranks, block=128)
    receiver = Receiver(0, (2,), 1)
    plan = plan_sync(NameTable.for_model(serving), serving, trainer, [receiver], nodes=(0, 0, 0), limit_bytes=LIMIT)
    assert any(lane.gathered for lane in plan.lanes) is (tp > 1), "ranks gather for one round while another flies"
    return plan, parts


def test_trainer_ranks_make_a_round_while_the_one_before_travels_to_a_receiver(tiny_pair, tmp_path):
    """The receiver takes a round in when both ranks have begun to make the next one."""
    *_, (held, rounds, error) = run_ranks(TRAINERS + 1, apart, tiny_pair, tmp_path, True, 2, None)
    assert (held, error) == (wanted(tiny_pair), "") and rounds > 3


@pytest.mark.parametrize(("fails", "tp"), [(0, 1), (2, 2)], ids=["making it", "taking it in"])
def test_who_fails_while_a_round_flies_is_heard_of_by_all(tiny_pair, tmp_path, fails, tp):
    """One error of a kind of its own; the others' connections end. Nobody waits for the third round."""
    found = run_ranks(TRAINERS + 1, apart, tiny_pair, tmp_path, False, tp, fails)
    errors = [error for _, _, error in found]
    assert errors.pop(fails) == "ValueError: round 2 cannot be made"
    assert all(error.startswith("RuntimeError: ") for error in errors), errors
    assert found[TRAINERS][0].items() <= wanted(tiny_pair).items(), "nothing was spoiled on the way"


# ------------------------------------------------------------- to an engine on the trainer's devices


class SlowEngine:
    """Answers for a bucket when both ranks have begun to make the next."""

    def __init__(self, folder: Path):
        self.posts = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                for text in body["serialized_named_tensors"]:
                    pickle.loads(base64.b64decode(text))
                outer.posts += 1
                wait_for(*(folder / f"making-{rank}-{outer.posts}" for rank in range(TRAINERS)))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps({"success": True}).encode())

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()


class Held(EngineFeed):
    """What was delivered is the same when the engine has answered."""

    def deliver(self, buckets):
        super().deliver(buckets)
        self.delivered = [(bucket.flat, digest(bucket.flat)) for bucket in buckets.values()]

    def finish(self):
        super().finish()
        delivered, self.delivered = getattr(self, "delivered", []), []
        assert all(digest(flat) == before for flat, before in delivered)


def test_a_round_is_made_while_an_engine_loads_the_one_before_which_stays_as_it_is(tiny_pair, tmp_path, monkeypatch):
    engine = SlowEngine(tmp_path)
    to = Destinations((EngineTarget("e", engine.url, "secret", Receiver(0, (0, 1), 2)),), (0, 0))
    Watched.folder = tmp_path
    monkeypatch.setattr(weight_stream, "Execution", Watched)
    monkeypatch.setattr(weight_stream, "EngineFeed", Held)

    def send(rank: int) -> int:
        chunks, ranks, _, _ = build(rank, TRAINERS, str(tiny_pair / "bf16"), tp=2, ep=2)
        stream = WeightStream(chunks, read_hf_config(str(tiny_pair / "fp8")), ranks, HostDevice(), limit_bytes=LIMIT)
        return stream.send(1, to).buckets

    assert run_ranks(TRAINERS, send) == [engine.posts] * TRAINERS and engine.posts > 3
