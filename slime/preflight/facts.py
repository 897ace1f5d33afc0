"""What one node says about itself, asked there. What it means is for `slime.preflight.judge` to say."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from slime.engine.imports import import_errors
from slime.observability import packages
from slime.ray.interfaces import ipv4_of

PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
NO_PROXY = ("no_proxy", "NO_PROXY")
REACH_SECONDS = 5.0
"""To connect to another node."""


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
    """With "python", and "slime" by its sources."""
    unreachable: Mapping[str, str] = field(default_factory=dict)
    """Other node's name -> the error of connecting to it."""
    unloadable: Mapping[str, str] = field(default_factory=dict)
    """Python module -> the error of importing it."""
    memory_gb: float = 0.0
    """Main memory; 0 where the node does not say."""
    memory_taken_gb: float = 0.0
    """Of it, what other programs hold before the run."""

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
    pins: Mapping[str, str] = field(default_factory=dict)
    """Package -> the version that scripts/setup.sh installs; empty where its lists are not at hand."""


def gather(name: str, wanted: Wanted, seed_path: Mapping[str, str]) -> NodeFacts:
    """Everything of this node but its clock and its reach, which take two. seed_path: path -> the driver's file there."""
    memory = psutil.virtual_memory()
    return NodeFacts(
        name=name,
        host=socket.gethostname(),
        gpus=_gpus(),
        interfaces={interface: ipv4_of(interface) for _, interface in socket.if_nameindex()},
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
        packages=packages.versions(),
        unloadable=import_errors(wanted.modules),
        memory_gb=memory_gb(Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")),
        memory_taken_gb=taken_gb(memory.total - memory.available, Path("/sys/fs/cgroup")),
    )


def memory_gb(meminfo: Path, limit: Path) -> float:
    """Of the machine, or what the container may have of it where that is less (cgroup v2's limit). 0 where nothing says."""
    lines = meminfo.read_text().splitlines() if meminfo.is_file() else []
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")]
    word = limit.read_text().strip() if limit.is_file() else "max"
    return min(sizes + ([int(word)] if word.isdecimal() else []), default=0) / 1e9


def taken_gb(of_machine: int, cgroup: Path) -> float:
    """What programs hold of the memory that `memory_gb` tells of: a container's own where it has a limit, and there without
    files that the kernel gives back (cgroup v2), else of_machine, bytes."""
    limit, current, stat = (cgroup / f"memory.{name}" for name in ("max", "current", "stat"))
    if not (limit.is_file() and limit.read_text().strip().isdecimal() and current.is_file() and stat.is_file()):
        return of_machine / 1e9
    files = sum(int(line.split()[1]) for line in stat.read_text().splitlines() if line.startswith("inactive_file "))
    return max(0, int(current.read_text()) - files) / 1e9


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


def reach(targets: Mapping[str, tuple[str, int]], timeout: float = REACH_SECONDS) -> dict[str, str]:
    """Name -> error, for those whose (address, port) cannot be connected to. All are asked at once: many that are dead take as
    long as one."""

    def error_of(target: tuple[str, int]) -> str:
        try:
            socket.create_connection(target, timeout=timeout).close()
        except OSError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(max(len(targets), 1)) as pool:
        return {name: error for name, error in zip(targets, pool.map(error_of, targets.values()), strict=True) if error}


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
