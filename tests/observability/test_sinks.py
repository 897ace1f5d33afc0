"""--custom-metrics-sink-path: a class of the user's own beside the other sinks."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from slime.observability.sinks import open_tracker
from slime.observability.tracking import Axis, Start
from tests.config.flags import config_of


class Kept:
    """What a user would write."""

    lines: list[tuple] = []

    def __init__(self, args):
        self.batch = args.rollout_batch_size

    def write(self, metrics, axis, position):
        Kept.lines.append((str(axis), position, dict(metrics)))

    def close(self):
        Kept.lines.append(("closed", self.batch, {}))


class Failing(Kept):
    def write(self, metrics, axis, position):
        raise RuntimeError("the server is down")


class NoClose:
    def __init__(self, args):
        pass

    def write(self, metrics, axis, position):
        pass


def sink_of(folder: Path, name: str):
    return open_tracker(config_of("--custom-metrics-sink-path", f"{__name__}.{name}"), folder, Start())


def test_a_sink_of_ones_own_gets_every_name_axis_and_position(tmp_path: Path) -> None:
    Kept.lines.clear()
    tracker = sink_of(tmp_path, "Kept")
    tracker.write({"train/loss": 0.5}, Axis.TRAIN_STEP, 1)
    tracker.write({"rollout/raw_reward": 0.25}, Axis.ROLLOUT, 1)
    tracker.close()
    assert Kept.lines == [
        ("train_step", 1, {"train/loss": 0.5}), ("rollout", 1, {"rollout/raw_reward": 0.25}), ("closed", 4, {}),
    ]  # fmt: skip
    assert tracker.places() == [str(tmp_path / "metrics.jsonl"), f"{__name__}.Kept"]


def test_one_that_fails_is_named_once_and_the_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tracker = sink_of(tmp_path, "Failing")
        for position in (1, 2, 3):
            tracker.write({"rollout/raw_reward": 1.0}, Axis.ROLLOUT, position)
    assert [record.message for record in caplog.records] == [
        f"{__name__}.Failing cannot be written (RuntimeError: the server is down); the run goes on, and tries again"
    ]
    assert [json.loads(line)["rollout"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("NoClose", "NoClose has no close; expected a class taking"),
        ("Nobody", "has no 'Nobody'; it has: "),
        ("sink_of", r"found sink_of\(.*missing a required argument: 'name'"),
    ],
)
def test_one_that_is_none_ends_the_run_at_its_start(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"--custom-metrics-sink-path {__name__}.{name}: .*{said}"):
        sink_of(tmp_path, name)
