"""What a rollout or an evaluation tells the trackers; a function of the user's may have told them everything instead."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slime.config import view_for_call
from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput, flatten
from slime.rollout.metrics import asked_metrics, evaluation_metrics, rollout_metrics
from slime.rollout.plugins import load_function
from slime.types.reward import plain_reward

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """Metrics under slime's names. The line that a user watches is made of them in any case."""

    metrics: dict[str, float]
    to_trackers: bool
    """False when the rollout function or a custom log function said that it has logged this itself."""


def report_rollout(args: Any, rollout_id: int, output: RolloutFnTrainOutput, *, seconds: float) -> Report:
    """Called after every rollout, whichever function made it; --custom-rollout-log-function-path is called from here."""
    extra = dict(output.metrics or {})
    extra.setdefault("perf/rollout_time", seconds)
    default_log = output.default_log
    if args.custom_rollout_log_function_path:
        log = load_function("--custom-rollout-log-function-path", args.custom_rollout_log_function_path)
        default_log = not log(rollout_id, view_for_call(args), flatten(output.samples), extra, seconds) and default_log
    return Report(rollout_metrics(output.samples, _numbers(extra)) | asked_metrics(args, output.samples), default_log)


def report_evaluation(args: Any, rollout_id: int, output: RolloutFnEvalOutput) -> Report:
    """The same for an evaluation and --custom-eval-rollout-log-function-path."""
    default_log = output.default_log
    if args.custom_eval_rollout_log_function_path:
        log = load_function("--custom-eval-rollout-log-function-path", args.custom_eval_rollout_log_function_path)
        default_log = not log(rollout_id, view_for_call(args), output.data, output.metrics) and default_log
    return Report(evaluation_metrics(output.data) | _numbers(output.metrics or {}), default_log)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What a plugin reports, as trackers take it: numbers of any library. What is none is left out, and said."""
    plain = {str(name): plain_reward(value) for name, value in metrics.items()}
    for name, value in plain.items():
        if not isinstance(value, int | float):
            logger.warning("metric %s is %.80r, not a number: it is left out", name, value)
    return {name: value for name, value in plain.items() if isinstance(value, int | float)}
