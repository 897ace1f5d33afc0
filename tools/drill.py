"""Fault drills on one machine: a process of a run is killed, stopped, told to leave or short of memory, at random.

    .venv/bin/python tools/drill.py prepare BASE                     once: checkpoint, data, recorded rollouts, their digests
    .venv/bin/python tools/drill.py plan --seed 1 --count 20         what will be drilled
    .venv/bin/python tools/drill.py run BASE --seed 1 --first 0 --count 20
    .venv/bin/python tools/drill.py run BASE --seed 1 --first 7 --count 1     drill 7 alone, again
    .venv/bin/python tools/drill.py run BASE --pick scheduler stop generate   one of your choice; more with more of --pick
    .venv/bin/python tools/drill.py run BASE --pick scheduler kill generate --beside router stop    two faults at once
    .venv/bin/python tools/drill.py run BASE --pick trainer kill train --flags '--snapshot-interval 1'
    .venv/bin/python tools/drill.py table BASE --table FILE          what happened, as markdown

Each drill is one line of BASE/drills.jsonl (the last of a number counts), with a transcript beside it in BASE/drills/. It is
judged by: did the run go on; else, did a line name the process and what happened, after how long, did the run end in time and
with a status that is not 0; is nothing left of it; did the next launch of the same folder go on from its newest checkpoint; and
are checkpoints made after it those of an undisturbed run, to the bit. The status is 1 where a drill failed.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.drills import exact  # noqa: E402
from tools.drills.campaign import Campaign  # noqa: E402
from tools.drills.draw import Drill, draw, pick  # noqa: E402
from tools.drills.launch import NUM_ROLLOUT, Launch  # noqa: E402
from tools.drills.table import Row, counts, markdown, read  # noqa: E402

_PREPARE_SECONDS = 1200.0


def prepare(base: Path) -> int:
    """One undisturbed run; its checkpoints become digests."""
    base.mkdir(parents=True, exist_ok=True)
    straight = base / "straight"
    flags = ["--num-rollout", str(NUM_ROLLOUT), "--eval-interval", "1000", "--skip-eval-before-train"]
    launch = Launch(base, straight, [*flags, "--save-debug-rollout-data", str(base / "dumps" / "{rollout_id}.pt")])
    launch.until(lambda: False, seconds=_PREPARE_SECONDS)
    status = launch.process.poll()
    launch.leave()
    if status != 0:
        sys.stderr.write("".join(f"{line.text}\n" for line in launch.lines[-30:]))
        return 1
    exact.write_digests(base, straight)
    shutil.rmtree(straight)
    return 0


def run(given: argparse.Namespace) -> int:
    results, began, wrong = given.base / "drills.jsonl", time.monotonic(), 0
    engines = not given.without_engines
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the launch of the moment is ended on the way out
    campaign = Campaign(given.base, results, stop_seconds=given.stop_seconds, engines=engines, flags=given.flags)
    try:
        for drill in chosen(given, engines=engines, done=read(results) if results.exists() else []):
            if time.monotonic() - began > given.seconds:
                print("the time is over: the same command goes on")
                break
            print(f"{drill} ...", flush=True)
            row = campaign.drill(drill)
            wrong += row is not None and bool(row.faults)
            print(f"  {'not placed: no such process in that phase' if row is None else told(row)}", flush=True)
    finally:
        campaign.leave()
    return 1 if wrong else 0


def chosen(given: argparse.Namespace, *, engines: bool, done: Sequence[Row]) -> list[Drill]:
    """What was asked for and has no verdict yet; a single one is made again. Drills of one kind of launch come together."""
    if given.pick:
        beside = tuple(given.beside) if given.beside else None
        return [pick(*one, tolerant=not given.without_tolerance, beside=beside) for one in given.pick]
    drills = [draw(given.seed, number, engines=engines) for number in range(given.first, given.first + given.count)]
    alike = [row for row in done if (row.engines, row.flags) == (engines, shlex.join(given.flags))]
    known = {(row.seed, row.number) for row in alike} if given.count > 1 else set()
    return sorted((one for one in drills if (one.seed, one.number) not in known), key=lambda one: not one.tolerant)


def told(row: Row) -> str:
    after = "" if row.seconds_to_cause is None else f", cause after {row.seconds_to_cause:.1f} s: {row.cause[:160]}"
    ended = "" if row.seconds_to_end is None else f", ended after {row.seconds_to_end:.1f} s"
    return f"{row.outcome}{ended}{after}{''.join(f'{chr(10)}  WRONG: {one}' for one in row.faults)}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "plan", "run", "table"):
        one = commands.add_parser(name)
        if name != "plan":
            one.add_argument("base", type=lambda text: Path(text).absolute(), help="folder of the drills, 1 GB")
        if name in ("plan", "run"):
            one.add_argument("--seed", type=int, default=1)
            one.add_argument("--first", type=int, default=0, help="number of the first drill")
            one.add_argument("--count", type=int, default=1)
            one.add_argument(
                "--without-engines", action="store_true", help="recorded rollouts alone: quicker, and fewer processes"
            )
        if name == "run":
            three = ("PROCESS", "FAULT", "PHASE")
            one.add_argument("--pick", nargs=3, action="append", metavar=three, help="this drill, instead of drawn ones")
            one.add_argument("--beside", nargs=2, metavar=("PROCESS", "FAULT"), help="with this fault at the same moment")
            one.add_argument("--without-tolerance", action="store_true", help="a picked drill without --use-fault-tolerance")
            one.add_argument(
                "--flags", type=shlex.split, default=[], help="of the launch besides, e.g. '--snapshot-interval 1'"
            )
            one.add_argument("--stop-seconds", type=float, default=120.0, help="from SIGSTOP to SIGCONT")
            one.add_argument("--seconds", type=float, default=float("inf"), help="no further drill begins after so long")
        if name == "table":
            one.add_argument("--table", type=Path, help="markdown goes there (default: standard output)")
    given = parser.parse_args(argv)
    if given.command == "prepare":
        return prepare(given.base)
    if given.command == "plan":
        numbers = range(given.first, given.first + given.count)
        print("\n".join(str(draw(given.seed, number, engines=not given.without_engines)) for number in numbers))
        return 0
    if given.command == "run":
        return run(given)
    rows = read(given.base / "drills.jsonl")
    (sys.stdout.write if given.table is None else given.table.write_text)(markdown(rows))
    print(counts(rows), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
