"""Injected faults: on made-up nodes, and on four real Ray nodes of this machine that lie about themselves."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from slime.engine.ports import FIRST_PORT
from slime.preflight.command import wanted_of, with_plan
from slime.preflight.facts import Gpu, NodeFacts, Wanted, clock_offset, gather, judge, rdma_devices, reach, try_shared
from slime.rehearse.findings import Findings
from slime.rehearse.reading import read
from tests.rehearse.recipes import ROOT, Recipe

H100 = Gpu("NVIDIA H100 80GB HBM3", "580.1", 81559, 81000)
GOOD = NodeFacts(
    "10.0.0.1",
    "node1",
    (H100,) * 8,
    {"lo": "127.0.0.1", "eth0": "10.0.0.1"},
    {"mlx5_100": "ACTIVE", "mlx5_101": "ACTIVE"},
    0.01,
    {"/shared": ""},
    500.0,
    900.0,
    (),
    {},
    {"torch": "2.13.0", "ray": "2.60.0"},
    "3.11.9",
    memory_gb=2100.0,
)
WANTED = Wanted(
    4,
    8,
    "eth0",
    ("mlx5_100", "mlx5_101"),
    ("/shared",),
    (15000,),
    ("mooncake.engine",),
    gpu_gb=68.8,
    host_gb=741.0,
    hopper=True,
)

FAULTS: dict[str, tuple[Callable[[NodeFacts], NodeFacts], str]] = {
    "a GPU fell off": (lambda n: replace(n, gpus=n.gpus[:7]), "7 GPUs, wanted 8"),
    "another GPU": (lambda n: replace(n, gpus=(replace(H100, name="NVIDIA H200"), *n.gpus[1:])), "NVIDIA H200"),
    "another driver": (lambda n: replace(n, gpus=tuple(replace(g, driver="550.2") for g in n.gpus)), "driver 550.2"),
    "memory in use": (lambda n: replace(n, gpus=(replace(H100, free_mb=40000), *n.gpus[1:])), "GPU 0 40000 of 81559 MB free"),
    "interface": (lambda n: replace(n, interfaces={"lo": "127.0.0.1", "bond0": "10.0.0.9"}), "no eth0; has lo, bond0"),
    "interface without an address": (lambda n: replace(n, interfaces={"eth0": ""}), "eth0 has no IPv4 address"),
    "ib device": (lambda n: replace(n, ib_devices={"mlx5_100": "ACTIVE"}), "mlx5_101 missing"),
    "ib port": (lambda n: replace(n, ib_devices={"mlx5_100": "ACTIVE", "mlx5_101": "DOWN"}), "mlx5_101 DOWN"),
    "clock": (lambda n: replace(n, clock_offset=-37.0), "-37.00 s"),
    "shared folder": (
        lambda n: replace(n, shared={"/shared": "the file that the driver wrote there is not visible"}),
        "is not visible",
    ),
    "shm": (lambda n: replace(n, shm_free_gb=0.06), "/dev/shm 0.1 GB free"),
    "disk": (lambda n: replace(n, disk_free_gb=2.0), "/tmp 2.0 GB free"),
    "port": (lambda n: replace(n, busy_ports=(15000,)), "15000"),
    "proxy": (lambda n: replace(n, proxies={"http_proxy": "http://p:8080"}), "http_proxy=http://p:8080 for 10.0.0.1"),
    "proxy with a gap": (
        lambda n: replace(n, proxies={"https_proxy": "http://p:8080", "no_proxy": "localhost,10.0.0.0/31"}),
        "https_proxy=http://p:8080 for 10.0.0.2",
    ),
    "package": (lambda n: replace(n, packages={**n.packages, "torch": "2.12.0"}), "torch 2.12.0, the others 2.13.0"),
    "python": (lambda n: replace(n, python="3.12.1"), "python 3.12.1, the others 3.11.9"),
    "a library of another CUDA": (
        lambda n: replace(n, unloadable={"mooncake.engine": "ImportError: libcudart.so.12: cannot open"}),
        "mooncake.engine: ImportError: libcudart.so.12",
    ),
    "main memory": (lambda n: replace(n, memory_gb=540.0), "540 GB"),
    "sglang is missing": (lambda n: replace(n, packages={**n.packages, "sglang": "-"}), "no sglang"),
    "firewall": (lambda n: replace(n, unreachable={"10.0.0.1": "timed out"}), "10.0.0.1: timed out"),
}


def cluster(fault: Callable[[NodeFacts], NodeFacts]) -> list[NodeFacts]:
    nodes = [replace(GOOD, name=f"10.0.0.{n}") for n in range(1, 5)]
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
    assert findings.launchable and len(findings.items) == 18
    covered = {"http_proxy": "http://p:8080", "no_proxy": "localhost,10.0.0.0/8"}
    findings = Findings()
    judge(cluster(lambda node: replace(node, proxies=covered)), WANTED, findings)
    assert findings.launchable, "a proxy that no node is reached through does no harm"
    findings = Findings()
    judge(cluster(lambda node: node)[:3], WANTED, findings)
    assert "3 nodes are in the Ray cluster, the run wants 4" in findings.of("violation")[0].what
    findings = Findings()
    judge(cluster(lambda node: node)[:3], WANTED, findings, silent={"10.0.0.4": "actor died"})
    [silent] = findings.of("violation")
    assert silent.what == "1 of 4 nodes did not answer" and silent.values == "10.0.0.4: actor died"


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        (Gpu("NVIDIA A100-SXM4-40GB", "580.1", 40960, 40900), "has 43 GB, the plan's largest phase needs 68.8"),
        (Gpu("Tesla T4", "580.1", 15360, 15300), "has 16 GB, the plan's largest phase needs 68.8"),
        (Gpu("NVIDIA A100 80GB PCIe", "580.1", 81920, 81900), "is no Hopper GPU"),
    ],
)
def test_what_is_alike_on_every_node_may_be_wrong_on_every_node(gpu: Gpu, message: str) -> None:
    """A cluster of small GPUs, without SGLang, whose nodes agree with each other in all of it."""
    nodes = [replace(GOOD, name=f"10.0.0.{n}", gpus=(gpu,) * 8, packages={**GOOD.packages, "sglang": "-"}) for n in range(1, 5)]
    findings = Findings()
    judge(nodes, WANTED, findings)
    told = "\n".join(finding.line() for finding in findings.of("violation"))
    assert "GPUs are of a kind and size that the plan fits: not on 4 of 4 nodes" in told and f"{gpu.name} {message}" in told
    assert "packages are there: not on 4 of 4 nodes" in told and "no sglang" in told


def test_two_machines_with_one_address_are_named() -> None:
    nodes = [replace(GOOD, name=f"10.0.0.{n}", host=f"node{n}") for n in range(1, 4)]
    findings = Findings()
    judge([*nodes, replace(GOOD, name="10.0.0.3 (b)", host="node9")], WANTED, findings)
    [found] = findings.of("violation")
    assert found.what == "1 addresses are those of several machines" and found.values == "10.0.0.3: node3, node9"


def test_a_folder_that_is_only_read_may_be_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model", "data", "out"):
        (tmp_path / name).mkdir()
    flags = ["--hf-checkpoint", str(tmp_path / "model" / "m"), "--prompt-data", str(tmp_path / "data" / "p.jsonl")]
    wanted = wanted_of(read([*flags, "--save", str(tmp_path / "out" / "run")], Findings()), {})
    assert wanted.paths == (str(tmp_path / "out"),)
    assert wanted.read_only == (str(tmp_path / "data"), str(tmp_path / "model"))
    monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    facts = gather("10.0.0.1", wanted, {})
    assert facts.shared[str(tmp_path / "model")] == "" and "read-only" in facts.shared[str(tmp_path / "out")]


def test_the_plan_says_what_a_node_must_have(flagship: Recipe, tmp_path: Path) -> None:
    """The recipe's engines take 56 GB of weights and cache, 8 and 0.8 beside them, and the sleeping trainer 4."""
    argv = flagship.written(tmp_path)
    wanted = with_plan(wanted_of(read(argv, Findings()), flagship.env), argv, env=flagship.env)
    assert wanted.gpu_gb == pytest.approx(68.8, abs=0.1) and wanted.host_gb == pytest.approx(741, abs=2) and wanted.hopper
    assert wanted_of(read(argv, Findings()), {"NCCL_SOCKET_IFNAME": "eth0"}).interface == "eth0"


