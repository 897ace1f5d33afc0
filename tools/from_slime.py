#!/usr/bin/env python3
"""Bring a launcher of the public slime: what of it is the same here, what differs and why, and the launcher that runs it.

    python tools/from_slime.py run-qwen3-4B.sh                          # the verdict, flag by flag
    python tools/from_slime.py run-qwen3-4B.sh --output my-run.sh       # and the launcher for here
    python tools/from_slime.py run.sh --gpu h200                         # rehearsed with the memory of H200s
    python tools/from_slime.py run.sh --set MODEL_DIR=/data/models --set NNODES=4      # variables that the launcher wants

The launcher is run in a shell that can do nothing: no file is written, no program but a few that read is started, nothing is
stopped (tools/foreign). Its words are then parsed and rehearsed as any others.

Exit status: 0 it parses and nothing in the rehearsal is wrong, 1 with the reason in the last line, 2 it trains nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slime.rehearse.model.rates import GPUS  # noqa: E402
from slime.rehearse.options import Options  # noqa: E402
from tools.foreign.job import Job, jobs_of, last_value, more_environment  # noqa: E402
from tools.foreign.verdict import Verdict, judge  # noqa: E402
from tools.foreign.watch import Watched, watch  # noqa: E402
from tools.foreign.write import OURS, written  # noqa: E402

PROJECT = Path(__file__).resolve().parents[1]
HEADINGS = {
    "same": "the same here",
    "no effect": "taken, and without effect here",
    "differs": "the same with a difference",
    "missing": "not here",
}


def report(verdict: Verdict, *, all_flags: bool) -> str:
    lines: list[str] = []
    for kind, heading in HEADINGS.items():
        found = [said for said in verdict.flags if said.kind == kind]
        if not found:
            continue
        lines.append(f"{heading}: {len(found)} flags")
        if kind != "same" or all_flags:
            lines += dict.fromkeys(said.line() for said in found)
    if verdict.rehearsal is not None:
        findings = verdict.rehearsal.findings
        lines.append(f"rehearsal: {len(findings.of('ok'))} proven, {len(findings.of('violation'))} wrong")
        lines += [f"  {finding.line()}" for finding in findings.of("violation")]
        lines += [f"  {finding.line()}" for finding in findings.of("unchecked") if finding.decides]
    return "\n".join([*lines, verdict.last_line()])


def surroundings(job: Job, watched: Watched) -> list[str]:
    """What else the launcher does, in a line each."""
    lines = [f"entry point: {' '.join(('python3 -m slime.train', *job.schedule))}"]
    for model in watched.models[-1:]:
        where = {"here": "of this project", "theirs": "beside the launcher", "nowhere": "which is nowhere"}[model.place]
        lines.append(f"model: scripts/models/{model.name}.sh {where}")
    lines += [f"file: {target}, which it writes itself" for target in watched.files if target in job.words]
    if job.torn:
        lines.append(f"mended: a backslash is missing in the line before {job.torn}; what follows is taken for the command's")
    for name, value in more_environment(job).items():
        lines.append(f"environment: {name}={value} as well, without which engines with DeepEP are refused here")
    stopped = sorted({" ".join(call.words[:3]) for call in watched.calls if call.words[0] in ("pkill", "killall")})
    if stopped:
        lines.append(f"left out: {', '.join(stopped)} (a launcher here stops what it started, and nothing else)")
    servers = sorted({call.words[position + 1] for call in watched.calls for position, word in enumerate(call.words[:-1])
                      if word == "-m" and not call.words[position + 1].startswith("slime.train")})  # fmt: skip
    if servers:
        lines.append(f"left out: python3 -m {', '.join(servers)}: start it yourself before the new launcher, as this one did")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("launcher", type=Path)
    parser.add_argument("arguments", nargs="*", help="words for the launcher itself")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the launcher for here")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a variable that the launcher wants")
    parser.add_argument("--job", type=int, metavar="N", help="which of its training commands, from 1 (default: the last)")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="kind of the GPUs that it is rehearsed for")
    parser.add_argument("--all", action="store_true", help="list the flags that are the same, too")
    args = parser.parse_args(argv)
    if not args.launcher.is_file():
        raise ValueError(f"no launcher {args.launcher}: name a bash script of the public slime")
    if wrong := [word for word in args.set if "=" not in word]:
        raise ValueError(f"--set {wrong[0]} wants NAME=VALUE")
    watched = watch(
        args.launcher.absolute(), models=PROJECT / "scripts" / "models", arguments=args.arguments,
        settings=dict(word.split("=", 1) for word in args.set),
    )  # fmt: skip
    jobs = jobs_of(watched)
    if not jobs:
        print(
            f"{args.launcher.name} starts no train.py{f', and ended {watched.ended}' if watched.ended else ''}:",
            file=sys.stderr,
        )
        print(watched.last_words or "it printed nothing", file=sys.stderr)
        print("what it wants of its caller is given with --set NAME=VALUE", file=sys.stderr)
        return 2
    number = args.job if args.job is not None else len(jobs)
    if not 1 <= number <= len(jobs):
        raise ValueError(f"--job {number}: the launcher has {len(jobs)} training commands")
    job = jobs[number - 1]
    if len(jobs) > 1:
        print(f"training command {number} of {len(jobs)} (--job chooses)")
    print("\n".join(surroundings(job, watched)))
    with tempfile.TemporaryDirectory(prefix="slime-bring-") as folder:
        verdict = judge(job, watched, with_files(job, watched, Path(folder)), options=options_of(job, args.gpu))
    if args.output is not None:
        args.output.write_text(written(job, watched, launcher=args.launcher, project=PROJECT))
        args.output.chmod(0o755)
        print(f"written: {args.output}")
    print(report(verdict, all_flags=args.all))
    return 0 if verdict.runs else 1


def options_of(job: Job, gpu: str) -> Options:
    here = os.path.isdir(last_value(job.words, "--hf-checkpoint") or "")
    # What quotes kept the shell from filling in, the launcher for here gives in another way.
    given = {name: value for name, value in job.environment.items() if not (name in OURS and "$" in value)}
    env = {"TENSORBOARD_DIR": "tensorboard", **given, **more_environment(job)}
    return Options(
        env=env, build_ranks=False, weight_map=False, curves=False, on_its_disks=here, gpu=gpu,
        gpu_memory_gb=GPUS[gpu].memory_gb,
    )  # fmt: skip


def with_files(job: Job, watched: Watched, folder: Path) -> list[str]:
    """The flags, with the files that the launcher writes in `folder`."""
    places: dict[str, str] = {}
    for number, (target, text) in enumerate(watched.files.items()):
        place = folder / f"{number}-{Path(target).name}"
        place.write_text(text)
        places[target] = str(place)
    return [places.get(word, word) for word in (*job.words, *job.schedule)]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as wrong:
        print(f"from_slime: {wrong}", file=sys.stderr)
        sys.exit(2)
