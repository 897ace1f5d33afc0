"""Every dotted path of the flags, loaded and checked at start: a wrong one fails in second 2, not after the first rollout.

An error names the flag, the path, what was found and what was expected. The trainer's are in slime.training.hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from slime.config import view_for_call
from slime.config.dotted import Call, accepted_keywords, find_callable

__all__ = ["CALLS", "Plugins", "accepted_keywords", "load_function", "load_plugins"]

_ROLLOUT = Call("fn(args, rollout_id, data_source, evaluation=False)", 3, ("evaluation",))

CALLS: dict[str, Call] = {
    "--rollout-function-path": _ROLLOUT,
    "--eval-function-path": _ROLLOUT,
    "--custom-generate-function-path": Call(
        "async fn(args, sample, sampling_params[, evaluation])", 3, offered=("evaluation",), is_async=True
    ),
    "--rollout-sample-hook-path": Call(
        "fn(args, sample, *[, rollout_id, evaluation])", 2, offered=("rollout_id", "evaluation"), is_async=None
    ),
    "--custom-rm-path": Call("async fn(args, sample, **kwargs)", 2, is_async=True),
    "--custom-reward-post-process-path": Call("fn(args, samples)", 2),
    "--custom-convert-samples-to-train-data-path": Call("fn(args, samples)", 2),
    "--dynamic-sampling-filter-path": Call("fn(args, group)", 2),
    "--buffer-filter-path": Call("fn(args, rollout_id, buffer, num_samples)", 4),
    "--rollout-sample-filter-path": Call("fn(args, groups)", 2),
    "--rollout-all-samples-process-path": Call("fn(args, all_groups, data_source)", 3),
    "--custom-rollout-log-function-path": Call("fn(rollout_id, args, samples, extra_metrics, rollout_time)", 5),
    "--custom-eval-rollout-log-function-path": Call("fn(rollout_id, args, data, extra_metrics)", 4),
    "--data-source-path": Call("a class taking (args)", 1),
}


def attribute_of(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


@lru_cache(maxsize=256)
def load_function(flag: str, path: str) -> Callable[..., Any]:
    """What `path` (pkg.module.name) names, checked against how `flag` calls it. Raises ValueError otherwise."""
    found = find_callable(flag, path, CALLS[flag])
    if flag == "--data-source-path":
        _check_data_source(path, found)
    return found


def _check_data_source(path: str, found: Any) -> None:
    from slime.rollout.data_source import has_a_state, keeps_itself

    if not isinstance(found, type):
        raise ValueError(f"--data-source-path {path}: found a {type(found).__name__}; expected a class taking (args)")
    missing = [name for name in ("get_samples", "add_samples", "__len__") if not callable(getattr(found, name, None))]
    if not has_a_state(found) and not keeps_itself(found):
        missing.append("state_dict and load_state_dict (or save and load)")
    if missing:
        raise ValueError(
            f"--data-source-path {path}: class {found.__name__} has no {', '.join(missing)}; "
            f"derive it from slime.rollout.data_source.RolloutDataSource"
        )


@dataclass(frozen=True)
class Plugins:
    """The rollout side's entry points, each found and callable; every other dotted path has been checked too."""

    rollout: Callable[..., Any]
    evaluate: Callable[..., Any]
    data_source: Callable[[Any], Any]
    others: dict[str, tuple[Callable[..., Any], ...]] = field(default_factory=dict)
    """flag -> functions, only the flags that were given."""


def load_plugins(config: Any) -> Plugins:
    """All plugins of `config`; raises ValueError with every failing flag in one message."""
    from slime.rollout.base_types import eval_output, train_output

    args, loaded, failures = config.args, {}, []
    for flag in CALLS:
        value = getattr(args, attribute_of(flag), None)
        paths = (value,) if isinstance(value, str) else tuple(value or ())
        for path in paths:
            try:
                loaded[flag] = (*loaded.get(flag, ()), load_function(flag, path))
            except ValueError as error:
                failures.append(str(error))
    for dataset in config.evaluation.datasets:
        for flag, path in (
            ("--custom-generate-function-path", dataset.custom_generate_function_path),
            ("--custom-rm-path", dataset.custom_rm_path),
        ):
            try:
                if path:
                    load_function(flag, path)
            except ValueError as error:
                failures.append(f"eval data set {dataset.name}: {error}")
    if failures:
        raise ValueError("\n".join(failures))
    rollout = loaded["--rollout-function-path"][0]
    evaluate = loaded.get("--eval-function-path", (rollout,))[0]
    return Plugins(
        rollout=lambda args, *rest, **k: train_output(rollout(view_for_call(args), *rest, **k)),
        evaluate=lambda args, *rest, **k: eval_output(evaluate(view_for_call(args), *rest, **k)),
        data_source=loaded["--data-source-path"][0],
        others=loaded,
    )
