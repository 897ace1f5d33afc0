"""The plan of the 744B recipe in numbers: bytes by hand from the config, seconds by a model of links that knows no plan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slime.weights.plan import SyncPlan
from tools.bench.link_model import Ports, simulate
from tools.bench.weight_sync import flagship_plan, simulated

GB = 10**9
LIMIT = 2**31
EXPERT = 3 * 2048 * 6144 + 3 * 2048 * 6144 // 128**2 * 4
"""FP8 codes and a float32 scale for every 128 x 128."""


@pytest.fixture(scope="module")
def plan() -> SyncPlan:
    return flagship_plan(limit_bytes=LIMIT)


def test_sends_that_share_a_port_share_its_rate() -> None:
    nodes, ports = (0, 1, 2, 2), Ports(network=50, nvlink=450)
    assert simulate([(0, 0, 0, 1, 50 * GB), (0, 0, 0, 2, 50 * GB)], nodes=nodes, ports=ports).seconds == 2.0
    # Both flows into GPU 1 get 25 GB/s; the smaller ends after 1 s, the other has 25 GB left for its own 50 GB/s.
    two = simulate([(0, 0, 0, 1, 50 * GB), (0, 0, 2, 1, 25 * GB), (0, 1, 2, 3, 45 * GB)], nodes=nodes, ports=ports)
    assert two.seconds == pytest.approx(1.5 + 0.1) and two.busiest == "network in of GPU 1" and two.network_gb == 75


def test_the_flagship_takes_no_more_than_twice_the_bound() -> None:
    """The bound is 0.28 s: 11.33 GB of experts over each GPU's own port, the rest once per node."""
    broadcast, layers, plan = (found for _, found in simulated(Ports(), limit_bytes=LIMIT))
    assert broadcast.seconds == pytest.approx((75 * 256 * EXPERT + 20.632e9) / 50e9, rel=0.01)
    assert plan.seconds < 0.42 and plan.busiest_seconds < 0.30
    assert layers.seconds > 5 * plan.seconds and broadcast.seconds > 35 * plan.seconds


def test_every_gpu_gets_what_it_serves_in_buckets_of_the_limit(plan: SyncPlan) -> None:
    rest = 20_631_829_056  # everything that is no routed expert, on every GPU: attention and dense layers are not cut
    for gpu in (0, 7, 130, 255):
        duties = [plan.duties(gpu, number) for number in range(plan.rounds)]
        assert sum(meta.nbytes for one in duties for meta in one.metas) == pytest.approx(rest + 75 * 4 * EXPERT, rel=1e-4)
        assert max(one.bucket_bytes for one in duties) <= LIMIT
        assert max(sum(delivery.nbytes for delivery in one.staged) for one in duties) <= LIMIT
        experts = {
            meta.name.split(".experts.")[1].split(".")[0] for one in duties for meta in one.metas if ".experts." in meta.name
        }
        assert experts == {str(4 * (gpu % 64) + number) for number in range(4)}


def test_sources_are_balanced(plan: SyncPlan) -> None:
    """A rank of the last stage trains twice the experts of one of the middle, and sends hardly more than the mean."""
    out = [0] * 256
    for _, _, source, target, nbytes in plan.transfers():
        out[source] += nbytes if source // 8 != target // 8 else 0
    assert max(out) < 1.12 * sum(out) / 256
    # Once into every node for the rest, once to every GPU for the experts; what a node has trained itself it does not get.
    assert sum(out) < 32 * 20.632e9 + 4 * 75 * 256 * EXPERT


def test_planning_takes_little_memory() -> None:
    code = (
        "import resource; from tools.bench.weight_sync import flagship_plan; "
        "print(flagship_plan(limit_bytes=2**31).digest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, cwd=root) for _ in "ab"]
    digests, kibibytes = zip(*(run.stdout.split() for run in runs), strict=True)
    assert digests[0] == digests[1] and max(map(int, kibibytes)) < 500_000
