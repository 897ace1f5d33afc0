"""Metrics: one axis per name, counting on over a resume; and whatever happens to a file, the run goes on."""

from __future__ import annotations

import json
import logging
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

from slime.observability.tracking import Axis, JsonLinesSink, Start, TensorBoardSink, Tracker

BEGINNING = Start()


def both_sinks(folder: Path, start: Start = BEGINNING) -> Tracker:
    return Tracker([JsonLinesSink(folder / "metrics.jsonl", start), TensorBoardSink(folder / "tensorboard", start)])


def run(tracker: Tracker, rollouts: range, *, steps: int, of_run: float) -> None:
    """Rollouts of `steps` steps each, as the driver writes them; every value is `of_run`."""
    for rollout_id in rollouts:
        for step in range(steps):
            tracker.write({"train/loss": of_run}, Axis.TRAIN_STEP, steps * rollout_id + step + 1)
        tracker.write({"rollout/raw_reward": of_run}, Axis.ROLLOUT, rollout_id + 1)
    tracker.close()


def jsonl(file: Path, axis: str, name: str) -> list[tuple[int, float]]:
    return [
        (line[axis], line[name]) for line in map(json.loads, file.read_text().splitlines()) if axis in line and name in line
    ]


def tensorboard(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars(name)]


def test_every_metric_has_one_axis_in_both_files(tmp_path):
    run(both_sinks(tmp_path), range(2), steps=3, of_run=1.0)
    steps, rollouts = [(n, 1.0) for n in range(1, 7)], [(1, 1.0), (2, 1.0)]
    assert jsonl(tmp_path / "metrics.jsonl", "train_step", "train/loss") == steps
    assert jsonl(tmp_path / "metrics.jsonl", "rollout", "rollout/raw_reward") == rollouts
    assert tensorboard(tmp_path / "tensorboard", "train/loss") == steps
    assert tensorboard(tmp_path / "tensorboard", "rollout/raw_reward") == rollouts


@pytest.mark.parametrize("steps", [1, 2])
def test_what_was_lost_in_a_crash_is_not_there_twice_after_the_resume(tmp_path, steps):
    """Three rollouts, of which the checkpoint has two; then two more."""
    run(both_sinks(tmp_path), range(3), steps=steps, of_run=1.0)
    run(both_sinks(tmp_path, Start(2, 2 * steps)), range(2, 4), steps=steps, of_run=2.0)
    file = tmp_path / "metrics.jsonl"
    assert jsonl(file, "rollout", "rollout/raw_reward") == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    values = [1.0] * 2 * steps + [2.0] * 2 * steps
    assert jsonl(file, "train_step", "train/loss") == list(enumerate(values, 1))
    assert len((tmp_path / "metrics.1.jsonl").read_text().splitlines()) == 3 * (1 + steps), "nothing is thrown away"
    assert tensorboard(tmp_path / "tensorboard", "train/loss") == list(enumerate(values, 1))
    assert tensorboard(tmp_path / "tensorboard", "rollout/raw_reward") == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    [earlier] = (tmp_path / "tensorboard").glob("*earlier*")
    # The events beside the head: three rollouts with their steps.
    assert len(list(RawEventFileLoader(str(earlier)).Load())) == 1 + 3 * (1 + steps)


def test_a_run_from_the_beginning_does_not_mix_with_an_earlier_one(tmp_path):
    for value in (1.0, 2.0, 3.0):
        tracker = both_sinks(tmp_path)
        tracker.write({"eval/add": value}, Axis.ROLLOUT, 0)
        run(tracker, range(1), steps=1, of_run=value)
    assert jsonl(tmp_path / "metrics.jsonl", "rollout", "eval/add") == [(0, 3.0)]
    assert tensorboard(tmp_path / "tensorboard", "eval/add") == [(0, 3.0)]
    assert {file.name for file in tmp_path.glob("*.jsonl")} == {"metrics.jsonl", "metrics.1.jsonl", "metrics.2.jsonl"}


def test_a_line_torn_by_a_kill_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"rollout": 1, "rollout/raw_reward": 1.0}\n{"rollout": 2, "rollout/raw_')
    run(Tracker([JsonLinesSink(file, Start(2, 2))]), range(2, 3), steps=0, of_run=2.0)
    assert jsonl(file, "rollout", "rollout/raw_reward") == [(1, 1.0), (3, 2.0)]


def test_what_is_no_number_is_null_or_left_out(tmp_path, caplog):
    tracker = Tracker([JsonLinesSink(tmp_path / "metrics.jsonl", Start())])
    for position in (1, 2):
        metrics = {"a": float("nan"), "b": float("inf"), "c": "high", "d": None, "e": True, "f": 3}
        tracker.write(metrics, Axis.ROLLOUT, position)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert {key: record[key] for key in "abef"} == {"a": None, "b": None, "e": 1.0, "f": 3.0}
        assert not {"c", "d"} & set(record)
    assert [record.message for record in caplog.records] == [
        "metric c is left out: 'high' is no number",
        "metric d is left out: None is no number",
    ]


@contextmanager
def no_file_grows_beyond(size: int):
    """What a full disk answers with, but as EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_warning_per_place_and_metrics_come_back_with_the_space(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    tracker = both_sinks(tmp_path)
    tracker.write({"rollout/raw_reward": 1.0}, Axis.ROLLOUT, 1)
    sizes = [file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()]
    with no_file_grows_beyond(max(sizes) + 5):
        for position in (2, 3, 4, 5):
            tracker.write({"rollout/raw_reward": 1.0}, Axis.ROLLOUT, position)
    tracker.write({"rollout/raw_reward": 2.0}, Axis.ROLLOUT, 6)
    tracker.close()
    told = [record.message for record in caplog.records]
    assert len(told) == 2, told
    assert sum("metrics.jsonl cannot be written (OSError: " in line for line in told) == 1
    assert sum("tensorboard --logdir" in line and "the run goes on, and tries again" in line for line in told) == 1
    written = jsonl(tmp_path / "metrics.jsonl", "rollout", "rollout/raw_reward")
    assert written[0] == (1, 1.0) and written[-1] == (6, 2.0), "every line is whole"
    assert tensorboard(tmp_path / "tensorboard", "rollout/raw_reward")[-1] == (6, 2.0)


def test_a_folder_that_cannot_be_made_is_one_warning_per_place(tmp_path, caplog):
    (tmp_path / "run").write_text("a file where a folder should be")
    run(both_sinks(tmp_path / "run"), range(3), steps=2, of_run=1.0)
    assert [record.message.split(" cannot be written (")[1].split(":")[0] for record in caplog.records] == [
        "FileExistsError", "NotADirectoryError",
    ]  # fmt: skip
