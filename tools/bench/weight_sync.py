"""What one weight sync costs.

    python3 tools/bench/weight_sync.py simulate [--nic 50] [--nvlink 450] [--buffer BYTES]
    python3 tools/bench/weight_sync.py served

`simulate`: GLM-5.2 (FP8) from the recipe's 256 GPUs (TP4 PP8 CP8 EP32, stages of 14, 8 x 6 and 16 layers) to one prefill and
three decode engines of 64 on the same GPUs, by a model of links (`link_model.py`) that shares no code with the planner: the
plan beside a broadcast of everything to everyone and a scheme that goes layer by layer. Some 5 s of one core; nothing is
measured.

`served`: what an engine rank takes in, beside what it serves, by classes of tensors, for engines of several kinds.
"""

from __future__ import annotations

import argparse
import pathlib
import resource
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from slime.config.stages import Cut, cut_layers  # noqa: E402
from slime.model.names import NameTable  # noqa: E402
from slime.model.placement import Grid  # noqa: E402
from slime.rehearse.known_models import known_config  # noqa: E402
from slime.weights.plan import Receiver, SyncPlan, Trainer, nodes_of, plan_sync  # noqa: E402
from tools.bench import served  # noqa: E402
from tools.bench.link_model import Ports, Timing, simulate  # noqa: E402
from tools.bench.sync_schemes import Sizes, broadcast, layer_by_layer  # noqa: E402

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
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main(sys.argv[1:])
