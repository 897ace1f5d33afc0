"""A wrong function of the trainer's fails before engines come up, naming flag, path, found and expected."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slime.config import Config
from slime.training.hooks import CALLS, check_hooks, load_hook, named_hooks

HERE = __name__


def everything(*args, **kwargs):
    pass


def tis_without_lengths(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks):
    pass


def tis(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **kwargs):
    pass


def of_batch(args, batch):
    pass


def old_signature(args, samples):
    """What slime's docs once said of --rollout-data-postprocess-path."""


def plain_provider(pre_process, post_process):
    pass


async def asynchronous(args, model, store_prefix):
    pass


not_callable = 3

WRONG = {
    "no module": ("--custom-tis-function-path", "nowhere.at.all.mis", "module nowhere.at.all cannot be imported"),
    "no name": ("--custom-loss-function-path", f"{HERE}.missing", "has no 'missing'; it has:"),
    "no function": ("--custom-megatron-init-path", f"{HERE}.not_callable", "found a int, which cannot be called"),
    "missing keyword": (
        "--custom-tis-function-path", f"{HERE}.tis_without_lengths", "got an unexpected keyword argument 'total_lengths'",
    ),
    "too few": (
        "--custom-loss-function-path", f"{HERE}.of_batch",
        "found of_batch(args, batch) (too many positional arguments); expected fn(args, batch, logits, sum_of_sample_mean)",
    ),
    "an older signature": (
        "--rollout-data-postprocess-path", f"{HERE}.old_signature", "expected fn(args, rollout_id, rollout_data)",
    ),
    "async": (
        "--custom-megatron-before-log-prob-hook-path", f"{HERE}.asynchronous",
        "found an async function; expected fn(args, model,",
    ),
    "too few for a reducer": ("--custom-pg-loss-reducer-function-path", f"{HERE}.of_batch", "expected fn(total_lengths,"),
    "too few for a step": ("--custom-megatron-before-train-step-hook-path", f"{HERE}.of_batch", "expected fn(args, rollout_id"),
    "too few for an advantage": ("--custom-advantage-function-path", f"{HERE}.plain_provider", None),
}  # fmt: skip


@pytest.mark.parametrize("flag, path, message", WRONG.values(), ids=WRONG)
def test_a_wrong_function_is_explained(flag, path, message):
    if message is None:  # two arguments of any name are enough: slime calls it by position
        assert load_hook(flag, path) is plain_provider
        return
    with pytest.raises(ValueError) as caught:
        load_hook(flag, path)
    assert str(caught.value).startswith(f"{flag} {path}: ") and message in str(caught.value)


@pytest.mark.parametrize("flag", CALLS)
def test_a_function_of_anything_fits_every_flag(flag):
    assert load_hook(flag, f"{HERE}.everything") is everything and load_hook(flag, None) is None


def config_with(**values) -> Config:
    config = Config()
    model = {name: values.pop(name) for name in ("spec", "custom_model_provider_path") if name in values}
    return replace(config, algorithm=replace(config.algorithm, **values), model=replace(config.model, **model))


def test_all_wrong_flags_are_told_at_once_and_right_ones_pass():
    wrong = config_with(
        custom_tis_function_path=f"{HERE}.missing", custom_advantage_function_path="x.y", spec=(HERE, "plain_provider")
    )
    with pytest.raises(ValueError) as caught:
        check_hooks(wrong)
    told = str(caught.value).split("\n")
    assert [line.split()[0] for line in told] == ["--custom-advantage-function-path", "--custom-tis-function-path", "--spec"]
    check_hooks(config_with(custom_tis_function_path=f"{HERE}.tis", custom_model_provider_path=f"{HERE}.plain_provider"))


def test_nothing_is_imported_where_no_flag_names_a_function_of_the_users():
    assert named_hooks(config_with(spec=("slime_plugins.models.glm5.glm5", "get_glm5_spec"))) == []


def test_what_a_module_raises_while_it_is_imported_is_told_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "breaks_on_import.py").write_text("x = 1\ny = undefined_name\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"raises NameError: name 'undefined_name' is not defined \(.*breaks_on_import.py:2\)"):
        load_hook("--custom-megatron-init-path", "breaks_on_import.init")
