"""A wrong dotted path fails at start and names flag, path, found and expected."""

from __future__ import annotations

import pytest
from rollout_helpers import make_config

from slime.rollout.plugins import load_function, load_plugins

HERE = __name__


def two_arguments(args, sample):
    return None


async def async_two_arguments(args, sample, **kwargs):
    return 0.0


async def async_one_argument(args):
    return None


def filter_of_one(group):
    return True


def rollout_without_evaluation(args, rollout_id, data_source):
    return []


class NoState:
    def __init__(self, args):
        pass

    def get_samples(self, n):
        return []


not_callable = 3

WRONG = {
    "no dots": ("--custom-rm-path", "reward", "expected a dotted path package.module.name"),
    "no module": ("--custom-rm-path", "nowhere.at.all.reward", "module nowhere.at.all cannot be imported"),
    "no attribute": ("--custom-rm-path", f"{HERE}.missing", "has no 'missing'; it has: NoState, async_one_argument"),
    "not callable": ("--custom-rm-path", f"{HERE}.not_callable", "found a int, which cannot be called"),
    "plain instead of async": (
        "--custom-rm-path",
        f"{HERE}.two_arguments",
        "found a plain function; expected async fn(args, sample",
    ),
    "too few arguments": (
        "--custom-generate-function-path",
        f"{HERE}.async_one_argument",
        "found async_one_argument(args) (too many positional arguments); expected async fn(args, sample, sampling_params",
    ),
    "filter without args": ("--dynamic-sampling-filter-path", f"{HERE}.filter_of_one", "found filter_of_one(group)"),
    "rollout without evaluation": (
        "--rollout-function-path",
        f"{HERE}.rollout_without_evaluation",
        "got an unexpected keyword argument 'evaluation'",
    ),
    "data source without state": (
        "--data-source-path",
        f"{HERE}.NoState",
        "has no add_samples, state_dict, load_state_dict, __len__",
    ),
    "data source that is a function": ("--data-source-path", f"{HERE}.filter_of_one", "expected a class taking (args)"),
}


@pytest.mark.parametrize("flag, path, message", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_plugin_is_explained(flag, path, message):
    with pytest.raises(ValueError) as caught:
        load_function(flag, path)
    assert str(caught.value).startswith(f"{flag} ") and path in str(caught.value)
    assert message in str(caught.value)


def test_all_wrong_flags_are_told_at_once():
    config = make_config(custom_rm_path=f"{HERE}.missing", rollout_sample_hook_path=(f"{HERE}.two_arguments", "x.y"))
    with pytest.raises(ValueError) as caught:
        load_plugins(config)
    assert "--custom-rm-path" in str(caught.value) and "--rollout-sample-hook-path x.y" in str(caught.value)


def test_the_defaults_and_right_plugins_load():
    config = make_config(custom_rm_path=f"{HERE}.async_two_arguments", rollout_sample_hook_path=(f"{HERE}.two_arguments",))
    plugins = load_plugins(config)
    assert plugins.others["--rollout-sample-hook-path"] == (two_arguments,)
    from slime.rollout.data_source import RolloutDataSourceWithBuffer

    assert plugins.data_source is RolloutDataSourceWithBuffer
