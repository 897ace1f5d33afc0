"""Injected facts of made-up nodes, and what this machine says of itself."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from slime.observability.packages import source_digest
from slime.preflight.ask import patience, waits_on
from slime.preflight.command import pins, scouts_variables, wanted_of, with_plan
from slime.preflight.facts import (
    Gpu,
    NodeFacts,
    Wanted,
    clock_offset,
    gather,
    memory_gb,
    rdma_devices,
    reach,
    taken_gb,
    try_shared,
)
from slime.preflight.judge import judge
from slime.rehearse.findings import Findings
from slime.rehearse.reading import read
from tests.rehearse.recipes import Recipe, recorded

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
    {
        "torch": "2.14.1+cu130",
        "ray": "2.60.0",
        "sglang": "0.5.23",
        "megatron-core": "0.16.1",
        "slime": "12345678",
        "python": "3.11.9",
    },
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
    "package": (lambda n: replace(n, packages={**n.packages, "torch": "2.12.0"}), "torch 2.12.0, the others 2.14.1+cu130"),
    "another checkout": (
        lambda n: replace(n, packages={**n.packages, "slime": "0badc0de"}),
        "slime 0badc0de, the others 12345678",
    ),
    "python": (lambda n: replace(n, packages={**n.packages, "python": "3.12.1"}), "python 3.12.1, the others 3.11.9"),
    "a library of another CUDA": (
        lambda n: replace(n, unloadable={"mooncake.engine": "ImportError: libcudart.so.12: cannot open"}),
        "mooncake.engine: ImportError: libcudart.so.12",
    ),
    "main memory": (lambda n: replace(n, memory_gb=540.0), "540 GB"),
    "main memory in use": (lambda n: replace(n, memory_taken_gb=1400.0), "2100 GB, of which other programs hold 1400"),
    "sglang is missing": (lambda n: replace(n, packages={**n.packages, "sglang": "-"}), "no sglang"),
    "sglang is too old": (
        lambda n: replace(n, packages={**n.packages, "sglang": "0.5.14"}),
        "sglang 0.5.14, wanted 0.5.15.post1 or later",
    ),
    "megatron-core is too new": (
        lambda n: replace(n, packages={**n.packages, "megatron-core": "0.20.0"}),
        "megatron-core 0.20.0, wanted 0.16.1 to 0.19.x",
    ),
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
    told = [finding for finding in bad if message in finding.values]
    assert len(told) == 1 and "10.0.0.3: " in told[0].values and told[0].fix
    # A version that nobody can run with also differs from the others'.
    assert len(bad) == 1 or [finding.what for finding in bad if finding not in told] == ["package versions differ on 1 nodes"]
    assert not any("10.0.0.2: " in finding.values for finding in bad)


def test_sound_nodes_pass_and_a_missing_one_is_counted() -> None:
    findings = Findings()
    judge(cluster(lambda node: node), WANTED, findings)
    assert findings.launchable and len(findings.items) == 19
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


def test_every_bad_node_of_a_large_cluster_is_named() -> None:
    """32 nodes of which 12 have lost a GPU and are out of reach of the others: eight with their fault, four by name."""
    bad = [f"10.0.1.{n}" for n in range(1, 13)]
    away = dict.fromkeys(bad, "timed out")
    nodes = [replace(GOOD, name=f"10.0.0.{n}", unreachable=away) for n in range(1, 21)]
    nodes += [replace(GOOD, name=name, gpus=(H100,) * 7) for name in bad]
    findings = Findings()
    judge(nodes, replace(WANTED, num_nodes=32), findings)
    gpus, reached = (found.values for found in findings.of("violation"))
    assert gpus.count("7 GPUs, wanted 8") == 8 and all(name in gpus for name in bad)
    assert gpus.endswith("; and 10.0.1.9, 10.0.1.10, 10.0.1.11, 10.0.1.12")
    assert reached.startswith("10.0.0.1: 10.0.1.1: timed out; 10.0.1.2: timed out; and 10.0.1.3, ") and "10.0.1.12" in reached
    findings = Findings()
    judge(nodes[:20], replace(WANTED, num_nodes=32), findings, silent=dict.fromkeys(bad, "no answer within 19 s"))
    assert findings.of("violation")[0].what == "12 of 32 nodes did not answer"
    assert all(name in findings.of("violation")[0].values for name in bad)


def test_many_dead_peers_take_as_long_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of twelve attempts returns once all twelve are under way, and times out after the five seconds that it was given."""
    under_way, given = threading.Barrier(12, timeout=60), []

    def dead(target: tuple[str, int], timeout: float) -> socket.socket:
        given.append(timeout)
        under_way.wait()
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", dead)
    peers = {f"10.0.0.{n}": (f"10.0.0.{n}", 5000) for n in range(12)}
    assert reach(peers) == dict.fromkeys(peers, "timed out") and given == [5.0] * 12
    assert reach({}) == {}


