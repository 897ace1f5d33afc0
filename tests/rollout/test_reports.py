"""Custom log functions see every rollout and evaluation, whichever function made it, and can replace the default metrics."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from rollout_helpers import make_config

from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput
from slime.rollout.reports import report_evaluation, report_rollout
from slime.types.sample import Sample, Status

SEEN = []


def take_over(rollout_id, args, samples, extra_metrics, rollout_time):
    SEEN.append((rollout_id, [sample.index for sample in samples], extra_metrics["mine"], rollout_time))
    return True


def look_on(rollout_id, args, samples, extra_metrics, rollout_time):
    extra_metrics["added/by_plugin"] = 5.0


def take_over_evaluation(rollout_id, args, data, extra_metrics):
    SEEN.append((rollout_id, sorted(data)))
    return True


def rollout(**values) -> RolloutFnTrainOutput:
    samples = [Sample(index=i, tokens=[1, 2, 3], response_length=2, reward=i, status=Status.COMPLETED) for i in range(2)]
    return RolloutFnTrainOutput(samples=[samples], metrics={"mine": 3.0}, **values)


@pytest.fixture(autouse=True)
def forget():
    SEEN.clear()


@pytest.mark.parametrize(
    "path, default_log, to_trackers",
    [(None, True, True), ("look_on", True, True), ("take_over", True, False), ("look_on", False, False), (None, False, False)],
)
def test_a_log_function_or_the_rollout_function_itself_can_replace_the_default(path, default_log, to_trackers):
    args = make_config(custom_rollout_log_function_path=f"{__name__}.{path}" if path else None).args
    report = report_rollout(args, 4, rollout(default_log=default_log), seconds=2.0)
    assert report.to_trackers is to_trackers
    assert report.metrics["rollout/raw_reward"] == 0.5, "the line on the screen needs it in any case"
    assert report.metrics["perf/tokens_per_sec"] == 4 / 2.0
    assert report.metrics.get("added/by_plugin") == (5.0 if path == "look_on" else None)
    assert SEEN == ([(4, [0, 1], 3.0, 2.0)] if path == "take_over" else [])


def test_metrics_of_a_plugin_are_numbers_of_any_library_and_others_are_left_out(caplog):
    output = rollout()
    output.metrics |= {"numpy": np.float32(0.5), "torch": torch.tensor(2), "text": "abc", "several": np.zeros(2)}
    metrics = report_rollout(make_config().args, 4, output, seconds=2.0).metrics
    assert (metrics["mine"], metrics["numpy"], metrics["torch"]) == (3.0, 0.5, 2) and json.dumps(metrics)
    assert not {"text", "several"} & metrics.keys()
    assert "metric text is 'abc', not a number: it is left out" in caplog.text
    data = {"add": {"rewards": [np.float32(1), torch.tensor(0)]}}
    evaluated = report_evaluation(make_config().args, 2, RolloutFnEvalOutput(data=data, metrics={"mine": np.int64(1)}))
    assert evaluated.metrics["eval/add"] == 0.5 and evaluated.metrics["mine"] == 1 and json.dumps(evaluated.metrics)


@pytest.mark.parametrize("path, default_log, to_trackers", [(None, True, True), ("on", True, False), (None, False, False)])
def test_the_same_holds_for_an_evaluation(path, default_log, to_trackers):
    args = make_config(custom_eval_rollout_log_function_path=f"{__name__}.take_over_evaluation" if path else None).args
    output = RolloutFnEvalOutput(data={"add": {"rewards": [1.0, 0.0]}}, metrics={"mine": 1.0}, default_log=default_log)
    report = report_evaluation(args, 2, output)
    assert report.to_trackers is to_trackers and report.metrics == {"eval/add": 0.5, "mine": 1.0}
    assert SEEN == ([(2, ["add"])] if path else [])
