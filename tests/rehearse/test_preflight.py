"""Injected faults on made-up nodes, and real facts through a one-node Ray."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from slime.rehearse.findings import Findings
from slime.rehearse.node_facts import Gpu, NodeFacts, Wanted, clock_offset, gather, judge, reach, try_shared
from tests.rehearse.recipes import ROOT

H100 = Gpu("NVIDIA H100 80GB HBM3", "580.1", 81559, 81000)
GOOD = NodeFacts(
    "10.0.0.1",
    "node1",
    (H100,) * 8,
    ("lo", "eth0"),
    ("mlx5_100", "mlx5_101"),
    0.01,
    {"/shared": ""},
    500.0,
    900.0,
    (),
    {},
    {"torch": "2.13.0", "ray": "2.60.0"},
    "3.11.9",
)
WANTED = Wanted(4, 8, "eth0", ("mlx5_100", "mlx5_101"), ("/shared",), (15000,))

FAULTS: dict[str, tuple[Callable[[NodeFacts], NodeFacts], str]] = {
    "a GPU fell off": (lambda n: replace(n, gpus=n.gpus[:7]), "7 GPUs, wanted 8"),
    "another GPU": (lambda n: replace(n, gpus=(replace(H100, name="NVIDIA A100"), *n.gpus[1:])), "NVIDIA A100"),
    "another driver": (lambda n: replace(n, gpus=tuple(replace(g, driver="550.2") for g in n.gpus)), "driver 550.2"),
    "memory in use": (lambda n: replace(n, gpus=(replace(H100, free_mb=40000), *n.gpus[1:])), "GPU 0 40000 of 81559 MB free"),
    "interface": (lambda n: replace(n, interfaces=("lo", "bond0")), "no eth0; has lo, bond0"),
    "ib device": (lambda n: replace(n, ib_devices=("mlx5_100",)), "mlx5_101"),
    "clock": (lambda n: replace(n, clock_offset=-37.0), "-37.00 s"),
    "shared folder": (
        lambda n: replace(n, shared={"/shared": "the file that the driver wrote there is not visible"}),
        "is not visible",
    ),
    "shm": (lambda n: replace(n, shm_free_gb=0.06), "/dev/shm 0.1 GB free"),
    "disk": (lambda n: replace(n, disk_free_gb=2.0), "/tmp 2.0 GB free"),
    "port": (lambda n: replace(n, busy_ports=(15000,)), "15000"),
    "proxy": (lambda n: replace(n, proxies={"http_proxy": "http://p:8080"}), "http_proxy=http://p:8080"),
    "package": (lambda n: replace(n, packages={**n.packages, "torch": "2.12.0"}), "torch 2.12.0, the others 2.13.0"),
    "python": (lambda n: replace(n, python="3.12.1"), "python 3.12.1, the others 3.11.9"),
    "firewall": (lambda n: replace(n, unreachable={"10.0.0.1": "timed out"}), "10.0.0.1: timed out"),
}


def cluster(fault: Callable[[NodeFacts], NodeFacts]) -> list[NodeFacts]:
    nodes = [replace(GOOD, address=f"10.0.0.{n}") for n in range(1, 5)]
    nodes[2] = fault(nodes[2])
    return nodes


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_its_node_named(name: str) -> None:
    fault, message = FAULTS[name]
    findings = Findings()
    judge(cluster(fault), WANTED, findings)
    bad = findings.of("violation")
    assert len(bad) == 1 and "10.0.0.3: " in bad[0].values and message in bad[0].values and bad[0].fix
    assert "10.0.0.2: " not in bad[0].values


def test_sound_nodes_pass_and_a_missing_one_is_counted() -> None:
    findings = Findings()
    judge(cluster(lambda node: node), WANTED, findings)
    assert findings.launchable and len(findings.items) == 12
    findings = Findings()
    judge(cluster(lambda node: node)[:3], WANTED, findings)
    assert "3 nodes are in the Ray cluster, the run wants 4" in findings.of("violation")[0].what


def test_facts_of_this_machine(tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen(1)
        port = held.getsockname()[1]
        facts = gather("127.0.0.1", replace(WANTED, paths=(str(tmp_path), "/no/such/folder"), ports=(port,)), {})
        assert facts.busy_ports == (port,) and "lo" in facts.interfaces and facts.packages["ray"] != "-"
        assert facts.shared[str(tmp_path)] == "" and "No such file" in facts.shared["/no/such/folder"]
        assert reach({"127.0.0.1": port}) == {}
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    assert reach({"127.0.0.1": port}, timeout=1.0).keys() == {"127.0.0.1"}
    assert "not visible" in try_shared(str(tmp_path), str(tmp_path / "seed"))


def test_a_clock_is_compared_by_the_quickest_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers take 8, 4, 1, 6 and 2 s, all of it on the way here, so half of that is the error; theirs is 5 s ahead."""
    from slime.rehearse import node_facts

    now, travel = [1000.0], iter([8.0, 4.0, 1.0, 6.0, 2.0])
    monkeypatch.setattr(node_facts.time, "time", lambda: now[0])

    def ask() -> float:
        answered = now[0] + 5.0
        now[0] += next(travel)
        return answered

    assert clock_offset(ask) == pytest.approx(5.0 - 0.5)


@pytest.mark.slow
def test_a_one_node_cluster_answers(tmp_path: Path) -> None:
    """A real Ray, real actors; this machine has no GPUs, so the verdict must say exactly that."""
    code = (
        "import os, sys, ray\n"
        "ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level='ERROR')\n"
        "from slime.rehearse import preflight\n"
        "from slime.rehearse.findings import Findings\n"
        "from slime.rehearse.node_facts import Wanted, judge\n"
        "wanted = Wanted(1, int(sys.argv[2]), 'lo', (), (sys.argv[1],), ())\n"
        "nodes = preflight.ask_nodes(wanted)\n"
        "findings = Findings(); judge(nodes, wanted, findings)\n"
        "import json; print('ANSWER', json.dumps([f.what for f in findings.of('violation')]), nodes[0].clock_offset, len(nodes))\n"
        "ray.shutdown()\n"
    )
    import torch

    count = torch.cuda.device_count()
    child = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(count)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={
            **{k: v for k, v in os.environ.items() if "proxy" not in k.lower() and k != "RAY_ADDRESS"},
            "PYTHONPATH": str(ROOT),
        },
    )
    answers = [line for line in child.stdout.splitlines() if line.startswith("ANSWER")]
    assert answers, child.stderr[-2000:]
    what = json.loads(answers[0][len("ANSWER ") : answers[0].rindex("]") + 1])
    offset, number = answers[0][answers[0].rindex("]") + 1 :].split()
    assert abs(float(offset)) < 60 and number == "1"
    assert [one for one in what if "room" not in one and "free" not in one] == []
    assert list(tmp_path.iterdir()) == []
