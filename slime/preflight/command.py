"""Ask every node of the running Ray cluster, through one actor each, and name the bad ones.

    RAY_ADDRESS=... python3 -m slime.preflight [--json FILE] [--logical-gpus] ... FLAGS OF THE RUN

Exit status: 0 every node is fit, 1 with every fault listed, 2 when the command's own flags are wrong.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from slime.config.engine_sizes import merged
from slime.engine.imports import needed
from slime.engine.ports import FIRST_PORT
from slime.preflight.facts import NodeFacts, Wanted, clock_offset, gather, judge, listen, reach
from slime.rehearse.findings import Findings
from slime.rehearse.options import Options
from slime.rehearse.own_flags import check_outputs, job_environment, number, one, split_own, usage
from slime.rehearse.reading import Reading, read
from slime.rehearse.result import rehearse

ANSWER_SECONDS = 120.0
"""A node that says nothing for so long is named as silent."""
JOIN_SECONDS = 60.0
TELL_SECONDS = 15.0
OWN = {
    "--json": ("FILE", "write what the nodes said and the findings as JSON"),
    "--runtime-env": ("JSON", "environment of the job as the launcher passes it to Ray"),
    "--logical-gpus": ("", "the nodes' device slots stand for no GPU, their CPUs compute"),
    "--join-seconds": ("SECONDS", "how long the nodes may take to join (default 60)"),
    "--preflight": ("", "what launchers call all this by; it has no meaning of its own"),
}
INTERFACE_VARIABLES = ("SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def wanted_of(reading: Reading, env: Mapping[str, str], *, logical_gpus: bool = False) -> Wanted:
    """The run's needs, from its flags and from the interface that `env` names (this process's and the job's variables).

    logical_gpus: the device slots stand for no GPU, as in a run on CPUs.
    """
    config = reading.config
    cluster = config.cluster
    devices = str(config.engine.sglang.get("disaggregation_ib_device", ""))
    groups = [group for model in config.engine.groups for group in model.server_groups if group.worker_type != "placeholder"]
    modules = needed(
        [merged(config.engine.sglang, group.overrides) for group in groups],
        disaggregated=any(group.worker_type in ("prefill", "decode") for group in groups),
        on_cuda=not logical_gpus,
    )
    written = {_existing(Path(path).parent) for path in (config.checkpoint.save,) if path}
    read_only = {
        _existing(Path(path).parent)
        for path in (config.checkpoint.hf_checkpoint, config.checkpoint.load, config.data.prompt_data)
        if path
    }
    return Wanted(
        num_nodes=reading.num_nodes,
        gpus_per_node=0 if logical_gpus else min(cluster.num_gpus_per_node, max(reading.num_gpus, 1)),
        interface=next((env[name] for name in INTERFACE_VARIABLES if env.get(name)), None),
        ib_devices=tuple(name for name in re.split(r"[,\s]+", devices) if name and not name.startswith("{")),
        paths=tuple(sorted(written)),
        read_only=tuple(sorted(read_only - written)),
        ports=(FIRST_PORT, FIRST_PORT + 1),
        modules=tuple(modules),
    )


def with_plan(wanted: Wanted, argv: Sequence[str], *, env: Mapping[str, str] | None) -> Wanted:
    """What the plan takes of GPUs and main memory, where the flags make one; nothing for a run on CPUs."""
    if not wanted.gpus_per_node:
        return wanted
    plan = rehearse(argv, Options(build_ranks=False, env=env))
    hf, budget = plan.reading.hf, plan.budget
    if hf is None or budget is None:
        return wanted
    deepep = any(str(spec.settings.get("moe_a2a_backend")) == "deepep" for spec in plan.engines.specs)
    return replace(
        wanted,
        gpu_gb=max(stage.peak.total for stage in budget.stages) / 1e9,
        host_gb=sum(budget.node.rollout.values()) / 1e9,
        hopper=bool(hf.has_indexer or hf.get("quantization_config") or deepep),
    )


def _existing(folder: Path) -> str:
    """The folder, or the one above it that is there: checkpoints and data may be made later."""
    found = next((one for one in (folder, *folder.parents) if one.is_dir()), folder)
    return str(folder if found == Path(found.anchor) else found)


def node_names(nodes: Sequence[Mapping[str, object]]) -> list[str]:
    """Addresses; where several Ray nodes have the same one, with what tells them apart."""
    addresses = Counter(node["NodeManagerAddress"] for node in nodes)
    names = []
    for node in nodes:
        address, name = str(node["NodeManagerAddress"]), str(node.get("NodeName") or "")
        apart = name if name and name != address else str(node["NodeID"])[:8]
        names.append(f"{address} ({apart})" if addresses[address] > 1 else address)
    return names


def _wait_for_nodes(count: int, seconds: float) -> None:
    """Nodes join one after another, started by a launcher or by hand; who does not come is told by the verdict."""
    import ray

    started, told = time.monotonic(), 0.0
    while (there := sum(node["Alive"] for node in ray.nodes())) < count and (waited := time.monotonic() - started) < seconds:
        if waited >= told + TELL_SECONDS:
            told = waited
            sys.stderr.write(f"preflight: {there} of {count} nodes have joined ({waited:.0f} s, at most {seconds:.0f})\n")
        time.sleep(1.0)


def ask_nodes(wanted: Wanted) -> tuple[list[NodeFacts], dict[str, str]]:
    """(facts of every live node of the cluster that `ray` is connected to, the nodes that gave no answer and why)."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=0)
    class Scout:
        def __init__(self) -> None:
            self._listener = listen()

        def port(self) -> int:
            return self._listener.getsockname()[1]

        def clock(self) -> float:
            return time.time()

        def facts(self, name: str, wanted: Wanted, seeds: dict[str, str]) -> NodeFacts:
            return gather(name, wanted, seeds)

        def reach(self, targets: dict[str, tuple[str, int]]) -> dict[str, str]:
            return reach(targets)

    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"])
    scouts = {}
    for name, node in zip(node_names(nodes), nodes, strict=True):
        only_there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        scouts[name] = Scout.options(scheduling_strategy=only_there).remote()
    silent: dict[str, str] = {}

    def answers(asked: dict) -> dict:
        """Name -> answer, of those that answer in time; the others are silent from here on."""
        done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_SECONDS)
        found = {}
        for name, ref in asked.items():
            if ref not in done:
                silent[name] = f"no answer within {ANSWER_SECONDS:g} s"
                continue
            try:
                found[name] = ray.get(ref)
            except ray.exceptions.RayError as error:
                silent[name] = str(error).strip().splitlines()[-1][:200]
        return found

    seeds = _seed((*wanted.paths, *wanted.read_only))
    try:
        ports = answers({name: scout.port.remote() for name, scout in scouts.items()})
        facts = answers({name: scouts[name].facts.remote(name, wanted, seeds) for name in ports})
        offsets = {name: clock_offset(lambda name=name: ray.get(scouts[name].clock.remote())) for name in facts}
        targets = {name: (_control_address(fact, wanted), ports[name]) for name, fact in facts.items()}
        cut_off = answers(
            {
                name: scouts[name].reach.remote({other: target for other, target in targets.items() if other != name})
                for name in facts
            }
        )
    finally:
        for seed in seeds.values():
            Path(seed).unlink(missing_ok=True)
        for scout in scouts.values():
            ray.kill(scout)
    answered = [replace(facts[name], clock_offset=offsets[name], unreachable=cut_off[name]) for name in cut_off]
    return answered, silent


