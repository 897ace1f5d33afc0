"""What one node says about itself, and the verdict over all of them. The judging part is pure."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import platform
import shutil
import socket
import struct
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from slime.engine.imports import import_errors
from slime.rehearse.findings import Findings

PACKAGES = ("torch", "megatron-core", "sglang", "ray", "transformers", "numpy", "sglang-router")
PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
NO_PROXY = ("no_proxy", "NO_PROXY")
SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface."""
MAX_SKEW_SECONDS = 1.0
MIN_SHM_GB = 16.0
"""With GPUs: NCCL's buffers and pinned host memory."""
MIN_SHM_HOST_GB = 0.5
"""Without: Ray's object store, in which rollouts and metrics travel; a node with less joins and dies."""
MIN_DISK_GB = 20.0
"""Torch comes from a shared file system that every node asks at once; less than the time that a node has to answer."""
MIN_FREE_SHARE = 0.95
"""Of a GPU's memory, before anything of ours runs."""


@dataclass(frozen=True)
class Gpu:
    name: str
    driver: str
    total_mb: int
    free_mb: int


@dataclass(frozen=True)
class NodeFacts:
    name: str
    """The node's address; behind it its name where several nodes share an address."""
    host: str
    gpus: tuple[Gpu, ...]
    interfaces: Mapping[str, str]
    """Network interface -> its IPv4 address, "" without one."""
    ib_devices: Mapping[str, str]
    """RDMA device -> state of its ports ("ACTIVE" when all are)."""
    clock_offset: float
    """Seconds ahead of the driver, half the round trip taken off."""
    shared: Mapping[str, str]
    """Path -> "" when it can be read, written and renamed here, else why not."""
    shm_free_gb: float
    disk_free_gb: float
    busy_ports: tuple[int, ...]
    proxies: Mapping[str, str]
    """Proxy variables that are set, `no_proxy` among them."""
    packages: Mapping[str, str]
    python: str
    unreachable: Mapping[str, str] = field(default_factory=dict)
    """Other node's name -> the error of connecting to it."""
    unloadable: Mapping[str, str] = field(default_factory=dict)
    """Python module -> the error of importing it."""
    memory_gb: float = 0.0
    """Main memory; 0 where the node does not say."""

    @property
    def address(self) -> str:
        return self.name.split()[0]


@dataclass(frozen=True)
class Wanted:
    """What the run needs of every node."""

    num_nodes: int
    gpus_per_node: int
    """0 where CPUs compute."""
    interface: str | None
    ib_devices: tuple[str, ...]
    paths: tuple[str, ...]
    ports: tuple[int, ...]
    modules: tuple[str, ...] = ()
    """Python modules that the engines import only when they come up."""
    read_only: tuple[str, ...] = ()
    """Folders that are read and never written."""
    gpu_gb: float = 0.0
    """What the largest phase of the plan needs of a GPU; 0 where no plan could be made."""
    host_gb: float = 0.0
    """The same of a node's main memory."""
    hopper: bool = False
    """The plan's kernels (FP8, sparse attention, DeepEP) need compute capability 9 or above."""


def gather(name: str, wanted: Wanted, seed_path: Mapping[str, str]) -> NodeFacts:
    """Everything of this node but its clock and its reach, which take two. seed_path: path -> the driver's file there."""
    return NodeFacts(
        name=name,
        host=socket.gethostname(),
        gpus=_gpus(),
        interfaces={interface: _ipv4_of(interface) for _, interface in socket.if_nameindex()},
        ib_devices=rdma_devices(Path("/sys/class/infiniband")),
        clock_offset=0.0,
        shared={
            path: try_shared(path, seed_path.get(path)) if path in wanted.paths else try_read(path, seed_path.get(path))
            for path in sorted({*wanted.paths, *wanted.read_only})
        },
        shm_free_gb=_free_gb("/dev/shm"),
        disk_free_gb=_free_gb("/tmp"),
        busy_ports=tuple(port for port in wanted.ports if _is_busy(port)),
        proxies={name: os.environ[name] for name in PROXIES + NO_PROXY if os.environ.get(name)},
        packages={name: _version(name) for name in PACKAGES},
        python=platform.python_version(),
        unloadable=import_errors(wanted.modules),
        memory_gb=_memory_gb(Path("/proc/meminfo")),
    )


