"""Every dotted path of the flags, loaded and checked at start: a wrong one fails in second 2, not after the first rollout.

An error names the flag, the path, what was found and what was expected.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from slime.config import view_for_call

_ROLLOUT = "args, rollout_id, data_source, evaluation=False"

# flag -> (expected call, how many positional arguments it is called with, names it is called with by keyword).
SIGNATURES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "--rollout-function-path": (f"fn({_ROLLOUT})", 3, ("evaluation",)),
    "--eval-function-path": (f"fn({_ROLLOUT})", 3, ("evaluation",)),
    "--custom-generate-function-path": ("async fn(args, sample, sampling_params[, evaluation])", 3, ()),
    "--rollout-sample-hook-path": ("fn(args, sample, *[, rollout_id, evaluation])", 2, ()),
    "--custom-rm-path": ("async fn(args, sample, **kwargs)", 2, ()),
    "--custom-reward-post-process-path": ("fn(args, samples)", 2, ()),
    "--custom-convert-samples-to-train-data-path": ("fn(args, samples)", 2, ()),
    "--dynamic-sampling-filter-path": ("fn(args, group)", 2, ()),
    "--buffer-filter-path": ("fn(args, rollout_id, buffer, num_samples)", 4, ()),
    "--rollout-sample-filter-path": ("fn(args, groups)", 2, ()),
    "--rollout-all-samples-process-path": ("fn(args, all_groups, data_source)", 3, ()),
    "--custom-rollout-log-function-path": ("fn(rollout_id, args, samples, extra_metrics, rollout_time)", 5, ()),
    "--custom-eval-rollout-log-function-path": ("fn(rollout_id, args, data, extra_metrics)", 4, ()),
    "--data-source-path": ("a class taking (args)", 1, ()),
}  # fmt: skip
# Passed by keyword to functions that take them.
_OFFERED = {
    "--custom-generate-function-path": ("evaluation",),
    "--rollout-sample-hook-path": ("rollout_id", "evaluation"),
}
_MUST_BE_ASYNC = ("--custom-generate-function-path", "--custom-rm-path")
_DATA_SOURCE_METHODS = {"get_samples": 1, "add_samples": 1, "state_dict": 0, "load_state_dict": 1, "__len__": 0}


def attribute_of(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


@lru_cache(maxsize=256)
def load_function(flag: str, path: str) -> Callable[..., Any]:
    """What `path` (pkg.module.name) names, checked against how `flag` calls it. Raises ValueError otherwise."""
    expected, num_positional, keywords = SIGNATURES[flag]
    found = _resolve(flag, path, expected)
    if not callable(found):
        raise ValueError(f"{flag} {path}: found a {type(found).__name__}, which cannot be called; expected {expected}")
    _check_arity(flag, path, found, expected, num_positional, keywords)
    if flag in _MUST_BE_ASYNC and not _is_async(found):
        raise ValueError(f"{flag} {path}: found a plain function; expected {expected} (write `async def`)")
    if flag == "--data-source-path":
        _check_data_source(path, found)
    return found


def _resolve(flag: str, path: str, expected: str) -> Any:
    module_name, _, name = path.rpartition(".")
    if not module_name or not name:
        raise ValueError(f"{flag} {path!r}: expected a dotted path package.module.name to {expected}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{flag} {path}: module {module_name} cannot be imported ({error}); is it on PYTHONPATH? expected {expected}"
        ) from error
    if not hasattr(module, name):
        offered = ", ".join(sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_")))
        raise ValueError(f"{flag} {path}: module {module_name} has no {name!r}; it has: {offered or 'nothing to call'}")
    return getattr(module, name)


def _check_arity(flag: str, path: str, found: Callable, expected: str, num_positional: int, keywords: tuple[str, ...]) -> None:
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return  # a builtin without a signature: Python will say what is wrong when it is called
    try:
        offered = accepted_keywords(found, dict.fromkeys(_OFFERED.get(flag, ())))
        signature.bind(*range(num_positional), **dict.fromkeys(keywords), **offered)
    except TypeError as error:
        raise ValueError(f"{flag} {path}: found {found.__name__}{signature} ({error}); expected {expected}") from None


def _is_async(found: Callable) -> bool:
    return inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(type(found).__call__)


def _check_data_source(path: str, found: Any) -> None:
    if not inspect.isclass(found):
        raise ValueError(f"--data-source-path {path}: found a {type(found).__name__}; expected a class taking (args)")
    missing = [name for name in _DATA_SOURCE_METHODS if not callable(getattr(found, name, None))]
    if missing:
        raise ValueError(
            f"--data-source-path {path}: class {found.__name__} has no {', '.join(missing)}; "
            f"derive it from slime.rollout.data_source.RolloutDataSource"
        )


def accepted_keywords(function: Callable, offered: dict[str, Any]) -> dict[str, Any]:
    """Those of `offered` that the function takes."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return offered
    return {name: value for name, value in offered.items() if name in parameters}


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
    for flag in SIGNATURES:
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
