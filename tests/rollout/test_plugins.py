"""A wrong dotted path fails at start and names flag, path, found and expected."""

from __future__ import annotations

import functools

import pytest
from rollout_helpers import make_config

from slime.rollout.data_source import DataSource, return_to, state_of
from slime.rollout.plugins import load_function, load_plugins
from slime.types.sample import Sample

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
    "no attribute": (
        "--custom-rm-path",
        f"{HERE}.missing",
        "has no 'missing'; it has: DataSource, KnowsFilesAlone, NoState, Sample, async_one_argument",
    ),
    "not callable": ("--custom-rm-path", f"{HERE}.not_callable", "found a int, which cannot be called"),
    "plain instead of async": (
        "--custom-rm-path",
        f"{HERE}.two_arguments",
        "found a plain function; expected async fn(args, sample",
    ),
    "async instead of plain": (
        "--dynamic-sampling-filter-path",
        f"{HERE}.async_two_arguments",
        "found an async function; expected fn(args, group) (write `def`)",
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
        "has no add_samples, __len__, state_dict and load_state_dict (or save and load); derive it from",
    ),
    "data source that is a function": ("--data-source-path", f"{HERE}.filter_of_one", "expected a class taking (args)"),
}


@pytest.mark.parametrize("flag, path, message", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_plugin_is_explained(flag, path, message):
    with pytest.raises(ValueError) as caught:
        load_function(flag, path)
    assert str(caught.value).startswith(f"{flag} ") and path in str(caught.value)
    assert message in str(caught.value)


class KnowsFilesAlone(DataSource):
    """As a plugin for slime is written: five methods, no state_dict."""

    def __init__(self, args):
        self.args, self.taken, self.calls = args, 0, []

    def get_samples(self, num_samples):
        self.taken += num_samples
        return [[Sample(index=self.taken)] for _ in range(num_samples)]

    def add_samples(self, samples):
        pass

    def save(self, rollout_id):
        self.calls.append(("save", rollout_id, self.taken))

    def load(self, rollout_id=None):
        self.calls.append(("load", rollout_id))

    def __len__(self):
        return 10


def test_a_data_source_that_knows_files_alone_is_asked_to_write_and_read_them(caplog):
    source = load_function("--data-source-path", f"{HERE}.KnowsFilesAlone")(None)
    source.get_samples(3)
    between, saved = state_of(source), state_of(source, saving=7)
    assert source.calls == [("save", 7, 3)]
    return_to(source, saved)
    assert source.calls[1:] == [("load", 7)]
    return_to(source, between)
    assert "KnowsFilesAlone has no state_dict: it goes on with its next prompts" in caplog.text and len(source.calls) == 2
    with pytest.raises(TypeError, match="abstract"):
        DataSource()


def test_all_wrong_flags_are_told_at_once():
    config = make_config(custom_rm_path=f"{HERE}.missing", rollout_sample_hook_path=(f"{HERE}.two_arguments", "x.y"))
    with pytest.raises(ValueError) as caught:
        load_plugins(config)
    assert "--custom-rm-path" in str(caught.value) and "--rollout-sample-hook-path x.y" in str(caught.value)


def counted(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call


hidden_behind_a_decorator = counted(async_two_arguments)


def test_an_async_function_behind_a_decorator_is_async():
    assert load_function("--custom-rm-path", f"{HERE}.hidden_behind_a_decorator") is hidden_behind_a_decorator


def test_the_defaults_and_right_plugins_load():
    config = make_config(custom_rm_path=f"{HERE}.async_two_arguments", rollout_sample_hook_path=(f"{HERE}.two_arguments",))
    plugins = load_plugins(config)
    assert plugins.others["--rollout-sample-hook-path"] == (two_arguments,)
    from slime.rollout.data_source import RolloutDataSourceWithBuffer

    assert plugins.data_source is RolloutDataSourceWithBuffer
