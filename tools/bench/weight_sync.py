"""What one weight sync costs.

    python3 tools/bench/weight_sync.py simulate [--nic 50] [--nvlink 450] [--buffer BYTES]
    python3 tools/bench/weight_sync.py served
    python3 tools/bench/weight_sync.py measure [--bf16 DIR --fp8 DIR] [--trainers 2 --engine 2 --apart 2] [-- FLAGS]

`simulate`: GLM-5.2 (FP8) from the recipe's 256 GPUs (TP4 PP8 CP8 EP32, stages of 14, 8 x 6 and 16 layers) to one prefill and
three decode engines of 64 on the same GPUs, by a model of links (`link_model.py`) that shares no code with the planner: the
plan beside a broadcast of everything to everyone and a scheme that goes layer by layer. Some 5 s of one core; nothing is
measured.

`served`: what an engine rank takes in, beside what it serves, by classes of tensors, for engines of several kinds.

`measure`: syncs on this machine, without a launch, on GPUs or a CPU (`measured_sync.py`): to an engine on the trainer's devices
and to one on devices of its own by receivers, each with its phases apart, beside a plain broadcast of as many bytes. Without
DIRs a tiny GLM-5.2. FLAGS: MODEL_ARGS of the checkpoint, and the trainer's layout. In the place of engines stand processes
that copy what they are given; --sglang: a server of SGLang on the trainer's devices, and its pause as a run has it.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from slime.config.stages import Cut, cut_layers  # noqa: E402
from slime.model.names import NameTable  # noqa: E402
from slime.model.placement import Grid  # noqa: E402
from slime.rehearse.known_models import known_config  # noqa: E402
from slime.weights.plan import Receiver, SyncPlan, Trainer, nodes_of, plan_sync  # noqa: E402
from tools.bench import served  # noqa: E402
from tools.bench.link_model import Ports, Timing, simulate  # noqa: E402
from tools.bench.model_args import model_args  # noqa: E402
from tools.bench.sync_schemes import Sizes, broadcast, layer_by_layer  # noqa: E402

if TYPE_CHECKING:
    from tools.bench.measured_sync import Measured, Setup, Way

FLAGSHIP = Trainer(Grid(world=256, tp=4, pp=8, cp=8, ep=32, etp=1), tuple(cut_layers(Cut(78, 8, first=14, last=16))))
ENGINES = tuple(Receiver(number, tuple(range(64 * number, 64 * number + 64)), tp=64, ep=64, drafts=True) for number in range(4))


def flagship_plan(*, limit_bytes: int) -> SyncPlan:
    hf = known_config("/any/GLM-5.2-FP8")
    return plan_sync(NameTable.for_model(hf), hf, FLAGSHIP, ENGINES, nodes=nodes_of(256, 8), limit_bytes=limit_bytes)


def simulated(ports: Ports, *, limit_bytes: int) -> list[tuple[str, Timing]]:
    hf = known_config("/any/GLM-5.2-FP8")
    sizes, nodes = Sizes.of(NameTable.for_model(hf), hf, FLAGSHIP), nodes_of(256, 8)
    plan = flagship_plan(limit_bytes=limit_bytes)
    schemes = {
        "broadcast to all, source by source": broadcast(sizes, FLAGSHIP),
        "layer by layer": layer_by_layer(sizes, FLAGSHIP, ENGINES),
        f"plan, {plan.rounds} rounds": plan.transfers(),
    }
    return [(name, simulate(sends, nodes=nodes, ports=ports)) for name, sends in schemes.items()]


def print_simulated(args: argparse.Namespace) -> None:
    ports = Ports(network=args.nic, nvlink=args.nvlink)
    started = time.process_time()
    plan = flagship_plan(limit_bytes=args.buffer)
    spent, peak = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{'scheme':36}{'wire s':>8}{'busiest port':>28}{'its s':>8}{'GB into a GPU':>16}{'GB by network':>15}")
    for name, found in simulated(ports, limit_bytes=args.buffer):
        into = f"{min(found.received_gb):.1f} to {max(found.received_gb):.1f}"
        print(
            f"{name:36}{found.seconds:>8.2f}{found.busiest:>28}{found.busiest_seconds:>8.2f}{into:>16}{found.network_gb:>15,.0f}"
        )
    print(f"planned in {spent:.1f} s of one core and {peak / 1e6:.0f} MB of the whole process, digest {plan.digest[:16]}")


def print_served(args: argparse.Namespace) -> None:
    heading = "engine, and the rank of it that takes in the most beyond what it serves"
    print(f"{heading:74}{'GB taken':>10}{'served':>9}{'ratio':>8}")
    for name, case in served.cases(FLAGSHIP).items():
        for kind, row in served.rows(case).items():
            label = name if kind == "all" else f"    {kind}"
            print(f"{label:74}{row.taken:>10.3f}{row.served:>9.3f}{row.taken / row.served:>8.3f}")


def print_measured(args: argparse.Namespace) -> None:
    from slime.device import get_device
    from tools.bench.measured_sync import measure

    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of packages that say what they lack, in every process
    with tempfile.TemporaryDirectory(prefix="sync-") as folder, _engine(_setup(args, folder), args.sglang) as setup:
        print(f"{get_device().kind}: {get_device().reason}; {setup.trainers} trainer ranks, medians of {args.repeats}")
        print("\n".join(_lines(measure(setup), setup)))


def _setup(args: argparse.Namespace, folder: str) -> Setup:
    from tools.bench.measured_sync import Setup
    from tools.make_tiny_checkpoint import main as make_checkpoint

    bf16, fp8, flags = args.bf16, args.fp8, args.flags
    if bf16 is None:
        make_checkpoint(["--preset", "cpu", "--output", f"{folder}/model"])
        bf16, fp8 = f"{folder}/model/bf16", f"{folder}/model/fp8"
        layout = ["--tensor-model-parallel-size", str(args.trainers), "--sequence-parallel"]
        flags = [*model_args("glm5.2-tiny"), *(layout if args.trainers > 1 else ()), *flags]
    ranks = {"trainers": args.trainers, "engine": args.engine, "apart": args.apart, "experts_apart": args.experts_apart}
    return Setup(folder, bf16, fp8 or bf16, tuple(flags), **ranks, limit_bytes=args.buffer, repeats=args.repeats)


@contextmanager
def _engine(setup: Setup, wanted: bool) -> Iterator[Setup]:
    """The setup with a server of SGLang, if one is wanted."""
    if not wanted:
        yield setup
        return
    from dataclasses import replace

    from slime.device import get_device
    from slime.engine.process import EngineProcess
    from slime.engine.spec import EngineSpec

    sizes = {"num_gpus": setup.engine, "num_nodes": 1, "tp_size": setup.engine, "pp_size": 1, "dp_size": 1, "ep_size": 1}
    sizes |= {"engine_id": 0, "gpu_offset": 0, "random_seed": 0, "update_weights": True, "needs_offload": False}
    # Little of the device, beside the trainer; nothing is generated, so no graph is captured.
    small = {"max_total_tokens": 2048, "max_running_requests": 8, "mem_fraction_static": 0.5, "disable_cuda_graph": True}
    spec = EngineSpec("default", "regular", model_path=setup.fp8, settings=small, **sizes)
    log = pathlib.Path(setup.folder, "engine.log")
    engine = EngineProcess(spec, device_kind=get_device().kind, token="measured", log_path=log)
    try:
        engine.start()
        engine.wait_ready()
        yield replace(setup, url=engine.url, token="measured", is_real=True, experts_apart=False)
    finally:
        engine.stop()


def _lines(found: Measured, setup: Setup) -> Iterator[str]:
    served = "SGLang, with its pause" if setup.is_real else "no SGLang"
    yield f"one copy of the model travels as {found.nbytes / 1e6:,.1f} MB in {found.rounds} rounds"
    yield f"{'':58}{'s':>8}{'GB/s a rank':>13}{'export':>9}{'quantise':>10}{'wire':>8}{'load':>8}{'engine':>9}"
    yield _line(f"{setup.engine} ranks on the trainer's devices ({served})", found.shared, found.taken, found.export_share)
    if found.apart is not None:
        yield _line(
            f"{setup.apart} ranks elsewhere, by receivers (no SGLang)", found.apart, found.taken_apart, found.export_share
        )
        rate = found.nbytes / 1e9 / found.broadcast_seconds
        yield f"{f'plain broadcast of one copy to {setup.apart} ranks':58}{found.broadcast_seconds:>8.3f}{rate:>13.3f}"
    yield "export, quantise: the making of a sync, shared out as in a pass that waits after each; load: what no round hides"
    yield "engine: SGLang's pause, emptied cache, opening and closing of the update"
    yield "no SGLang: a process in the place of each engine rank copies what it is given, and looks nothing up"


def _line(name: str, way: Way, nbytes: int, export: float) -> str:
    making = f"{way.make * export:>9.3f}{way.make * (1 - export):>10.3f}"
    rest = f"{way.exchange:>8.3f}{way.hand_over:>8.3f}{way.engine:>9.3f}"
    return f"{name:58}{way.seconds:>8.3f}{nbytes / 1e9 / way.seconds:>13.3f}{making}{rest}"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    wire = commands.add_parser("simulate", help="the 744B recipe by a model of links")
    wire.add_argument("--nic", type=float, default=Ports.network, help="GB/s of a GPU's network port, each way")
    wire.add_argument("--nvlink", type=float, default=Ports.nvlink, help="GB/s of a GPU's NVLink, each way")
    wire.add_argument("--buffer", type=int, default=2**31, help="--update-weight-buffer-size")
    wire.set_defaults(run=print_simulated)
    taken = commands.add_parser("served", help="bytes that an engine rank takes in, beside those that it serves")
    taken.set_defaults(run=print_served)
    one = commands.add_parser("measure", help="syncs on this machine, phase by phase")
    one.add_argument("--bf16", help="checkpoint that is trained; a tiny one unless said")
    one.add_argument("--fp8", help="checkpoint whose format is served; that of --bf16 unless said")
    one.add_argument("--trainers", type=int, default=2, help="ranks of the trainer")
    one.add_argument("--engine", type=int, default=2, help="ranks of the engine on the first of the trainer's devices")
    one.add_argument(
        "--apart", type=int, default=2, help="ranks of the engine on devices behind the trainer's; 0 leaves it out"
    )
    one.add_argument("--experts-apart", action="store_true", help="engines are expert-parallel over their ranks")
    one.add_argument("--sglang", action="store_true", help="the engine on the trainer's devices is a server of SGLang")
    one.add_argument("--buffer", type=int, default=2**31, help="--update-weight-buffer-size")
    one.add_argument("--repeats", type=int, default=3)
    one.add_argument("flags", nargs="*", help="behind --: MODEL_ARGS and the trainer's layout")
    one.set_defaults(run=print_measured)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main(sys.argv[1:])