def test_silent_nodes_are_waited_for_as_long_as_the_answers_of_the_others_suggest() -> None:
    assert patience([], 32) == 120.0 and patience([3.0] * 15, 32) == 120.0, "fewer than half: a slow file system, perhaps"
    # Half of 32 had answered after 4 s: 15 s more. After 20 s: twice as long again. Never more than two minutes.
    assert patience([1.0] * 15 + [4.0] * 5, 32) == 19.0
    assert patience([20.0] * 16, 32) == 60.0 and patience([70.0] * 20, 32) == 120.0
    assert patience([2.0], 1) == 17.0 and patience([], 1) == 120.0


def test_nodes_that_join_late_are_waited_for() -> None:
    """By hand until the limit, whatever the pauses; of a launcher's until a quarter of a minute passes without a new one."""
    assert waits_on([0.0], 1700.0, wanted=2, limit=1800.0) and not waits_on([0.0], 1800.0, wanted=2, limit=1800.0)
    assert not waits_on([0.0, 900.0], 900.0, wanted=2, limit=1800.0), "all are there"
    assert waits_on([0.0, 9.0], 23.9, wanted=32, limit=None) and not waits_on([0.0, 9.0], 24.0, wanted=32, limit=None)
    assert waits_on([0.0, 50.0], 59.9, wanted=32, limit=None) and not waits_on([0.0, 50.0], 60.0, wanted=32, limit=None)


def test_actors_that_ask_have_the_jobs_environment() -> None:
    job = {"no_proxy": "10.0.0.0/8", "NCCL_SOCKET_IFNAME": "eth0"}
    assert scouts_variables(job, Path("/slime")) == {**job, "PYTHONPATH": "${PYTHONPATH}:/slime"}
    assert scouts_variables({"PYTHONPATH": "/plugins"}, Path("/slime")) == {"PYTHONPATH": "/plugins:/slime"}


def test_other_versions_than_the_pinned_ones_are_said_and_no_fault() -> None:
    pinned = pins("gpu")
    assert pinned["sglang"] == "0.5.23" and pins("cpu")["megatron-core"] == "0.16.1" and pins("none") == {}
    findings = Findings()
    judge(cluster(lambda node: node), replace(WANTED, pins=pinned), findings)
    assert findings.launchable and findings.of("unchecked") == []  # "+cu130" is the same version
    findings = Findings()
    older = [replace(node, packages={**node.packages, "sglang": "0.5.17"}) for node in cluster(lambda node: node)]
    judge(older, replace(WANTED, pins=pinned), findings)
    [said] = findings.of("unchecked")
    assert findings.launchable and said.values == f"sglang 0.5.17, pinned {pinned['sglang']} (4 of 4 nodes)"


def test_main_memory_is_what_the_container_may_have(tmp_path: Path) -> None:
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    assert memory_gb(meminfo, limit) == 0.0
    meminfo.write_text("MemFree: 7 kB\nMemTotal:       2000000000 kB\n")
    assert memory_gb(meminfo, limit) == pytest.approx(2048.0)
    limit.write_text("max\n")
    assert memory_gb(meminfo, limit) == pytest.approx(2048.0)
    limit.write_text("549755813888\n")
    assert memory_gb(meminfo, limit) == pytest.approx(549.755813888)


def test_of_a_containers_memory_its_own_programs_hold_some_and_not_those_of_the_machine(tmp_path: Path) -> None:
    assert taken_gb(600 * 10**9, tmp_path) == 600
    (tmp_path / "memory.current").write_text("50000000000\n")
    (tmp_path / "memory.stat").write_text("anon 20000000000\ninactive_file 30000000000\nactive_file 0\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert taken_gb(600 * 10**9, tmp_path) == 600
    (tmp_path / "memory.max").write_text("549755813888\n")
    assert taken_gb(600 * 10**9, tmp_path) == 20


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
    written = ["--save", str(tmp_path / "out" / "run"), "--kernel-cache", str(tmp_path / "kernels")]
    wanted = wanted_of(read([*flags, *written], Findings()), {})
    assert wanted.paths == (str(tmp_path), str(tmp_path / "out"))
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


def test_checkouts_differ_by_a_file_and_not_by_where_they_are(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "slime" / "ray").mkdir(parents=True)
        (tmp_path / name / "slime" / "ray" / "run.py").write_text("x = 1\n")
        (tmp_path / name / "slime" / "notes.txt").write_text(name)
    assert source_digest(tmp_path / "a") == source_digest(tmp_path / "b")
    (tmp_path / "b" / "slime" / "ray" / "run.py").write_text("x = 2\n")
    assert source_digest(tmp_path / "a") != source_digest(tmp_path / "b")


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


def test_nodes_are_counted_by_the_gpus_that_they_have(tmp_path: Path) -> None:
    """256 GPUs are 64 nodes of 4, to the launcher, the engines' layout and the preflight alike."""
    recipe = recorded("run-glm5.2-744B-A40B.sh", tmp_path, NUM_NODES="64", NUM_GPUS="4")
    wanted = wanted_of(read(recipe.written(tmp_path), Findings()), recipe.env)
    assert (wanted.num_nodes, wanted.gpus_per_node) == (64, 4)
