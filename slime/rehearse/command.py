"""The command line: the run's flags, plus a few of the rehearsal's own.

    python3 -m slime.rehearse [--json FILE] [--html FILE] [--gpu-memory GB] ... FLAGS OF THE RUN
    python3 -m slime.rehearse --plan --nodes 16 --gpu h200 FLAGS OF THE RUN

Exit status: 0 launchable (or planned), 1 with every violation listed (or nothing fits), 2 when the rehearsal's own flags are
wrong, 3 when nothing is wrong and something that decides was not at hand.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from slime.engine.versions import TABLE, pinned_version
from slime.rehearse.advice.plan import make_plan
from slime.rehearse.advice.variants import Bench, Variant
from slime.rehearse.findings import EXIT_STATUS
from slime.rehearse.model.rates import GPUS, rates_of, with_rates
from slime.rehearse.options import Options
from slime.rehearse.own_flags import check_outputs, job_environment, number, one, save, say, split_own, usage
from slime.rehearse.report.plan import plan_as_json, plan_as_text
from slime.rehearse.report.text import as_json, as_text
from slime.rehearse.result import Rehearsal, rehearse

MOST_PLANNED = 1024
"""Nodes of a plan: beyond, the search over layouts takes minutes."""

OWN = {
    "--json": ("FILE", "write everything as JSON"),
    "--html": ("FILE", "write the report with its pictures, one self-contained file"),
    "--weight-map": ("FILE", "write the weight map, one line per tensor"),
    "--plan": ("", "search layouts, engines and batch for a cluster, and print the best with the lines to paste"),
    "--nodes": ("N", f"nodes of the plan, at most {MOST_PLANNED:,} (default: those of the flags)"),
    "--gpu": ("KIND", f"kind of the GPUs, whose memory and rates are taken: {', '.join(GPUS)} (default h100)"),
    "--gpu-memory": ("GB", "memory of one GPU, where it is not its kind's"),
    "--host-memory": ("GB", "main memory of one node (2000)"),
    "--checkpoint-index": ("FILE", "model.safetensors.index.json to check against the weight map"),
    "--hostfile": ("FILE", "addresses of the other nodes, first column (default: the environment variable HOSTFILE)"),
    "--engine-version": ("VERSION", "SGLang of the cluster (default: the one pinned in scripts/constraints/gpu.txt)"),
    "--sequence-tokens": ("N", "length of the sequence that FLOPs are for (default: the longest that the flags allow)"),
    "--rate": ("NAME=VALUE", "replace an assumed rate; may be repeated"),
    "--assume": ("NAME=VALUE", "replace an assumption of the memory model; may be repeated"),
    "--runtime-env": ("JSON", "environment of the job as the launcher passes it to Ray"),
    "--measured": ("FILE", "memory.json of a run of these flags: its peaks stand beside the predicted ones"),
    "--expect-digest": ("HEX", "the weight map must have this digest (or begin with it)"),
    "--quick": ("", "flags, files, layout and engines alone"),
    "--no-ranks": ("", "leave out building all ranks"),
    "--rehearse": ("", "what launchers call all this by; it has no meaning of its own"),
}
OUTPUTS = ("--json", "--html", "--weight-map")


def options_of(own: dict[str, list[str]]) -> Options:
    gpu = one(own, "--gpu")
    if gpu is not None and gpu.lower() not in GPUS:
        raise ValueError(f"--gpu {gpu} is not known; it is one of {', '.join(GPUS)}, or give --gpu-memory and --rate")
    gpu = gpu.lower() if gpu is not None else None
    return Options(
        gpu=gpu,
        gpu_memory_gb=number(own, "--gpu-memory", float, most=1e5) or GPUS[gpu or "h100"].memory_gb,
        host_memory_gb=number(own, "--host-memory", float, most=1e7) or 2000.0,
        checkpoint_index=one(own, "--checkpoint-index"),
        hostfile=one(own, "--hostfile") or os.environ.get("HOSTFILE"),
        head=os.environ.get("MASTER_ADDR"),
        engine_version=one(own, "--engine-version"),
        length=number(own, "--sequence-tokens", int),
        rates=tuple(own.get("--rate", ())),
        assume=tuple(own.get("--assume", ())),
        env=job_environment(own),
        build_ranks="--no-ranks" not in own,
        quick="--quick" in own,
        expect_digest=one(own, "--expect-digest"),
        measured=one(own, "--measured"),
    )


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(usage(__doc__, OWN))
        return 0
    try:
        own, flags = split_own(argv, OWN, repeated=("--rate", "--assume"))
        check_outputs(own, OUTPUTS)
        options = options_of(own)
        if "--plan" in own:
            return _plan(flags, own, options)
        if "--nodes" in own:
            raise ValueError("--nodes is of --plan; the run's own nodes are --actor-num-nodes")
        done = rehearse(flags, options)
        _report(done, own)
    except ValueError as error:
        sys.stderr.write(f"rehearse: {error}\n")
        return 2
    return EXIT_STATUS[done.findings.verdict]


def _report(done: Rehearsal, own: dict[str, list[str]]) -> None:
    """Files first: a terminal that is gone does not cost them."""
    if "--json" in own:
        save(own, "--json", json.dumps(as_json(done), indent=1) + "\n")
    if "--weight-map" in own and done.weights is not None:
        save(own, "--weight-map", "".join(row.canonical() + "\n" for row in done.weights.rows))
    if "--html" in own:
        from slime.rehearse.report.page import as_html

        save(own, "--html", as_html(done))
    say(as_text(done))


def _plan(flags: Sequence[str], own: dict[str, list[str]], options: Options) -> int:
    """The plan instead of the rehearsal; each passes the rehearsal before it is printed."""
    if unused := [name for name in ("--html", "--weight-map", "--measured", "--expect-digest") if name in own]:
        raise ValueError(f"{unused[0]} is not of --plan; paste a plan's lines and rehearse them with it")
    options = replace(options, build_ranks=False, weight_map=False, curves=False)
    with tempfile.TemporaryDirectory(prefix="slime-rehearse-") as folder:
        version = options.engine_version or pinned_version() or TABLE[-1].version
        bench = Bench(tuple(flags), options, with_rates(rates_of(options.gpu), options.rates), version, Path(folder))
        found = make_plan(
            bench,
            nodes=number(own, "--nodes", int, most=MOST_PLANNED) or bench.read(Variant())[0].config.cluster.actor_num_nodes,
            gpu=options.gpu or "h100",
            judge=lambda words: rehearse(words, options).findings.verdict != "not launchable",
        )
    if "--json" in own:
        save(own, "--json", json.dumps(plan_as_json(found), indent=1) + "\n")
    say(plan_as_text(found))
    return 0 if found.plans else 1