def _memory_gb(meminfo: Path) -> float:
    if not meminfo.is_file():
        return 0.0
    total = next((line for line in meminfo.read_text().splitlines() if line.startswith("MemTotal:")), "")
    return int(total.split()[1]) * 1024 / 1e9 if total else 0.0


def _gpus() -> tuple[Gpu, ...]:
    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.free", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ()
    rows = [line.split(", ") for line in out.stdout.splitlines() if line.count(", ") == 3]
    return tuple(Gpu(name, driver, int(total), int(free)) for name, driver, total, free in rows)


def _ipv4_of(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def rdma_devices(folder: Path) -> dict[str, str]:
    """Name -> "ACTIVE", or the states of the ports that are not (the kernel writes "4: ACTIVE")."""
    if not folder.is_dir():
        return {}
    found = {}
    for device in sorted(folder.iterdir()):
        states = {file.read_text().partition(":")[2].strip() for file in device.glob("ports/*/state")}
        found[device.name] = ", ".join(sorted(states - {"ACTIVE"})) or "ACTIVE"
    return found


def _free_gb(path: str) -> float:
    return shutil.disk_usage(path).free / 1e9 if os.path.isdir(path) else 0.0


def _is_busy(port: int) -> bool:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("", port))
        except OSError:
            return True
    return False


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def try_shared(path: str, seed: str | None) -> str:
    """Read the driver's file, write one, rename it (a rename completes a checkpoint), delete it. Returns the error, or ""."""
    try:
        if seed is not None and not Path(seed).exists():
            return f"the file that the driver wrote there ({seed}) is not visible"
        mine = Path(path) / f".rehearse-{uuid.uuid4().hex}"
        mine.write_text("x")
        renamed = mine.with_suffix(".renamed")
        mine.rename(renamed)
        renamed.unlink()
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def try_read(path: str, seed: str | None) -> str:
    """Look into a folder that is only read: the driver's file is there, if it could write one. Returns the error, or ""."""
    try:
        if seed is not None and not Path(seed).exists():
            return f"the file that the driver wrote there ({seed}) is not visible"
        next(os.scandir(path), None)
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def listen() -> socket.socket:
    """A port of the node's own choosing for the others to connect to."""
    one = socket.socket()
    one.bind(("", 0))
    one.listen(64)
    return one


def reach(targets: Mapping[str, tuple[str, int]], timeout: float = 5.0) -> dict[str, str]:
    """Name -> error, for those whose (address, port) cannot be connected to."""
    failed = {}
    for name, target in targets.items():
        try:
            socket.create_connection(target, timeout=timeout).close()
        except OSError as error:
            failed[name] = str(error)
    return failed


def clock_offset(ask: Callable[[], float]) -> float:
    """How far the other clock is ahead, from the quickest of five questions."""
    best = None
    for _ in range(5):
        before = time.time()
        theirs = ask()
        after = time.time()
        if best is None or after - before < best[0]:
            best = (after - before, theirs - (before + after) / 2)
    return best[1]


def judge(nodes: Sequence[NodeFacts], wanted: Wanted, findings: Findings, *, silent: Mapping[str, str] | None = None) -> None:
    """One finding per question over all nodes; a violation names the bad ones. silent: node -> why it gave no answer."""
    silent = silent or {}
    count = len(nodes) + len(silent)
    there = f"{count} {'node is' if count == 1 else 'nodes are'} in the Ray cluster"
    findings.check(
        count == wanted.num_nodes,
        "nodes",
        there,
        wrong=f"{there}, the run wants {wanted.num_nodes}",
        values=", ".join([*(node.name for node in nodes), *silent][:40]),
        fix="join the missing nodes, or remove the extra ones",
    )
    findings.check(
        not silent,
        "nodes",
        "every node answers",
        wrong=f"{len(silent)} of {count} nodes did not answer",
        values="; ".join(f"{name}: {why}" for name, why in list(silent.items())[:8]),
        fix="look into Ray's logs on the named nodes (a broken environment, a full disk?), or drain them",
    )
    hosts: dict[str, set[str]] = {}
    for node in nodes:
        hosts.setdefault(node.address, set()).add(node.host)
    twins = {address: names for address, names in hosts.items() if len(names) > 1}
    findings.check(
        not twins,
        "nodes",
        "every machine has an address of its own",
        wrong=f"{len(twins)} addresses are those of several machines",
        values="; ".join(f"{address}: {', '.join(sorted(names))}" for address, names in list(twins.items())[:8]),
        fix="give each machine its own address (ray start --node-ip-address)",
    )
    for question in _questions(nodes, wanted):
        if question.unasked:
            findings.unchecked("nodes", question.unasked, "", question.fix)
            continue
        bad = {node.name: text for node in nodes if (text := question.problem(node))}
        findings.check(
            not bad,
            "nodes",
            question.name,
            wrong=f"{question.name}: not on {len(bad)} of {len(nodes)} nodes",
            values="; ".join(f"{node}: {text}" for node, text in list(bad.items())[:8]),
            fix=question.fix,
        )
    if count > 1:
        _judge_packages(nodes, findings)


