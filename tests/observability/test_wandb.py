"""Weights & Biases, offline and with a server that does not answer: what its own file holds afterwards."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from slime.observability.tracking import Axis, JsonLinesSink, Start, TensorBoardSink, Tracker
from slime.observability.wandb_sink import WandbOptions, WandbSink

wandb = pytest.importorskip("wandb")

OFFLINE = WandbOptions(
    mode="offline", folder=Path(), project="p", team=None, group="g", random_suffix=True, key=None, host=None, run_id=None,
    count_train_steps=False,
)  # fmt: skip
FLAGS = {"lr": 1e-6, "wandb_key": "SECRET", "eval_prompt_data": ("a", "b"), "clip": math.inf, "spec": None}
WRITTEN = (
    (Axis.ROLLOUT, 0, {"eval/a": 0.25}),
    (Axis.TRAIN_STEP, 1, {"train/step": 1.0, "train/loss": 0.5}),
    (Axis.TRAIN_STEP, 2, {"train/step": 2.0, "train/loss": 0.25}),
    (Axis.ROLLOUT, 1, {"rollout/raw_reward": 0.125, "perf/step_time": 3.0}),
)


def history(folder: Path, *, of: int) -> tuple[list[dict[str, float]], dict[str, object], str]:
    """(lines, config, text of the whole file) of the one run in `folder`. Another process writes it, when it wants to."""
    deadline = time.monotonic() + 20
    while len((found := _history(folder))[0]) < of and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _history(folder: Path) -> tuple[list[dict[str, float]], dict[str, object], str]:
    """By W&B's own reader."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    store, lines, config = DataStore(), [], {}
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            lines.append({name: value for name, value in items.items() if not name.startswith("_")})
        elif record.WhichOneof("record_type") == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            config |= {"name": record.run.display_name, "group": record.run.run_group, "project": record.run.project}
    return lines, config, file.read_bytes().decode("latin-1")


def write_all(tracker: Tracker) -> None:
    for axis, position, metrics in WRITTEN:
        tracker.write(metrics, axis, position)
    tracker.close()


def test_a_run_has_the_names_and_axes_of_the_other_sinks_and_no_secret(tmp_path: Path) -> None:
    start = Start()
    sinks = [
        JsonLinesSink(tmp_path / "metrics.jsonl", start),
        TensorBoardSink(tmp_path / "tb", start),
        WandbSink(replace(OFFLINE, folder=tmp_path), start, FLAGS),
    ]
    tracker = Tracker(sinks)
    write_all(tracker)
    lines, config, text = history(tmp_path, of=4)
    step = {Axis.ROLLOUT: "rollout/step", Axis.TRAIN_STEP: "train/step"}
    assert lines == [{**metrics, step[axis]: position} for axis, position, metrics in WRITTEN]
    own = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [{**line, "time": None} for line in own] == [
        {axis.value: position, "time": None, **metrics} for axis, position, metrics in WRITTEN
    ]
    assert "SECRET" not in text and "wandb_key" not in config
    assert (config["lr"], config["eval_prompt_data"], config["clip"]) == (1e-6, ["a", "b"], "inf")
    assert (config["project"], config["group"]) == ("p", "g") and config["name"].startswith("g_") and len(config["name"]) == 8
    assert tracker.places()[2].startswith(f"wandb sync {tmp_path}/wandb/offline-run-")


def test_rollouts_can_be_drawn_against_optimizer_steps(tmp_path: Path) -> None:
    start = Start(rollouts=5, train_steps=10)
    sink = WandbSink(replace(OFFLINE, folder=tmp_path, count_train_steps=True, random_suffix=False), start, {})
    sink.write({"eval/a": 0.5}, Axis.ROLLOUT, 5)
    sink.write({"train/loss": 0.5}, Axis.TRAIN_STEP, 12)
    sink.write({"rollout/raw_reward": 0.5}, Axis.ROLLOUT, 6)
    sink.close()
    lines, config, _ = history(tmp_path, of=3)
    assert [line.get("rollout/step", line.get("train/step")) for line in lines] == [10, 12, 12]
    assert config["name"] == "g"


@pytest.mark.parametrize("key", [None, "0" * 40])
def test_a_server_that_does_not_answer_leaves_the_metrics_offline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    """Nobody listens on port 9 of this machine; without a key the library asks nobody and refuses."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    options = replace(OFFLINE, folder=tmp_path, mode="online", host="http://127.0.0.1:9", key=key)
    monkeypatch.setattr("slime.observability.wandb_sink.SECONDS_TO_BEGIN", 2)
    with caplog.at_level(logging.WARNING):
        write_all(Tracker([WandbSink(options, Start(), {})]))
    assert [record.message for record in caplog.records if record.message.startswith("W&B does not answer (")]
    assert [line.get("train/loss") for line in history(tmp_path, of=4)[0]] == [None, 0.5, 0.25, None]


SILENT = """
import socket, sys
from dataclasses import replace
from pathlib import Path
from slime.observability import wandb_sink
from slime.observability.tracking import Start, Tracker
from tests.observability.test_wandb import OFFLINE, write_all
wandb_sink.SECONDS_TO_BEGIN = wandb_sink.SECONDS_TO_FINISH = 1
server = socket.create_server(("127.0.0.1", 0))
options = replace(OFFLINE, folder=Path(sys.argv[1]), mode="online", key="0" * 40, host=f"http://127.0.0.1:{server.getsockname()[1]}")
write_all(Tracker([wandb_sink.WandbSink(options, Start(), {})]))
print("the run is over", flush=True)
"""


def test_a_server_that_takes_calls_and_says_nothing_holds_up_no_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SILENT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert (done.returncode, done.stdout) == (0, "the run is over\n"), done.stderr
    assert "cannot be written (TimeoutError: W&B has not taken everything within 2 s" in done.stderr


def test_without_the_package_the_run_ends_with_the_two_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--use-wandb needs the package wandb, .*pip install wandb, or --use-tensorboard"):
        WandbSink(replace(OFFLINE, folder=tmp_path), Start(), {})
