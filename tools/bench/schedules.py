"""Seconds of an iteration in turn, one step ahead and all the time, side by side: whole runs of a tiny Qwen3 on this machine.

    python3 tools/bench/schedules.py --output DIR [--schedules sync one-step-ahead fully-async] [--seeds 1] [--rollouts 10]
                                     [--estimators grpo] [--work 64] [-- FLAGS of every run]

One trainer and one engine on slots of their own. Answers have a long tail, as those of real models have: seven of eight are an
eighth as long as the longest (--work tokens). The reward is the share of tokens from the first half of the vocabulary, which
any policy learns. Prints a row for each run, and keeps every run's metrics.jsonl under DIR.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.bench.model_args import model_args  # noqa: E402

SCHEDULES = ("sync", "one-step-ahead", "fully-async")
WARM = 2
"""Rollouts whose seconds are left out: engine and trainer warm up, and nothing is ahead yet."""
EXAMPLE = ROOT / "docs" / "en" / "examples" / "fully_async"
"""Its long_tail.py has the answers and the reward."""


def prepare(folder: Path) -> Path:
    """The checkpoint and prompts of all runs."""
    from tools.make_arithmetic_data import main as make_data
    from tools.make_tiny_checkpoint import main as make_checkpoint

    if not (folder / "train.jsonl").exists():
        make_checkpoint(["--preset", "qwen3", "--seed", "3", "--output", str(folder / "model")])
        make_data(["--output", str(folder), "--train", "4096", "--eval", "8", "--max-operand", "9"])
    return folder / "model" / "bf16"


def run(
    folder: Path, checkpoint: Path, schedule: str, estimator: str, seed: int, own: argparse.Namespace
) -> list[dict[str, float]]:
    """One row for each rollout."""
    logs = folder / f"{schedule}-{estimator}-{seed}"
    flags = [
        *model_args("qwen3-tiny"), "--hf-checkpoint", checkpoint, "--actor-num-nodes", 1, "--actor-num-gpus-per-node", 1,
        "--num-gpus-per-node", 2, "--rollout-num-gpus", 1, "--rollout-num-gpus-per-engine", 1,
        "--prompt-data", folder / "train.jsonl", "--input-key", "prompt", "--label-key", "label", "--apply-chat-template",
        "--rollout-shuffle", "--rollout-seed", seed, "--seed", seed, "--custom-rm-path", "long_tail.reward",
        "--custom-generate-function-path", "long_tail.generate", "--num-rollout", own.rollouts, "--rollout-batch-size", 8,
        "--n-samples-per-prompt", 8, "--global-batch-size", 64, "--rollout-max-response-len", own.work,
        "--advantage-estimator", estimator, "--use-tis", "--optimizer", "adam", "--lr", own.lr, "--lr-decay-style", "constant",
        "--use-dynamic-batch-size", "--max-tokens-per-gpu", 1024, "--sglang-server-concurrency", 64,
        "--schedule", schedule, *(("--max-weight-staleness", own.bound) if schedule == "fully-async" else ()), *own.flags,
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {
        "SLIME_RUN_DIR": str(logs),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(EXAMPLE), str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    ended = subprocess.run(
        [sys.executable, "-m", "slime.train", *map(str, flags)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if ended.returncode:
        sys.exit(ended.stdout[-2000:] + ended.stderr[-6000:])
    rows = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "perf/step_time" in row]


def line(schedule: str, estimator: str, seed: int, rows: list[dict[str, float]]) -> str:
    def median(name: str) -> float:
        return statistics.median(row[name] for row in rows[WARM:])

    third = max(1, len(rows) // 3)
    first, last = (statistics.fmean(row["rollout/raw_reward"] for row in part) for part in (rows[:third], rows[-third:]))
    oldest = max(row["rollout/weight_staleness/max"] for row in rows)
    mixed = statistics.fmean(row["rollout/mixed_versions_ratio"] for row in rows)
    return (
        f"| {schedule} | {estimator} | {seed} | {median('perf/step_time'):.2f} | {median('perf/rollout_wait_time'):.2f} | "
        f"{median('perf/train_time'):.2f} | {median('perf/update_weights_time'):.2f} | "
        f"{statistics.fmean(row['rollout/weight_staleness/mean'] for row in rows):.2f} | {oldest:.0f} | {mixed:.0%} | "
        f"{first:.3f} -> {last:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES, choices=SCHEDULES)
    parser.add_argument("--estimators", nargs="+", default=["grpo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--rollouts", type=int, default=10)
    parser.add_argument("--work", type=int, default=64, help="tokens of the longest answers")
    parser.add_argument("--bound", type=int, default=1, help="--max-weight-staleness of fully-async")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("flags", nargs="*", help="more flags of every run, after --")
    own = parser.parse_args()
    own.output.mkdir(parents=True, exist_ok=True)
    checkpoint = prepare(own.output)
    print(
        "| schedule | estimator | seed | s an iteration | waited | training | sync | age, mean | age, most | mixed | reward |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for schedule, estimator, seed in itertools.product(own.schedules, own.estimators, own.seeds):
        print(line(schedule, estimator, seed, run(own.output, checkpoint, schedule, estimator, seed, own)), flush=True)


if __name__ == "__main__":
    main()
