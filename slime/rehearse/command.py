"""The command line: the run's flags, plus a few of the rehearsal's own.

    python3 -m slime.rehearse [--json FILE] [--html FILE] [--gpu-memory GB] ... FLAGS OF THE RUN

Exit status: 0 launchable, 1 with every violation listed, 2 when the rehearsal's own flags are wrong, 3 when nothing is wrong
and something that decides was not at hand.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from slime.rehearse.findings import EXIT_STATUS
from slime.rehearse.options import Options
from slime.rehearse.own_flags import check_outputs, job_environment, number, one, split_own, usage
from slime.rehearse.report.text import as_json, as_text
from slime.rehearse.result import rehearse

OWN = {
    "--json": ("FILE", "write everything as JSON"),
    "--html": ("FILE", "write the report with its pictures, one self-contained file"),
    "--weight-map": ("FILE", "write the weight map, one line per tensor"),
    "--gpu-memory": ("GB", "memory of one GPU (80 for H100, 141 for H200)"),
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
    return Options(
        gpu_memory_gb=number(own, "--gpu-memory", float) or 80.0,
        host_memory_gb=number(own, "--host-memory", float) or 2000.0,
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
        done = rehearse(flags, options)
    except ValueError as error:
        sys.stderr.write(f"rehearse: {error}\n")
        return 2
    sys.stdout.write(as_text(done))
    if "--json" in own:
        Path(own["--json"][0]).write_text(json.dumps(as_json(done), indent=1) + "\n")
    if "--weight-map" in own and done.weights is not None:
        Path(own["--weight-map"][0]).write_text("".join(row.canonical() + "\n" for row in done.weights.rows))
    if "--html" in own:
        from slime.rehearse.report.page import as_html

        Path(own["--html"][0]).write_text(as_html(done))
    return EXIT_STATUS[done.findings.verdict]
