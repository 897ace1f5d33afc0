"""A weight sync of real trainer ranks, without a launch: what each phase of it takes on this machine.

The trainer's ranks build and load a model, export, quantise and send as in a run, also to receivers, which Ray would start.
In the place of an engine stands `taker.py`, or a server of SGLang.
"""

from __future__ import annotations

import json
import pickle
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from slime.config import load
from slime.device import Device, get_device
from slime.model.hf_config import read_hf_config
from slime.model.names import NameTable
from slime.ray.destinations import Destinations, EngineTarget
from slime.ray.engine_feed import EngineFeed
from slime.ray.weight_receivers import hand_on
from slime.weights.digest import plan_size
from slime.weights.execute import Execution
from slime.weights.lanes import Trainer
from slime.weights.plan import Receiver, SyncPlan, plan_sync
from slime.weights.protocol import StreamReport, sync_weights
from slime.weights.quantize import WireFormat
from slime.weights.stopwatch import Stopwatch
from tools.bench.one_engine import OneEngine
from tools.bench.one_rank import loaded_model
from tools.bench.taker import take

if TYPE_CHECKING:
    from slime.ray.weight_stream import WeightStream
    from slime.weights.parts import TrainedParts

WAIT = timedelta(minutes=10)


@dataclass(frozen=True)
class Setup:
    """All that a process of a measurement is told."""

    folder: str
    """Where processes meet and leave their results."""
    bf16: str
    fp8: str
    flags: tuple[str, ...]
    """MODEL_ARGS and the trainer's layout."""
    trainers: int
    engine: int
    """Ranks of the engine on the trainer's devices."""
    apart: int
    """Ranks of the one on devices of its own, behind the trainer's; 0 for none."""
    experts_apart: bool
    limit_bytes: int
    repeats: int
    url: str = ""
    """Of the engine on the trainer's devices, and of the other one."""
    url_apart: str = ""
    token: str = ""
    is_real: bool = False
    """SGLang serves at `url`."""

    def receiver(self, *, apart: bool) -> Receiver:
        first, size = (self.trainers, self.apart) if apart else (0, self.engine)
        ep = size if self.experts_apart else 1
        return Receiver(0, tuple(range(first, first + size)), size, ep=ep, cuts=size > 1, cuts_head=size > 1)

    def target(self, *, apart: bool) -> EngineTarget:
        return EngineTarget("engine", self.url_apart if apart else self.url, self.token, self.receiver(apart=apart))

    def plan(self, trainer: Trainer, *, apart: bool) -> SyncPlan:
        hf, gpus = read_hf_config(self.fp8), self.trainers + (self.apart if apart else 0)
        receivers = [self.receiver(apart=apart)]
        return plan_sync(NameTable.for_model(hf), hf, trainer, receivers, nodes=(0,) * gpus, limit_bytes=self.limit_bytes)


# ---------------------------------------------------------------------- the trainer and the receivers


