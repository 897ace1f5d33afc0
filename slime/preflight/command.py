"""Ask every node of the running Ray cluster, through one actor each, and name the bad ones.

    RAY_ADDRESS=... python3 -m slime.preflight [--json FILE] [--logical-gpus] ... FLAGS OF THE RUN

Exit status: 0 every node is fit, 1 with every fault listed, 2 when the command's own flags are wrong.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from slime.config.engine_sizes import merged
from slime.engine.imports import needed
from slime.engine.ports import FIRST_PORT
from slime.engine.versions import CONSTRAINTS
from slime.observability.packages import PACKAGES
from slime.preflight.ask import ask_nodes, wait_for_nodes
from slime.preflight.facts import Wanted
from slime.preflight.judge import judge
from slime.rehearse.findings import Findings
from slime.rehearse.options import Options
from slime.rehearse.own_flags import check_outputs, job_environment, number, one, save, say, split_own, usage
from slime.rehearse.reading import Reading, read
from slime.rehearse.result import rehearse

OWN = {
    "--json": ("FILE", "write what the nodes said and the findings as JSON"),
    "--runtime-env": ("JSON", "environment of the job as the launcher passes it to Ray"),
    "--logical-gpus": ("", "the nodes' device slots stand for no GPU, their CPUs compute"),
    "--join-seconds": ("SECONDS", "how long the nodes may take to join (default: 60, or 15 without a new one)"),
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
    written = {_existing(Path(path).parent) for path in (config.checkpoint.save, cluster.kernel_cache) if path}
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
        pins=pins("cpu" if logical_gpus else "gpu"),
    )


def pins(extra: str) -> dict[str, str]:
    """Package -> version, of those that nodes are asked for, in scripts/constraints/EXTRA.txt."""
    file = CONSTRAINTS.with_name(f"{extra}.txt")
    lines = file.read_text().splitlines() if file.is_file() else []
    return {name: wanted for name, _, wanted in (line.partition("==") for line in lines) if name in PACKAGES}


def with_plan(wanted: Wanted, argv: Sequence[str], *, env: Mapping[str, str] | None) -> Wanted:
    """What the plan takes of GPUs and main memory, where the flags make one; nothing for a run on CPUs."""
    if not wanted.gpus_per_node:
        return wanted
    plan = rehearse(argv, Options(build_ranks=False, curves=False, env=env))
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
            join_seconds=number(own, "--join-seconds", float),
        )
    except ValueError as error:
        sys.stderr.write(f"preflight: {error}\n")
        return 2


def scouts_variables(job: Mapping[str, str], root: Path) -> dict[str, str]:
    """The job's, so that proxies, libraries and packages are those of its own actors; the node's where the job says nothing."""
    return {**job, "PYTHONPATH": os.pathsep.join([job.get("PYTHONPATH", "${PYTHONPATH}"), str(root)])}


def preflight(
    argv: Sequence[str],
    *,
    json_file: str | None = None,
    env: Mapping[str, str] | None = None,
    logical_gpus: bool = False,
    join_seconds: float | None = None,
) -> int:
    """Exit status 0 when every node is fit, else 1. env: the job's variables, as the launcher passes them."""
    import ray

    findings, said = Findings(), Findings()
    reading = read(argv, said, env=env)
    if wrong := [finding.what for finding in said.of("violation") if finding.area == "flags"]:
        raise ValueError("; ".join(wrong))
    # The job's environment wins over this shell's: it is what the run will have.
    wanted = with_plan(wanted_of(reading, {**os.environ, **(env or {})}, logical_gpus=logical_gpus), argv, env=env)
    address = os.environ.get("RAY_ADDRESS", "auto")
    root = Path(__file__).resolve().parents[2]
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": scouts_variables(env or {}, root)},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(f"no Ray cluster answers at RAY_ADDRESS={address} ({error}); start it first") from None
    try:
        wait_for_nodes(wanted.num_nodes, join_seconds)
        nodes, silent = ask_nodes(wanted)
    finally:
        ray.shutdown()
    judge(nodes, wanted, findings, silent=silent)
    if json_file:
        told = {
            "nodes": [{**vars(node), "gpus": [vars(gpu) for gpu in node.gpus]} for node in nodes],
            "silent": silent,
            "findings": [vars(finding) for finding in findings.items],
        }
        save({"--json": [json_file]}, "--json", json.dumps(told, indent=1) + "\n")
    lines = [finding.line() for finding in findings.items]
    say("\n".join([*lines, "every node is fit" if findings.launchable else "NOT FIT: see the nodes named above"]) + "\n")
    return 0 if findings.launchable else 1
