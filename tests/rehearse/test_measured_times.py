"""What a run on GPUs waited for, beside the prediction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slime.rehearse.model.cost import Cost, CostPhase
from slime.rehearse.model.measured_times import compare_times, read_times
from slime.rehearse.options import Options
from slime.rehearse.report.text import as_text
from slime.rehearse.result import rehearse
from tests.rehearse.recipes import one_node

LINES = [
    {"rollout": 1, "perf/rollout_time": 60.0, "perf/log_probs_time": 30.0, "perf/actor_train_time": 40.0},
    {"train_step": 1, "train/loss": 0.1},
    {"rollout": 2, "perf/rollout_time": 20.0, "perf/log_probs_time": 2.0, "perf/actor_train_time": 10.0,
     "perf/ref_log_probs_time": 1.0, "rollout/response_len/mean": 2048.0},
    {"rollout": 3, "perf/rollout_time": 22.0, "perf/log_probs_time": 4.0, "perf/actor_train_time": 12.0,
     "perf/ref_log_probs_time": 3.0, "rollout/response_len/mean": 4096.0, "perf/update_weights_time": None},
]  # fmt: skip


def written(folder: Path) -> str:
    text = "".join(json.dumps(line) + "\n" for line in LINES) + '{"rollout": 4, "perf/rollo'
    (folder / "metrics.jsonl").write_text(text)
    return str(folder / "memory.json")


def test_medians_leave_out_the_first_rollout_and_what_was_cut_short(tmp_path: Path) -> None:
    measured = read_times(written(tmp_path))
    assert measured.rollouts == 2 and measured.mean_response == 3072
    phases = [("prefill", 1.0), ("rollout", 20.0), ("log-probs", 4.0), ("train", 9.0), ("trainer exchange", 0.9)]
    cost = Cost(1, 1.0, 3.0, 1.0, tuple(CostPhase(name, seconds, "") for name, seconds in phases), None, 8)
    rows = {row.name: (row.predicted, row.measured) for row in compare_times(measured, cost)}
    assert rows == {"generate": (21.0, 21.0), "log-probs": (4.0, 5.0), "steps": (9.9, 11.0)}
    assert [round(row.error, 3) for row in compare_times(measured, cost)] == [0.0, -0.2, -0.1]


def test_no_metrics_are_no_comparison(tmp_path: Path) -> None:
    assert read_times(str(tmp_path / "memory.json")) is None


@pytest.mark.parametrize("device", ["cuda", "host"])
def test_times_of_gpus_alone_stand_in_the_report(device: str, tmp_path: Path) -> None:
    rank = {"device": device, "stage": 0, "micro_batch_tokens": 9216, "micro_batches": 8}
    peaks = {"train": {"tensors": 30_000_000_000, "reserved": 31_000_000_000}}
    file = Path(written(tmp_path))
    file.write_text(json.dumps({"ranks": [{**rank, "peaks": peaks} for _ in range(8)]}))
    told = {"build_ranks": False, "weight_map": False, "curves": False, "engine_version": "0.5.23", "measured": str(file)}
    done = rehearse(one_node("qwen3-4B", "Qwen3-4B", tp="2", ep="1"), Options(**told))
    assert ("seconds of a rollout" in as_text(done)) == (device == "cuda")
    assert [row.name for row in done.times] == (["generate", "log-probs", "steps"] if device == "cuda" else [])