def run_process(number: int, setup: Setup) -> None:
    """One of the measurement's processes: the trainer's ranks come first, then the receivers. Its results go into a file."""
    device = get_device()
    device.init_process(number)
    results = _Trainer(number, setup, device).results() if number < setup.trainers else _received(number, setup, device)
    dist.barrier()
    Path(setup.folder, f"{number}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


class _Trainer:
    def __init__(self, rank: int, setup: Setup, device: Device):
        from slime.parallel import init_ranks
        from slime.weights.parts import trainer_of

        self._rank, self._setup, self._device = rank, setup, device
        config = load([*setup.flags, "--hf-checkpoint", setup.bf16, "--save", setup.folder], door="convert")
        place = {"rank": rank, "world_size": setup.trainers, "init_method": f"file://{setup.folder}/trainers"}
        self._ranks = init_ranks(config.parallel, device=device, seed=1, **place)
        self._serving = read_hf_config(setup.fp8)
        self._chunks = loaded_model(config, setup.bf16, self._ranks, device)
        self._trainer = trainer_of(self._chunks, self._ranks, mtp=False)

    def results(self) -> dict[str, list]:
        shared = self._shared()
        plan = self._setup.plan(self._trainer, apart=False)
        found = {"shared": shared, "split": [self._split(plan)], "size": [plan_size(plan), plan.rounds, _taken(plan)]}
        return found | (self._apart() if self._setup.apart else {})

    def _shared(self) -> list[dict[str, float]]:
        """Engines on the trainer's devices, as a run feeds them."""
        from slime.ray.weight_stream import WeightStream

        setup = self._setup
        stream = WeightStream(self._chunks, self._serving, self._ranks, self._device, limit_bytes=setup.limit_bytes)
        to = Destinations((setup.target(apart=False),), (0,) * setup.trainers)
        return [self._synced(stream, to, version) for version in range(1, setup.repeats + 2)]

    def _synced(self, stream: WeightStream, to: Destinations, version: int) -> dict[str, float]:
        sending = Sending(stream, to)
        if self._setup.is_real and self._rank == 0:
            report = sync_weights(OneEngine("engine", self._setup.url, self._setup.token), sending, version=version)
            return {"seconds": report.pause_seconds, "engine": report.engine_seconds, **asdict(report.stream.seconds)}
        report = sending.stream(version)
        return {"seconds": sending.seconds, **asdict(report.seconds)}

    def _parts(self, kind: type[TrainedParts]) -> TrainedParts:
        block = WireFormat.of_checkpoint(self._serving).fp8_block or 1
        return kind(self._chunks, NameTable.for_model(self._serving), self._ranks, block=block)

    def _split(self, plan: SyncPlan) -> dict[str, float]:
        """Making all rounds once more, with a wait after each tensor's export and each one's change of format."""
        clock, wait = Stopwatch(), self._device.synchronize
        parts = self._parts(timed_parts(clock, wait))
        execution = Execution(plan, range(len(plan.nodes)), self._rank, self._device.torch_device, parts, wait=wait)
        for number in range(plan.rounds):
            execution.make(number)
            wait()
        return dict(clock.spent)

    def _apart(self) -> dict[str, list]:
        """As `WeightStream` and the receivers' actors do it, without Ray to tell them."""
        from slime.weights.parts import TrainedParts

        setup, device, found = self._setup, self._device, []
        if self._rank == 0:
            Path(setup.folder, "trainer").write_bytes(pickle.dumps(self._trainer))
        group = _joined("apart", self._rank, setup.trainers + setup.apart, setup, device)
        _meet(group, device)
        plan = setup.plan(self._trainer, apart=True)
        homes = range(len(plan.nodes))
        for _ in range(setup.repeats + 1):
            parts = self._parts(TrainedParts)
            execution = Execution(plan, homes, self._rank, device.torch_device, parts, group, device.synchronize)
            _meet(group, device)
            started = time.monotonic()
            for number in range(plan.rounds):
                execution.round(number)
            _meet(group, device)  # the last bucket is loaded
            found.append({"seconds": time.monotonic() - started, **asdict(execution.clock.seconds)})
        plain = _broadcasts(0, plan, setup, device) if self._rank == 0 else []
        _meet(group, device)
        return {"apart": found, "broadcast": plain, "apart size": [plan_size(plan), plan.rounds, _taken(plan)]}


def _received(number: int, setup: Setup, device: Device) -> dict[str, list]:
    """A receiver beside a rank of the engine that has devices of its own."""
    own = number - setup.trainers
    beside = f"file://{setup.folder}/receivers"
    dist.init_process_group("gloo", init_method=beside, rank=own, world_size=setup.apart, timeout=WAIT)
    group = _joined("apart", number, setup.trainers + setup.apart, setup, device)
    _meet(group, device)  # NCCL joins later, when first asked; the file is there by then
    plan = setup.plan(pickle.loads(Path(setup.folder, "trainer").read_bytes()), apart=True)
    local, found = [gpu - setup.trainers for gpu in range(len(plan.nodes))], []
    for _ in range(setup.repeats + 1):
        execution = Execution(plan, range(len(plan.nodes)), number, device.torch_device, None, group, device.synchronize)
        feed = EngineFeed(setup.target(apart=True), local, own, device, None, label="weights", on_its_gpus=True)
        _meet(group, device)
        hand_on(execution, feed)
        _meet(group, device)
        found.append(asdict(execution.clock.seconds))
    _broadcasts(1 + own, plan, setup, device)
    _meet(group, device)
    return {"received": found}


def _broadcasts(rank: int, plan: SyncPlan, setup: Setup, device: Device) -> list[float]:
    """Seconds of a plain broadcast of one copy of the model, from a trainer rank to every rank of the engine, in buffers of the
    same size; nothing is made or loaded."""
    group = _joined("plain", rank, 1 + setup.apart, setup, device)
    nbytes, _ = plan_size(plan)
    buffer = torch.empty(min(setup.limit_bytes, nbytes), dtype=torch.uint8, device=device.torch_device)
    found = []
    for _ in range(setup.repeats + 1):
        _meet(group, device)
        started = time.monotonic()
        for first in range(0, nbytes, len(buffer)):
            dist.broadcast(buffer[: min(len(buffer), nbytes - first)], group=group, group_src=0)
        _meet(group, device)
        found.append(time.monotonic() - started)
    return found


def _joined(name: str, rank: int, world: int, setup: Setup, device: Device) -> dist.ProcessGroup:
    from slime.compat.joint_group import joint_group

    store = dist.FileStore(f"{setup.folder}/{name}", world)
    return joint_group(store, name=name, rank=rank, world=world, backend=device.backend, timeout=WAIT)


def _meet(group: dist.ProcessGroup, device: Device) -> None:
    dist.all_reduce(torch.zeros(1, device=device.torch_device), group=group)
    device.synchronize()


def _taken(plan: SyncPlan) -> int:
    """Most bytes of buckets that one engine rank is handed."""
    gpus = {gpu for lane in plan.lanes for gpu in lane.gpus}
    return max(sum(plan.duties(gpu, number).bucket_bytes for number in range(plan.rounds)) for gpu in gpus)


class Sending:
    """The trainer's side of a sync, on each rank; all begin together."""

    def __init__(self, stream: WeightStream, to: Destinations):
        self._stream, self._to = stream, to
        self.seconds = 0.0

    def stream(self, version: int) -> StreamReport:
        dist.barrier()
        started = time.monotonic()
        report = self._stream.send(version, self._to)
        self.seconds = time.monotonic() - started
        return report

    def check(self, version: int) -> Sequence[str]:
        return ()


def timed_parts(clock: Stopwatch, wait: Callable[[], None]) -> type[TrainedParts]:
    """TrainedParts that waits for the device behind each export and each change of format, and adds their seconds up."""
    from slime.weights.parts import TrainedParts

    class Timed(TrainedParts):
        def _hf_parts(self, *args: object, **kwargs: object) -> list[Tensor]:
            with clock("export"):
                found = super()._hf_parts(*args, **kwargs)
                wait()
            return found

        def _encode(self, *args: object) -> None:
            with clock("quantise"):
                super()._encode(*args)
                wait()

        def finish(self) -> None:
            with clock("quantise"):
                super().finish()
                wait()

    return Timed


# ---------------------------------------------------------------------- all processes


@dataclass(frozen=True)
class Way:
    """Medians over the repeats of the slowest rank's seconds; the first one warms up and is left out."""

    seconds: float
    make: float
    exchange: float
    hand_over: float
    engine: float = 0.0
    """Of SGLang, besides loading."""


@dataclass(frozen=True)
class Measured:
    nbytes: int
    """Of one copy of the model as it travels."""
    rounds: int
    taken: int
    """Most bytes that one rank of the engine on the trainer's devices is handed."""
    shared: Way
    export_share: float
    """Of the seconds of making, those before the change of format."""
    apart: Way | None
    taken_apart: int
    broadcast_seconds: float


def measure(setup: Setup) -> Measured:
    """Runs all processes to their end. Raises what the first of them that fails raised."""
    context = mp.get_context("spawn")
    takers = []
    try:
        urls = {}
        for name, ranks in (("url", 0 if setup.is_real else setup.engine), ("url_apart", setup.apart)):
            if ranks:
                ready, told = context.Pipe(duplex=False)
                takers.append(context.Process(target=take, args=(told, ranks)))
                takers[-1].start()
                urls[name] = f"http://127.0.0.1:{ready.recv()}"
        setup = Setup(**{**asdict(setup), **urls})
        mp.spawn(run_process, args=(setup,), nprocs=setup.trainers + setup.apart)
    finally:
        for taker in takers:
            taker.terminate()
    files = [Path(setup.folder, f"{number}.json") for number in range(setup.trainers + setup.apart)]
    return read_results([json.loads(file.read_text()) for file in files], setup)


def read_results(results: Sequence[dict], setup: Setup) -> Measured:
    trainers, receivers = results[: setup.trainers], results[setup.trainers :]
    (nbytes, _), rounds, taken = trainers[0]["size"]
    split = [rank["split"][0] for rank in trainers]
    export, quantise = (max(one.get(phase, 0.0) for one in split) for phase in ("export", "quantise"))
    apart = None
    if setup.apart:
        apart = _way([*(rank["apart"] for rank in trainers), *(rank["received"] for rank in receivers)])
    return Measured(
        nbytes,
        rounds,
        taken,
        _way([rank["shared"] for rank in trainers]),
        export / (export + quantise or 1.0),
        apart,
        trainers[0]["apart size"][2] if setup.apart else 0,
        statistics.median(trainers[0]["broadcast"][1:]) if setup.apart else 0.0,
    )


def _way(ranks: Sequence[Sequence[dict[str, float]]]) -> Way:
    repeats = list(zip(*ranks, strict=True))[1:]
    names = ("seconds", "make", "exchange", "hand_over", "engine")
    return Way(*(statistics.median(max(rank.get(name, 0.0) for rank in one) for one in repeats) for name in names))
