"""The verdict over what all nodes said: one finding per question, the bad nodes named. Pure."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from slime.compat import megatron
from slime.engine.versions import OLDEST, release_key
from slime.observability import packages
from slime.observability.packages import PACKAGES
from slime.preflight.facts import NO_PROXY, PROXIES, NodeFacts, Wanted
from slime.rehearse.findings import Findings

MAX_SKEW_SECONDS = 1.0
MIN_SHM_GB = 16.0
"""With GPUs: NCCL's buffers and pinned host memory."""
MIN_SHM_HOST_GB = 0.5
"""Without: Ray's object store, in which rollouts and metrics travel; a node with less joins and dies."""
MIN_DISK_GB = 20.0
MIN_FREE_SHARE = 0.95
"""Of a GPU's memory, before anything of ours runs."""
HOPPER = ("H100", "H200", "H800", "H20", "GH200", "B100", "B200", "B300", "GB200", "GB300")
"""In the names of GPUs of compute capability 9 and above."""


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
        values=", ".join([*(node.name for node in nodes), *silent]),
        fix="join the missing nodes, or remove the extra ones",
    )
    findings.check(
        not silent,
        "nodes",
        "every node answers",
        wrong=f"{len(silent)} of {count} nodes did not answer",
        values=_told(silent),
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
        values=_told({address: ", ".join(sorted(names)) for address, names in twins.items()}),
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
            values=_told(bad),
            fix=question.fix,
        )
    if count > 1:
        _judge_packages(nodes, findings)
    _compare_with_pins(nodes, wanted, findings)


def _told(bad: Mapping[str, str], *, most: int = 8) -> str:
    """Every bad node, the first of them with what is wrong."""
    first = "; ".join(f"{name}: {why}" for name, why in list(bad.items())[:most])
    return first + (f"; and {', '.join(list(bad)[most:])}" if len(bad) > most else "")


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
                lambda node: _main_memory_problem(node, wanted.host_gb),
                "end what else runs there, lower --optimizer-offload-fraction, or use more nodes",
            )
        )
    questions.append(
        _Question(
            "packages are there",
            lambda node: ", ".join(f"no {name}" for name in PACKAGES if node.packages.get(name) == "-"),
            "run scripts/setup.sh on the named nodes",
        )
    )
    questions.append(
        _Question(
            "packages are of versions that this project runs with",
            _version_problem,
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
                lambda node: _told(node.unreachable, most=2),
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


def _kind_problem(node: NodeFacts, wanted: Wanted) -> str:
    small = [gpu for gpu in node.gpus if gpu.total_mb * 2**20 < wanted.gpu_gb * 1e9]
    if small:
        return (
            f"{small[0].name} has {small[0].total_mb * 2**20 / 1e9:.0f} GB, the plan's largest phase needs {wanted.gpu_gb:.1f}"
        )
    old = [gpu for gpu in node.gpus if wanted.hopper and not any(name in gpu.name.split() for name in HOPPER)]
    return f"{old[0].name} is no Hopper GPU" if old else ""


def _main_memory_problem(node: NodeFacts, wanted_gb: float) -> str:
    if not node.memory_gb or node.memory_gb - node.memory_taken_gb >= wanted_gb:
        return ""
    taken = f", of which other programs hold {node.memory_taken_gb:.0f}" if node.memory_gb >= wanted_gb else ""
    return f"{node.memory_gb:.0f} GB{taken}"


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


def _version_problem(node: NodeFacts) -> str:
    said = []
    sglang, core = node.packages.get("sglang", "-"), node.packages.get("megatron-core", "-")
    if sglang != "-" and release_key(sglang) < release_key(OLDEST):
        said.append(f"sglang {sglang}, wanted {OLDEST} or later")
    if core != "-" and not megatron.OLDEST <= release_key(core)[:3] <= megatron.NEWEST:
        oldest, newest = ".".join(map(str, megatron.OLDEST)), ".".join(map(str, megatron.NEWEST[:2]))
        said.append(f"megatron-core {core}, wanted {oldest} to {newest}.x")
    return ", ".join(said)


def _compare_with_pins(nodes: Sequence[NodeFacts], wanted: Wanted, findings: Findings) -> None:
    """Others may do as well, and nobody has tried them together: said, and no fault."""
    others = Counter(
        f"{package} {found}, pinned {pin}"
        for node in nodes
        for package, pin in wanted.pins.items()
        if (found := node.packages.get(package, "-").partition("+")[0]) not in ("-", pin)
    )
    if others:
        findings.unchecked(
            "nodes",
            "whether packages of other versions than the pinned ones go together",
            "; ".join(f"{words} ({count} of {len(nodes)} nodes)" for words, count in others.most_common(8)),
            "run scripts/setup.sh on the nodes",
        )


def _judge_packages(nodes: Sequence[NodeFacts], findings: Findings) -> None:
    wrong = packages.differences({node.name: node.packages for node in nodes})
    findings.check(
        not wrong,
        "nodes",
        "package versions are equal on all nodes",
        wrong=f"package versions differ on {len(wrong)} nodes",
        values=_told(wrong),
        fix=packages.REMEDY,
    )
