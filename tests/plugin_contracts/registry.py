"""What each flag's plugin promises: functions (the plugin, stage) that raise AssertionError with one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from plugin_contracts import data, generation, groups, logs, rewards, training
from plugin_contracts.contract import Promise, Stage

from slime.config.dotted import find_callable
from slime.observability.sinks import CUSTOM
from slime.rollout import plugins
from slime.training import hooks

OTHER_CALLS = {"--custom-metrics-sink-path": CUSTOM, "--custom-model-provider-path": hooks.PROVIDER}


def can_be_called(function: Callable[..., Any], stage: Stage) -> None:
    """Loading has checked its signature, and whether it is async."""


CONTRACTS: dict[str, tuple[Promise, ...]] = {
    flag: (can_be_called, *promises)
    for module in (rewards, generation, groups, data, logs, training)
    for flag, promises in module.PROMISES.items()
}
"""Flag -> its promises; one for each flag that names a function of the user's."""


def load(flag: str, path: str) -> Callable[..., Any]:
    """As a run loads it: the path, whether it can be called so, async or not. Raises ValueError."""
    if flag in plugins.CALLS:
        return plugins.load_function(flag, path)
    if flag in hooks.CALLS:
        return find_callable(flag, path, hooks.CALLS[flag])
    return find_callable(flag, path, OTHER_CALLS[flag])
