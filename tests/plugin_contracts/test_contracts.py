"""Every path that was given (the examples without one), promise by promise."""

from __future__ import annotations

from plugin_contracts.registry import CONTRACTS, load

from slime.observability.sinks import CUSTOM
from slime.rollout import plugins
from slime.training import hooks


def test_a_plugin_keeps_its_promise(flag: str, path: str, promise, stage) -> None:
    promise(load(flag, path), stage)


def test_the_kit_knows_every_flag_that_names_a_function() -> None:
    assert set(CONTRACTS) == {*plugins.CALLS, *hooks.CALLS, "--custom-model-provider-path", "--custom-metrics-sink-path"}
    assert CUSTOM.positional == 1
