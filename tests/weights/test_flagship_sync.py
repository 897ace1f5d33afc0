"""The plan of the 744B recipe in numbers: bytes by hand from the config, seconds by a model of links that knows no plan."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from slime.config.stages import Cut, cut_layers
from slime.model.hf_config import HfConfig
from slime.model.names import NameTable
from slime.model.placement import Grid
from slime.rehearse.known_models import known_config
from slime.weights.plan import Receiver, SyncPlan, Trainer, nodes_of, plan_sync
from slime.weights.price import Links, broadcast_seconds, price
from tools.bench import served
from tools.bench.link_model import Ports, simulate
from tools.bench.weight_sync import FLAGSHIP, flagship_plan, simulated

GB = 10**9
LIMIT = 2**31
EXPERT = 3 * 2048 * 6144 + 3 * 2048 * 6144 // 128**2 * 4
"""FP8 codes and a float32 scale for every 128 x 128."""

REST = 745_584_507_456 - 75 * 256 * EXPERT
"""Everything that is no routed expert, on every GPU: attention and dense layers are not cut."""


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
    for gpu in (0, 7, 130, 255):
        duties = [plan.duties(gpu, number) for number in range(plan.rounds)]
        assert sum(meta.nbytes for one in duties for meta in one.metas) == pytest.approx(REST + 75 * 4 * EXPERT, rel=1e-4)
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


def test_engines_on_other_nodes_get_what_they_serve_and_no_more() -> None:
    """128 GPUs train, two engines of 64 serve on others: all of it crosses links, each GPU's share just once."""
    hf = known_config("/any/GLM-5.2-FP8")
    trainer = Trainer(Grid(world=128, tp=4, pp=8, cp=4, ep=16, etp=1), tuple(cut_layers(Cut(78, 8, first=14, last=16))))
    engines = [Receiver(number, tuple(range(128 + 64 * number, 192 + 64 * number)), tp=64, ep=64) for number in range(2)]
    plan = plan_sync(NameTable.for_model(hf), hf, trainer, engines, nodes=nodes_of(256, 8), limit_bytes=LIMIT)
    serves = REST + 75 * 4 * EXPERT
    into = Counter[int]()
    for *_, target, nbytes in plan.transfers():
        into[target] += nbytes
    assert set(into) == set(range(128, 256)) and max(into.values()) < 1.001 * serves and min(into.values()) >= serves
    # Into each GPU over the network: its experts, and an eighth of the rest, which is 0.278 s.
    found = price(plan, Links())
    assert 0.278 < found.wire_seconds < 0.4
    # A rank of the last stage trains 16 experts of 16 layers: it sends these once, its share of the rest, and little twice.
    out = [sum(nbytes for _, _, source, _, nbytes in plan.transfers() if source == rank) for rank in (112, 127)]
    assert all(16 * 16 * EXPERT < sent < 1.8 * 16 * 16 * EXPERT for sent in out)


def test_an_engine_of_plain_tensor_parallelism_takes_in_what_it_serves() -> None:
    """GLM-5.2 on 16 GPUs: a sixteenth of every expert, and of all else that tensor parallelism cuts."""
    case = served.cases(FLAGSHIP)["GLM-5.2, engines of 16, plain tensor parallelism"]
    found = served.rows(case)
    assert found["routed experts"].taken == pytest.approx(75 * 256 * EXPERT / 16 / GB, rel=1e-6)
    whole = found["what is never cut"].taken
    assert found["all"].taken == pytest.approx((745_584_507_456 / GB - whole) / 16 + whole, rel=1e-4)
    assert all(row.taken == pytest.approx(row.served, rel=1e-4) for row in found.values()) and whole < 0.05 * found["all"].taken


def test_the_rounds_of_a_small_plan_cost_what_is_worked_out_by_hand() -> None:
    """A dense model of one stage on GPU 0, one engine on GPUs 1 (same node) and 2 (another)."""
    sizes = {"vocab_size": 1024, "hidden_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 512}
    hf = HfConfig({**sizes, "model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 128})
    trainer = Trainer(Grid(world=1, tp=1, pp=1, cp=1, ep=1, etp=1), tuple(cut_layers(Cut(1, 1))))
    told = {"trainer": trainer, "receivers": [Receiver(0, (1, 2), tp=2)], "nodes": (0, 0, 1), "limit_bytes": 2**30}
    plan = plan_sync(NameTable.for_model(hf), hf, **told)
    words, attention, mlp, norms = 2 * 1024 * 512, 4 * 512 * 512, 3 * 512 * 512, 2 * 512 + 512 + 2 * 128
    nbytes = 2 * (words + attention + mlp + norms)
    found = price(plan, Links(network=50, nvlink=450, load=25))
    assert len(found.rounds) == 1 and found.rounds[0].bucket == nbytes and found.received == (nbytes, nbytes)
    assert found.wire_seconds == pytest.approx(nbytes / 50e9) and found.busiest == "network out of GPU 0"
    assert found.seconds == pytest.approx(nbytes / 50e9 + nbytes / 25e9)
    wide = plan_sync(NameTable.for_model(hf), HfConfig({**hf, "dtype": "float32"}), **told)
    assert price(wide, Links()).received == (2 * nbytes, 2 * nbytes), "a checkpoint in float32 is served in float32"
    assert broadcast_seconds(plan, Links(network=25)) == pytest.approx(nbytes / 25e9)


def test_planning_takes_little_memory() -> None:
    # Not ru_maxrss, which a child inherits from the process that forked it.
    code = (
        "from pathlib import Path; from tools.bench.weight_sync import flagship_plan; "
        "digest = flagship_plan(limit_bytes=2**31).digest; "
        "told = dict(line.split(':') for line in Path('/proc/self/status').read_text().splitlines()); "
        "print(digest, told['VmHWM'].split()[0])"
    )
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, cwd=root) for _ in "ab"]
    digests, kibibytes = zip(*(run.stdout.split() for run in runs), strict=True)
    assert digests[0] == digests[1] and max(map(int, kibibytes)) < 500_000