@dataclass(frozen=True)
class _Question:
    name: str
    problem: Callable[[NodeFacts], str]
    """What is wrong with a node, "" for nothing."""
    fix: str
    unasked: str = ""
    """Why nothing can be said; "" otherwise."""


def _questions(nodes: Sequence[NodeFacts], wanted: Wanted) -> list[_Question]:
    questions = [
        _Question(
            "GPUs of one kind, as many as wanted" if wanted.gpus_per_node else "no GPUs, as the run computes on CPUs",
            lambda node: _gpu_problem(node, nodes, wanted),
            "drain the node, or change --actor-num-gpus-per-node",
        ),
        _Question(
            "the network interface is there",
            lambda node: _interface_problem(node, wanted.interface),
            "set SOCKET_IFNAME",
            "" if wanted.interface else "no network interface is named",
        ),
        _Question(
            "the RDMA devices are there and active",
            lambda node: _rdma_problem(node, wanted),
            "set IB_DEVICES to devices that every node has",
            "" if wanted.ib_devices else "no RDMA devices are named",
        ),
        _Question(
            "clocks agree",
            lambda node: f"{node.clock_offset:+.2f} s" if abs(node.clock_offset) > MAX_SKEW_SECONDS else "",
            "synchronise the clock (chrony, ntp)",
        ),
        _Question(
            "shared folders are seen, and written where the run writes",
            lambda node: "; ".join(f"{path}: {why}" for path, why in node.shared.items() if why),
            "mount the shared file system",
            "" if wanted.paths or wanted.read_only else "the flags name no folder",
        ),
        _Question("/dev/shm and /tmp have room", lambda node: _room_problem(node, wanted), "free space, or enlarge /dev/shm"),
        _Question(
            "ports are free",
            lambda node: ", ".join(map(str, node.busy_ports)),
            "end what listens there, or choose other ports",
        ),
        _Question(
            "no proxy stands between the nodes",
            lambda node: _proxy_problem(node, nodes),
            "unset the proxy variables, or list the cluster's addresses in no_proxy",
        ),
    ]
    if wanted.gpus_per_node:
        questions.append(_Question("GPU memory free", _memory_problem, "end what else uses the GPUs (nvidia-smi names it)"))
        questions.append(
            _Question(
                "GPUs are of a kind and size that the plan fits",
                lambda node: _kind_problem(node, wanted),
                "rehearse with --gpu-memory of these GPUs, and follow its fixes; FP8, sparse attention and DeepEP need Hopper",
            )
        )
    if wanted.host_gb and any(node.memory_gb for node in nodes):
        questions.append(
            _Question(
                f"main memory of {wanted.host_gb:.0f} GB, which the plan takes",
                lambda node: f"{node.memory_gb:.0f} GB" if 0 < node.memory_gb < wanted.host_gb else "",
                "lower --optimizer-offload-fraction, or use more nodes",
            )
        )
    questions.append(
        _Question(
            "packages are there",
            lambda node: ", ".join(f"no {name}" for name in PACKAGES if node.packages.get(name) == "-"),
            "run scripts/setup.sh on the named nodes",
        )
    )
    if wanted.modules:
        questions.append(
            _Question(
                f"{', '.join(wanted.modules)} can be imported",
                lambda node: "; ".join(f"{module}: {error}" for module, error in node.unloadable.items()),
                "run scripts/setup.sh there; a shared library that is missing is of another CUDA version or a system package",
            )
        )
    if len(nodes) > 1:
        questions.append(
            _Question(
                "every node reaches every other",
                lambda node: "; ".join(f"{to}: {why}" for to, why in node.unreachable.items()),
                "open the firewall between the nodes",
            )
        )
    return questions


