"""--preflight: ask every node of the running Ray cluster, through one actor each, and name the bad ones.

RAY_ADDRESS=... python3 -m slime.rehearse --preflight FLAGS OF THE RUN
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from slime.rehearse.findings import Findings
from slime.rehearse.node_facts import NodeFacts, Wanted, clock_offset, gather, judge, listen, reach
from slime.rehearse.reading import Reading, read


def wanted_of(reading: Reading) -> Wanted:
    """The run's needs, from its flags and from SOCKET_IFNAME."""
    config = reading.config
    cluster = config.cluster
    devices = str(config.engine.sglang.get("disaggregation_ib_device", ""))
    folders = {
        str(Path(path).parent)
        for path in (config.checkpoint.hf_checkpoint, config.checkpoint.save, config.checkpoint.load)
        if path
    }
    needed = max(cluster.actor_num_nodes * cluster.actor_num_gpus_per_node, cluster.rollout_num_gpus or 0)
    if not cluster.colocate:
        needed = cluster.actor_num_nodes * cluster.actor_num_gpus_per_node + (cluster.rollout_num_gpus or 0)
    return Wanted(
        num_nodes=max(1, needed // max(cluster.num_gpus_per_node, 1)),
        gpus_per_node=min(cluster.num_gpus_per_node, max(needed, 1)),
        interface=os.environ.get("SOCKET_IFNAME"),
        ib_devices=tuple(name for name in re.split(r"[,\s]+", devices) if name and not name.startswith("{")),
        paths=tuple(sorted(folders)),
        ports=(15000, 15001),
    )


def ask_nodes(wanted: Wanted) -> list[NodeFacts]:
    """Facts of every live node of the cluster that `ray` is connected to."""
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

        def facts(self, address: str, wanted: Wanted, seeds: dict[str, str]) -> NodeFacts:
            return gather(address, wanted, seeds)

        def reach(self, targets: dict[str, int]) -> dict[str, str]:
            return reach(targets)

    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"])
    scouts = {
        node["NodeManagerAddress"]: Scout.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in nodes
    }
    seeds = _seed(wanted.paths)
    try:
        ports = dict(zip(scouts, ray.get([scout.port.remote() for scout in scouts.values()]), strict=True))
        facts = ray.get([scout.facts.remote(address, wanted, seeds) for address, scout in scouts.items()])
        offsets = [clock_offset(lambda scout=scout: ray.get(scout.clock.remote())) for scout in scouts.values()]
        cut_off = ray.get(
            [
                scout.reach.remote({other: port for other, port in ports.items() if other != address})
                for address, scout in scouts.items()
            ]
        )
    finally:
        for seed in seeds.values():
            Path(seed).unlink(missing_ok=True)
        for scout in scouts.values():
            ray.kill(scout)
    return [
        replace(fact, clock_offset=offset, unreachable=missing)
        for fact, offset, missing in zip(facts, offsets, cut_off, strict=True)
    ]


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


def main(argv: Sequence[str], *, json_file: str | None = None) -> int:
    """Exit status 0 when every node is fit, else 1."""
    import ray

    findings = Findings()
    wanted = wanted_of(read(argv, Findings()))
    ray.init(
        address=os.environ.get("RAY_ADDRESS", "auto"),
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
    )
    try:
        nodes = ask_nodes(wanted)
    finally:
        ray.shutdown()
    judge(nodes, wanted, findings)
    for finding in findings.items:
        sys.stdout.write(finding.line() + "\n")
    if json_file:
        Path(json_file).write_text(
            json.dumps(
                {
                    "nodes": [{**vars(node), "gpus": [vars(gpu) for gpu in node.gpus]} for node in nodes],
                    "findings": [vars(finding) for finding in findings.items],
                },
                indent=1,
            )
            + "\n"
        )
    sys.stdout.write("every node is fit\n" if findings.launchable else "NOT FIT: see the nodes named above\n")
    return 0 if findings.launchable else 1
