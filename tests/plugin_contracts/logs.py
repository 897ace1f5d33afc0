"""Logs and sinks: what they raise costs a warning, what they answer decides whether the default log is written."""

from __future__ import annotations


def _said(answer) -> None:
    assert answer is None or answer in (True, False), (
        f"it gave {answer!r}; True replaces the default log, None and False do not"
    )


def logs_a_rollout(function, stage) -> None:
    _said(function(0, stage.args(), stage.group([0.0, 1.0]), {"rollout/raw_reward": 0.5}, 1.5))


def logs_an_evaluation(function, stage) -> None:
    data = {"sums": {"rewards": [0.0, 1.0], "truncated": [False, True], "samples": stage.group([0.0, 1.0])}}
    _said(function(0, stage.args(), data, {"eval/sums": 0.5}))


def takes_metrics_of_both_axes_and_closes(sink, stage) -> None:
    made = sink(stage.args())
    made.write({"rollout/raw_reward": 0.5}, "rollout", 1)
    made.write({"train/loss": 0.5}, "train_step", 1)
    made.close()


PROMISES = {
    "--custom-rollout-log-function-path": (logs_a_rollout,),
    "--custom-eval-rollout-log-function-path": (logs_an_evaluation,),
    "--custom-metrics-sink-path": (takes_metrics_of_both_axes_and_closes,),
}
