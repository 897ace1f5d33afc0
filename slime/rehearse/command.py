"""The command line: the run's flags, plus a few of the rehearsal's own.

    python3 -m slime.rehearse [--json FILE] [--html FILE] [--gpu-memory GB] ... FLAGS OF THE RUN

Exit status: 0 launchable, 1 with every violation listed, 2 when the rehearsal's own flags are wrong, 3 when nothing is wrong
and something that decides was not at hand.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from slime.rehearse.findings import EXIT_STATUS
from slime.rehearse.options import Options
from slime.rehearse.report import as_json, as_text
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
    "--preflight": ("", "check the nodes of the running Ray cluster instead (RAY_ADDRESS)"),
    "--logical-gpus": ("", "with --preflight: the nodes' device slots stand for no GPU, their CPUs compute"),
    "--join-seconds": ("SECONDS", "with --preflight: how long the nodes may take to join (default 60)"),
}
REPEATED = ("--rate", "--assume")


def split_own(argv: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """(the rehearsal's flags, the run's). Raises ValueError for an own flag without its value."""
    own: dict[str, list[str]] = {}
    rest: list[str] = []
    position = 0
    while position < len(argv):
        name, equals, inline = argv[position].partition("=")
        position += 1
        if name not in OWN:
            rest.append(argv[position - 1])
            continue
        value = ""
        if OWN[name][0]:
            if not equals:
                if position == len(argv):
                    raise ValueError(f"{name} wants a value: {OWN[name][0]}")
                inline = argv[position]
                position += 1
            value = inline
        if name in own and name not in REPEATED and OWN[name][0]:
            raise ValueError(f"{name} is given twice")
        own.setdefault(name, []).append(value)
    return own, rest


def _one(own: dict[str, list[str]], name: str) -> str | None:
    return own[name][0] if name in own else None


def job_environment(own: dict[str, list[str]]) -> dict[str, str] | None:
    """The variables of --runtime-env, with or without Ray's `env_vars` around them."""
    text = _one(own, "--runtime-env")
    if text is None:
        return None
    try:
        raw = json.loads(text)
        return {str(key): str(value) for key, value in raw.get("env_vars", raw).items()}
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"--runtime-env wants a JSON object of variables ({error})") from None


def _number(own: dict[str, list[str]], name: str, kind: type) -> float | int | None:
    text = _one(own, name)
    try:
        value = None if text is None else kind(text)
    except ValueError:
        raise ValueError(f"{name} wants a number, got {text!r}") from None
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0 and finite, got {text}")
    return value


def options_of(own: dict[str, list[str]]) -> Options:
    return Options(
        gpu_memory_gb=_number(own, "--gpu-memory", float) or 80.0,
        host_memory_gb=_number(own, "--host-memory", float) or 2000.0,
        checkpoint_index=_one(own, "--checkpoint-index"),
        hostfile=_one(own, "--hostfile") or os.environ.get("HOSTFILE"),
        head=os.environ.get("MASTER_ADDR"),
        engine_version=_one(own, "--engine-version"),
        length=_number(own, "--sequence-tokens", int),
        rates=tuple(own.get("--rate", ())),
        assume=tuple(own.get("--assume", ())),
        env=job_environment(own),
        build_ranks="--no-ranks" not in own,
        quick="--quick" in own,
        expect_digest=_one(own, "--expect-digest"),
        measured=_one(own, "--measured"),
    )


def check_outputs(own: dict[str, list[str]]) -> None:
    """A report that cannot be written is said before the work, not after it."""
    for name in ("--json", "--html", "--weight-map"):
        file = _one(own, name)
        if file is None:
            continue
        if not file or Path(file).is_dir() or not os.access(Path(file).absolute().parent, os.W_OK):
            raise ValueError(f"{name} {file or repr(file)} cannot be written; name a file in an existing folder")


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(
            (__doc__ or "") + "\n" + "".join(f"  {name} {value}".ljust(30) + f"{text}\n" for name, (value, text) in OWN.items())
        )
        return 0
    try:
        own, flags = split_own(argv)
        check_outputs(own)
        if "--preflight" in own:
            from slime.rehearse.preflight import main as preflight

            patience = _number(own, "--join-seconds", float)
            return preflight(
                flags,
                json_file=_one(own, "--json"),
                env=job_environment(own),
                logical_gpus="--logical-gpus" in own,
                **({} if patience is None else {"join_seconds": patience}),
            )
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
        from slime.rehearse.page import as_html

        Path(own["--html"][0]).write_text(as_html(done))
    return EXIT_STATUS[done.findings.verdict]
