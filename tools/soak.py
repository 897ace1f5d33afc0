"""Many small rollouts, and what every process of the run holds meanwhile: resident memory, descriptors, threads.

    .venv/bin/python tools/soak.py BASE --rollouts 500 --table FILE

BASE is a folder of tools/drill.py (`prepare`), or a new one. Processes are sampled every few seconds; the growth of one is the
slope of a straight line through its samples behind the first third, per rollout. What grows by more than three times the
slope's standard error, and by more than a bound, is called so, and the status is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.drills.launch import Launch  # noqa: E402
from tools.drills.scene import Seen  # noqa: E402

_SAMPLE_SECONDS = 3.0
_SETTLED = 1 / 3
_KEPT = 8
"""Samples that a slope needs at least."""
BOUNDS = {"rss_kb": 4.0, "descriptors": 0.01, "threads": 0.01}
"""Growth per rollout below which nothing is called a leak: 2 MB, and 5 descriptors or threads, over 500 rollouts."""


@dataclass(frozen=True)
class Sample:
    """One process at one moment."""

    rollouts: int
    """Done by then."""
    pid: int
    title: str
    rss_kb: int
    descriptors: int
    threads: int


@dataclass(frozen=True)
class Slope:
    """Of one measure of one process."""

    first: float
    last: float
    per_rollout: float
    error: float
    """Standard error of the slope."""

    def leaks(self, bound: float) -> bool:
        return self.per_rollout > max(bound, 3 * self.error)


def sample(processes: Iterable[Seen], rollouts: int) -> list[Sample]:
    found = []
    for seen in processes:
        try:
            folder = Path(f"/proc/{seen.pid}")
            status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
            held = (int(status["VmRSS"].split()[0]), len(os.listdir(folder / "fd")), int(status["Threads"]))
        except (OSError, KeyError):  # it has ended, or is a zombie
            continue
        found.append(Sample(rollouts, seen.pid, title(seen), *held))
    return found


def title(seen: Seen) -> str:
    """A name of a process that stays the same while it works."""
    if seen.title.startswith(("ray::", "sglang::", "ray-")):
        return seen.title.split(".")[0].split(" ")[0]
    for word in seen.words[1:]:
        if word.endswith(".py") or word.startswith(("slime.", "ray.")):
            return word.rsplit("/", 1)[-1]
    return seen.title.rsplit("/", 1)[-1]


def line_through(points: Sequence[tuple[float, float]]) -> Slope:
    """Least squares. Raises ValueError where there are too few points, or all at one place."""
    count = len(points)
    mean_x, mean_y = (sum(values) / count for values in zip(*points, strict=True)) if points else (0.0, 0.0)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if count < 3 or not spread:
        raise ValueError(f"{count} samples over one rollout have no slope")
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    rest = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    return Slope(points[0][1], points[-1][1], slope, math.sqrt(rest / (count - 2) / spread))


def slopes(samples: Sequence[Sample]) -> dict[tuple[str, int], dict[str, Slope]]:
    """(title, pid) -> measure -> its growth, of the processes that were there from the first third on."""
    most = max((one.rollouts for one in samples), default=0)
    by_process: dict[tuple[str, int], list[Sample]] = {}
    for one in samples:
        if one.rollouts >= most * _SETTLED:
            by_process.setdefault((one.title, one.pid), []).append(one)
    return {
        who: {measure: line_through([(one.rollouts, getattr(one, measure)) for one in some]) for measure in BOUNDS}
        for who, some in sorted(by_process.items())
        if len(some) >= _KEPT
    }


def markdown(found: dict[tuple[str, int], dict[str, Slope]], rollouts: int) -> str:
    rows = ["| process | resident, MB | MB per 100 rollouts | descriptors | threads | grows |", "|---|---|---|---|---|---|"]
    for (name, _), measures in found.items():
        memory, descriptors, threads = (measures[measure] for measure in BOUNDS)
        grows = [measure for measure, slope in measures.items() if slope.leaks(BOUNDS[measure])]
        rows.append(
            f"| {name} | {memory.first / 1024:.0f} -> {memory.last / 1024:.0f} | "
            f"{memory.per_rollout * 100 / 1024:+.2f} ± {memory.error * 100 / 1024:.2f} | "
            f"{descriptors.first:.0f} -> {descriptors.last:.0f} | {threads.first:.0f} -> {threads.last:.0f} | "
            f"{', '.join(grows) or 'no'} |"
        )
    return f"{rollouts} rollouts, from the first third on:\n\n" + "\n".join(rows) + "\n"


def run(given: argparse.Namespace) -> int:
    given.base.mkdir(parents=True, exist_ok=True)
    checkpoints = given.base / "soak"
    shutil.rmtree(checkpoints, ignore_errors=True)
    flags = ("--num-rollout", str(given.rollouts), "--save-interval", "50", "--keep-checkpoints", "2", "--eval-interval", "50")
    launch, samples, began = Launch(given.base, checkpoints, flags), [], time.monotonic()
    try:
        while launch.process.poll() is None and time.monotonic() - began < given.seconds:
            time.sleep(_SAMPLE_SECONDS)
            if launch.rollouts:
                samples += sample(launch.scene.update().values(), launch.rollouts[-1][1])
    finally:
        launch.leave()
    shutil.rmtree(checkpoints, ignore_errors=True)
    (given.base / "soak.jsonl").write_text("".join(json.dumps(asdict(one)) + "\n" for one in samples))
    if not launch.rollouts:
        sys.stderr.write("".join(f"{line.text}\n" for line in launch.lines[-30:]))
        return 1
    found = slopes(samples)
    text = markdown(found, launch.rollouts[-1][1])
    (sys.stdout.write if given.table is None else given.table.write_text)(text)
    return int(any(slope.leaks(BOUNDS[measure]) for measures in found.values() for measure, slope in measures.items()))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=lambda text: Path(text).absolute())
    parser.add_argument("--rollouts", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=3600.0, help="the run is ended after so long, whatever it has done")
    parser.add_argument("--table", type=Path, help="markdown goes there (default: standard output)")
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