def test_what_was_not_asked_for_is_unchecked_and_a_run_on_cpus_wants_no_gpus() -> None:
    alone, findings = replace(GOOD, gpus=(), shm_free_gb=0.6), Findings()
    judge([alone], Wanted(1, 0, None, (), (), (15000,)), findings)
    assert findings.launchable, [finding.line() for finding in findings.of("violation")]
    told = [finding.what for finding in findings.of("unchecked")]
    assert told == ["no network interface is named", "no RDMA devices are named", "the flags name no folder"]
    assert not [finding for finding in findings.items if "memory" in finding.what or "reaches" in finding.what]
    findings = Findings()
    judge([replace(alone, shm_free_gb=0.001)], Wanted(1, 0, None, (), (), (15000,)), findings)
    assert "/dev/shm 0.0 GB free, wanted 0.5" in findings.of("violation")[0].values, "Ray's object store would not fit"
    findings = Findings()
    judge([GOOD], Wanted(1, 0, "eth0", (), (), ()), findings)
    assert "8 GPUs, wanted none" in findings.of("violation")[0].values, "such a node would train on its GPUs"


def test_states_of_rdma_ports_are_the_kernels(tmp_path: Path) -> None:
    for name, states in {"mlx5_0": ["4: ACTIVE"], "mlx5_1": ["4: ACTIVE", "1: DOWN"]}.items():
        for port, state in enumerate(states, 1):
            (tmp_path / name / "ports" / str(port)).mkdir(parents=True)
            (tmp_path / name / "ports" / str(port) / "state").write_text(state + "\n")
    assert rdma_devices(tmp_path) == {"mlx5_0": "ACTIVE", "mlx5_1": "DOWN"}
    assert rdma_devices(tmp_path / "none") == {}