def _gpu_problem(node: NodeFacts, nodes: Sequence[NodeFacts], wanted: Wanted) -> str:
    if len(node.gpus) != wanted.gpus_per_node:
        return f"{len(node.gpus)} GPUs, wanted {wanted.gpus_per_node or 'none'}"
    usual = Counter((gpu.name, gpu.driver) for each in nodes for gpu in each.gpus).most_common(1)
    odd = [f"{gpu.name} driver {gpu.driver}" for gpu in node.gpus if usual and (gpu.name, gpu.driver) != usual[0][0]]
    return f"{odd[0]}, the others have {usual[0][0][0]} driver {usual[0][0][1]}" if odd else ""


HOPPER = ("H100", "H200", "H800", "H20", "GH200", "B100", "B200", "B300", "GB200", "GB300")
"""In the names of GPUs of compute capability 9 and above."""


def _kind_problem(node: NodeFacts, wanted: Wanted) -> str:
    small = [gpu for gpu in node.gpus if gpu.total_mb * 2**20 < wanted.gpu_gb * 1e9]
    if small:
        return (
            f"{small[0].name} has {small[0].total_mb * 2**20 / 1e9:.0f} GB, the plan's largest phase needs {wanted.gpu_gb:.1f}"
        )
    old = [gpu for gpu in node.gpus if wanted.hopper and not any(name in gpu.name.split() for name in HOPPER)]
    return f"{old[0].name} is no Hopper GPU" if old else ""


def _memory_problem(node: NodeFacts) -> str:
    full = [
        f"GPU {number} {gpu.free_mb} of {gpu.total_mb} MB free"
        for number, gpu in enumerate(node.gpus)
        if gpu.free_mb < MIN_FREE_SHARE * gpu.total_mb
    ]
    return ", ".join(full)


def _rdma_problem(node: NodeFacts, wanted: Wanted) -> str:
    states = {name: node.ib_devices.get(name, "missing") for name in wanted.ib_devices}
    return ", ".join(f"{name} {state}" for name, state in states.items() if state != "ACTIVE")


def _room_problem(node: NodeFacts, wanted: Wanted) -> str:
    said = []
    shm = MIN_SHM_GB if wanted.gpus_per_node else MIN_SHM_HOST_GB
    if node.shm_free_gb < shm:
        said.append(f"/dev/shm {node.shm_free_gb:.1f} GB free, wanted {shm:g}")
    if node.disk_free_gb < MIN_DISK_GB:
        said.append(f"/tmp {node.disk_free_gb:.1f} GB free, wanted {MIN_DISK_GB:g}")
    return ", ".join(said)


def _interface_problem(node: NodeFacts, interface: str | None) -> str:
    if not interface:
        return ""
    if interface not in node.interfaces:
        return f"no {interface}; has {', '.join(node.interfaces)}"
    return "" if node.interfaces[interface] else f"{interface} has no IPv4 address"


def _proxy_problem(node: NodeFacts, nodes: Sequence[NodeFacts]) -> str:
    """A proxy that would get requests to some other node."""
    proxies = {name: value for name, value in node.proxies.items() if name in PROXIES}
    rules = ",".join(value for name, value in node.proxies.items() if name in NO_PROXY)
    caught = [other.address for other in nodes if not bypasses(other.address, rules)]
    if not proxies or not caught:
        return ""
    return ", ".join(f"{name}={value}" for name, value in proxies.items()) + f" for {caught[0]}"


def bypasses(address: str, rules: str) -> bool:
    """Does no_proxy (addresses, networks, name endings, *) cover the address?"""
    for rule in (part.strip() for part in rules.split(",")):
        if rule == "*" or rule == address or (rule and address.endswith("." + rule.lstrip("."))):
            return True
        try:
            if ipaddress.ip_address(address) in ipaddress.ip_network(rule, strict=False):
                return True
        except ValueError:
            continue
    return False


def _judge_packages(nodes: Sequence[NodeFacts], findings: Findings) -> None:
    wrong = []
    for package in (*PACKAGES, "python"):
        found = {node.name: node.python if package == "python" else node.packages.get(package, "-") for node in nodes}
        usual = Counter(found.values()).most_common(1)
        wrong += [f"{name}: {package} {has}, the others {usual[0][0]}" for name, has in found.items() if has != usual[0][0]]
    findings.check(
        not wrong,
        "nodes",
        "package versions are equal on all nodes",
        wrong=f"package versions differ on {len({text.split(': ')[0] for text in wrong})} nodes",
        values="; ".join(wrong[:8]),
        fix="run scripts/setup.sh on the named nodes",
    )