def _control_address(fact: NodeFacts, wanted: Wanted) -> str:
    """Where the others connect to: the named interface's address, which is not always the one that Ray uses."""
    return fact.interfaces.get(wanted.interface or "", "") or fact.address


def _seed(paths: Sequence[str]) -> dict[str, str]:
    """A file of the driver in each shared folder that exists here; the nodes must see it."""
    seeds = {}
    for path in paths:
        file = Path(path) / f".rehearse-driver-{uuid.uuid4().hex}"
        try:
            file.write_text("x")
            seeds[path] = str(file)
        except OSError:
            continue
    return seeds


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(usage(__doc__, OWN))
        return 0
    try:
        own, flags = split_own(argv, OWN)
        check_outputs(own, ("--json",))
        return preflight(
            flags,
            json_file=one(own, "--json"),
            env=job_environment(own),
            logical_gpus="--logical-gpus" in own,
            join_seconds=number(own, "--join-seconds", float) or JOIN_SECONDS,
        )
    except ValueError as error:
        sys.stderr.write(f"preflight: {error}\n")
        return 2


def preflight(
    argv: Sequence[str],
    *,
    json_file: str | None = None,
    env: Mapping[str, str] | None = None,
    logical_gpus: bool = False,
    join_seconds: float = JOIN_SECONDS,
) -> int:
    """Exit status 0 when every node is fit, else 1. env: the job's variables, as the launcher passes them."""
    import ray

    findings = Findings()
    # The job's environment wins over this shell's: it is what the run will have.
    wanted = with_plan(
        wanted_of(read(argv, Findings()), {**os.environ, **(env or {})}, logical_gpus=logical_gpus), argv, env=env
    )
    address = os.environ.get("RAY_ADDRESS", "auto")
    root = Path(__file__).resolve().parents[2]
    try:
        # The node's own variable first: its packages are what is asked for.
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(["${PYTHONPATH}", str(root)])}},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(f"no Ray cluster answers at RAY_ADDRESS={address} ({error}); start it first") from None
    try:
        _wait_for_nodes(wanted.num_nodes, join_seconds)
        nodes, silent = ask_nodes(wanted)
    finally:
        ray.shutdown()
    judge(nodes, wanted, findings, silent=silent)
    for finding in findings.items:
        sys.stdout.write(finding.line() + "\n")
    if json_file:
        told = {
            "nodes": [{**vars(node), "gpus": [vars(gpu) for gpu in node.gpus]} for node in nodes],
            "silent": silent,
            "findings": [vars(finding) for finding in findings.items],
        }
        Path(json_file).write_text(json.dumps(told, indent=1) + "\n")
    sys.stdout.write("every node is fit\n" if findings.launchable else "NOT FIT: see the nodes named above\n")
    return 0 if findings.launchable else 1