def test_facts_of_this_machine(tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen(1)
        port = held.getsockname()[1]
        wanted = replace(WANTED, paths=(str(tmp_path), "/no/such/folder"), ports=(port,), modules=("json", "slime.nowhere"))
        facts = gather("127.0.0.1", wanted, {})
        assert facts.unloadable == {"slime.nowhere": "ModuleNotFoundError: No module named 'slime.nowhere'"}
        assert facts.busy_ports == (port,) and facts.interfaces["lo"] == "127.0.0.1" and facts.packages["ray"] != "-"
        assert facts.shared[str(tmp_path)] == "" and "No such file" in facts.shared["/no/such/folder"]
        assert reach({"a": ("127.0.0.1", port)}) == {}
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    assert reach({"a": ("127.0.0.1", port)}, timeout=1.0).keys() == {"a"}
    assert "not visible" in try_shared(str(tmp_path), str(tmp_path / "seed"))


@pytest.mark.parametrize(
    "flags, modules",
    [
        ((), ()),
        (("--prefill-num-servers", "1"), ("mooncake.engine",)),
        (("--prefill-num-servers", "1", "--sglang-disaggregation-transfer-backend", "nixl"), ()),
        (("--sglang-attention-backend", "nsa", "--sglang-moe-a2a-backend", "deepep"), ("deep_gemm", "deep_ep")),
    ],
    ids=["one kind of engine", "prefill and decode", "by something else", "experts' exchange and sparse attention"],
)
def test_what_is_imported_on_a_node_follows_from_the_engines_settings(flags: tuple[str, ...], modules: tuple[str, ...]) -> None:
    run = ("--colocate", "--actor-num-gpus-per-node", "8", "--hf-checkpoint", "/no/model", "--rollout-batch-size", "8")
    wanted = wanted_of(read([*run, *flags], Findings()), {}).modules
    assert set(wanted) == {"sgl_kernel", "flashinfer", "torch_memory_saver", *modules}
    on_cpus = wanted_of(read([*run, *flags], Findings()), {}, logical_gpus=True).modules
    assert set(on_cpus) == {module for module in modules if module == "mooncake.engine"}


def test_a_clock_is_compared_by_the_quickest_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers take 8, 4, 1, 6 and 2 s, all of it on the way here, so half of that is the error; theirs is 5 s ahead."""
    from slime.preflight import facts as node_facts

    now, travel = [1000.0], iter([8.0, 4.0, 1.0, 6.0, 2.0])
    monkeypatch.setattr(node_facts.time, "time", lambda: now[0])

    def ask() -> float:
        answered = now[0] + 5.0
        now[0] += next(travel)
        return answered

    assert clock_offset(ask) == pytest.approx(5.0 - 0.5)


LIES = """
import os, pathlib, socket, time
# Ray's own agents on the node must stay sound.
lie = os.environ.get("LIE") if b"default_worker" in open("/proc/self/cmdline", "rb").read() else None
if lie == "second":
    true_time, true_exists = time.time, pathlib.Path.exists
    time.time = lambda: true_time() - 37.0
    socket.if_nameindex = lambda: [(1, "bond0")]
    pathlib.Path.exists = lambda self, **how: ".rehearse-driver" not in str(self) and true_exists(self, **how)
    def unreachable(*target, **how):
        raise TimeoutError("timed out")
    socket.create_connection = unreachable
if lie == "third":
    def listen(self, *backlog):
        raise OSError("No buffer space available")
    socket.socket.listen = listen
"""
CLUSTER = """
import json, os, sys
from ray.cluster_utils import Cluster

def patiently(start):
    # Ray gives a node 30 seconds to come up, whatever else the machine does.
    for attempt in range(8):
        try:
            return start()
        except Exception as error:
            if attempt == 7 or "timed out" not in str(error):
                raise

head = {"num_cpus": 1, "include_dashboard": False, "env_vars": json.loads(sys.argv[1])}
cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
for name, env in json.loads(sys.argv[2]).items():
    patiently(lambda: cluster.add_node(wait=False, num_cpus=1, node_name=name, env_vars=env))
cluster.wait_for_nodes()
os.environ["RAY_ADDRESS"] = cluster.address
from slime.preflight.command import main
try:
    status = main(sys.argv[3:])
finally:
    cluster.shutdown()
sys.exit(status)
"""


@pytest.mark.slow
def test_bad_nodes_of_a_real_cluster_are_named(tmp_path: Path) -> None:
    """Four Ray nodes on this machine. Each answers through a real actor; what the system tells it is changed on three."""
    shared, report = tmp_path / "shared", tmp_path / "report.json"
    shared.mkdir()

    def environment(name: str, *, gpus: int = 8, **lies: str) -> dict[str, str]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "nvidia-smi").write_text("#!/bin/sh\n" + gpus * "echo 'NVIDIA H100 80GB HBM3, 580.1, 81559, 81000'\n")
        (folder / "nvidia-smi").chmod(0o755)
        (folder / "sitecustomize.py").write_text(LIES)
        return {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": f"{folder}:{ROOT}", **lies}

    nodes = {
        "first": environment("first", gpus=7, http_proxy="http://proxy:8080"),
        "second": environment("second", LIE="second"),
        "third": environment("third", LIE="third"),
    }
    package = tmp_path / "first" / "numpy-0.0.1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.0.1\n")
    flags = ["--actor-num-nodes", "4", "--actor-num-gpus-per-node", "8", "--colocate", "--num-rollout", "1"]
    flags += ["--hf-checkpoint", str(shared / "GLM-5.2"), "--prompt-data", str(shared / "p.jsonl"), "--rollout-batch-size", "8"]
    own = ["--json", str(report), "--runtime-env", json.dumps({"env_vars": {"NCCL_SOCKET_IFNAME": "lo"}})]
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and k not in ("RAY_ADDRESS", "SOCKET_IFNAME")}
    child = subprocess.run(
        [sys.executable, "-c", CLUSTER, json.dumps(environment("head")), json.dumps(nodes), *own, *flags],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=ROOT,
        env={**env, "PYTHONPATH": str(ROOT)},
    )
    assert child.returncode == 1 and report.exists(), child.stdout[-2000:] + child.stderr[-2000:]
    found = {one["what"]: one["values"] for one in json.loads(report.read_text())["findings"] if one["severity"] == "violation"}
    wanted = {
        "GPUs of one kind, as many as wanted: not on 1 of 3 nodes": "(first): 7 GPUs, wanted 8",
        "no proxy stands between the nodes: not on 1 of 3 nodes": "(first): http_proxy=http://proxy:8080 for",
        "package versions differ on 1 nodes": "(first): numpy 0.0.1, the others",
        "clocks agree: not on 1 of 3 nodes": "(second): -3",
        "the network interface is there: not on 1 of 3 nodes": "(second): no lo; has bond0",
        "shared folders are seen, and written where the run writes: not on 1 of 3 nodes": "(second): ",
        "every node reaches every other: not on 1 of 3 nodes": "(second): ",
        "1 of 4 nodes did not answer": "(third): ",
    }
    # Room, free ports and whether GPU packages are installed are this machine's own affair.
    own_affair = ("room", "ports", "can be imported")
    assert {what for what in found if not any(words in what for words in own_affair)} == set(wanted)
    for what, values in wanted.items():
        nodes = re.findall(r"\(\w+\)", found[what])  # a node's name stands in parentheses
        assert values in found[what] and len(nodes) == (3 if "reaches" in what else 1), (what, found[what])
    assert "No buffer space available" in found["1 of 4 nodes did not answer"] and "timed out" in found[list(wanted)[6]]
    assert list(shared.iterdir()) == [], "nothing is left behind"


def _listening(port: int, patience: float = 240.0) -> socket.socket:
    """A listener on `port` once no engine of another test has it. One that stays longer is a user's, and listens itself.

    Without SO_REUSEADDR: with it we could listen where an engine only holds the port as yet, and that engine could not.
    """
    deadline = time.monotonic() + patience
    held = socket.socket()
    while time.monotonic() < deadline:
        try:
            held.bind(("", port))
        except OSError:
            time.sleep(0.1)
        else:
            held.listen(1)
            break
    return held


@pytest.mark.slow
def test_a_launcher_asks_its_own_cluster_and_stops_it(tmp_path: Path) -> None:
    """bash run-glm5.2-tiny.sh --preflight: one real Ray node on CPUs, with the engines' first port taken."""
    report = tmp_path / "report.json"
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and k not in ("RAY_ADDRESS", "SOCKET_IFNAME")}
    with _listening(FIRST_PORT):
        child = subprocess.run(
            ["bash", str(ROOT / "scripts" / "run-glm5.2-tiny.sh"), "--preflight", "--json", str(report)],
            env={**env, "BASE_DIR": str(tmp_path), "PYTHON": sys.executable, "RAY_TEMP_DIR": f"/tmp/slime-pf-{os.getpid()}"},
            capture_output=True,
            text=True,
            timeout=400,
        )
    shutil.rmtree(f"/tmp/slime-pf-{os.getpid()}", ignore_errors=True)
    assert child.returncode == 1 and report.exists(), child.stdout[-2000:] + child.stderr[-2000:]
    told = json.loads(report.read_text())
    found = {one["what"]: one for one in told["findings"]}
    busy = found["ports are free: not on 1 of 1 nodes"]
    # The second port that is asked for may belong to an engine of another test.
    assert busy["severity"] == "violation" and re.search(rf": {FIRST_PORT}(, {FIRST_PORT + 1})?$", busy["values"])
    bad = [what for what, one in found.items() if one["severity"] == "violation" and "room" not in what]
    assert bad == [busy["what"]] and found["no GPUs, as the run computes on CPUs"]["severity"] == "ok"
    assert found["shared folders are seen, and written where the run writes"]["severity"] == "ok"
    assert list(told["nodes"][0]["shared"]) == [str(tmp_path), str(tmp_path / "arithmetic")]
    assert "the Ray cluster of this run is stopped" in child.stderr
    made = ["GLM-5.2-tiny", "GLM-5.2-tiny-FP8", "arithmetic", "report.json", "run"]
    assert sorted(path.name for path in tmp_path.iterdir()) == made, "nothing was converted, trained or saved"
