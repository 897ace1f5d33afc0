"""Plugins as they are written for slime run here as they are: nine kinds, against a router that answers real HTTP."""

from __future__ import annotations

import collections
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from config.flags import config_of
from example_plugins import always_on, mismatch
from rollout_helpers import sum_in

from slime.config import EvalDataset
from slime.rollout.base_types import flatten
from slime.rollout.filter_hub.base_types import DynamicFilterOutput
from slime.rollout.plugins import load_plugins
from slime.rollout.to_batch import make_rollout_batch
from slime.types.sample import Status

PLUGINS = "example_plugins"


@pytest.fixture
def run(rollout_config, runtime_args):
    """(**config values) -> (groups, batch, data source): a rollout by what a run loads, and what is trained of it."""

    def one(**values):
        values = {"rollout_max_response_len": 64} | values
        config = rollout_config(**values)
        args, plugins = runtime_args(config), load_plugins(config)
        source = plugins.data_source(args)
        output = plugins.rollout(args, 0, source)
        assert not hasattr(args, "sampling_params"), "what a plugin writes into its args stays in its call"
        return output.samples, make_rollout_batch(output.samples, rollout_id=0, config=config), source

    return one


def asked_with_the_token(router) -> bool:
    return {headers.get("Authorization") for _, headers in router.requests} == {"Bearer t0ken"}


def test_a_calculator_masks_what_it_answered(run, router):
    def answer(text, payload):
        a, b = re.search(r"(\d+) plus (\d+)", text).groups()
        result = re.search(r"<result>(\d+)</result>", text)
        return (f"\\boxed{{{result[1]}}}" if result else f"<calc>{a}+{b}</calc>"), "stop"

    router.answer = answer
    path = f"{PLUGINS}.calculator"
    groups, batch, _ = run(
        custom_generate_function_path=f"{path}.generate", custom_rm_path=f"{path}.reward", reward_key="score"
    )
    assert asked_with_the_token(router) and len(router.requests) == 2 * 8
    for row, sample in enumerate(flatten(groups)):
        count = [len(router.tokenizer.encode(part, add_special_tokens=False)) for part in re.split("(?<=>)", sample.response)]
        call, result, boxed = count[0] + count[1], count[2] + count[3], count[4]
        assert sample.response.startswith("<calc>") and sample.num_calls == 1 and sample.status is Status.COMPLETED
        assert sample.loss_mask == [1] * call + [0] * result + [1] * boxed == batch.loss_masks[row].tolist()
        assert sample.rollout_log_probs[call : call + result] == [0.0] * result and sample.rollout_log_probs[-1] < 0
        assert sample.reward["pred"] == sample.label
    assert batch.raw_rewards.tolist() == [1.0] * 8


def test_a_search_keeps_its_own_lists(run, router):
    router.answer = lambda text, payload: (
        (f"<answer>{sum_in(text)}</answer>", "length") if "<information>" in text else ("<search>sum</search>", "stop")
    )
    path = f"{PLUGINS}.search"
    groups, batch, _ = run(custom_generate_function_path=f"{path}.generate", custom_rm_path=f"{path}.reward")
    found = "<information>Adding two numbers gives their sum.</information>"
    masked = len(router.tokenizer.encode(found, add_special_tokens=False))
    for sample, mask in zip(flatten(groups), batch.loss_masks, strict=True):
        assert found in sample.response and (mask == 0).sum() == masked and sample.status is Status.TRUNCATED
    assert batch.raw_rewards.tolist() == [1.0] * 8 and batch.truncated.all() and asked_with_the_token(router)


def test_agents_write_into_their_args_and_fan_out(run, router):
    """Solver 0 is right, solver 1 is off by one, the chooser takes the right one: 1.5, 0 and 1.5 in one trajectory."""

    def answer(text, payload):
        return f"\\boxed{{{sum_in(text) + ('Solver 1' in text)}}}", "stop"

    router.answer = answer
    groups, batch, _ = run(custom_generate_function_path=f"{PLUGINS}.agents.generate", rollout_max_context_len=256)
    assert [[len(execution) for execution in group] for group in groups] == [[3, 3]] * 4 and asked_with_the_token(router)
    for execution in (execution for group in groups for execution in group):
        assert sorted(sample.reward for sample in execution) == [0, 1.5, 1.5]
        (chooser,) = [sample for sample in execution if "Choose:" in sample.prompt]
        assert chooser.reward == 1.5
    assert collections.Counter(batch.trajectories.tolist()) == dict.fromkeys(range(8), 3)
    assert np.isfinite(batch.rewards).all() and batch.groups.tolist() == sorted([0, 1, 2, 3] * 6)


def test_a_judge_asks_the_served_model_with_the_runs_token(run, router):
    def answer(text, payload):
        judged = re.search(r"Is this right\? \\boxed\{(\d+)\}", text)
        return ("yes" if int(judged[1]) % 2 else "no") if judged else f"\\boxed{{{sum_in(text)}}}", "stop"

    router.answer = answer
    groups, batch, _ = run(custom_rm_path=f"{PLUGINS}.judge.reward")
    assert [sample.reward for sample in flatten(groups)] == [0.0, 0.0, 1.0, 1.0] * 2 and asked_with_the_token(router)


def test_ranks_of_a_group_a_filter_and_a_normalisation_of_ones_own(run, router):
    asked = collections.Counter()

    def answer(text, payload):
        asked[text] += 1
        longer = " " * (asked[text] % 2) if sum_in(text) != 1 else ""
        return f"\\boxed{{{sum_in(text)}}}{longer}", "stop"

    router.answer = answer
    path = f"{PLUGINS}.ranking"
    groups, batch, _ = run(
        custom_rm_path=f"{path}.by_length", group_rm=True, dynamic_sampling_filter_path=f"{path}.wants_a_spread",
        custom_reward_post_process_path=f"{path}.centred_ranks",
    )  # fmt: skip
    assert {tuple(sorted(sample.reward for sample in group)) for group in groups} == {(0.0, 1.0)}
    assert all(min(group, key=lambda s: s.reward).response.endswith(" ") for group in groups), "the longer answer ranks last"
    assert "1" not in {group[0].label for group in groups}, "a group of equal lengths is flat"
    np.testing.assert_allclose(batch.rewards, batch.raw_rewards - 0.5)


def test_generation_that_never_stops_runs_in_a_thread_of_its_own(run, router):
    always_on._worker = None
    try:
        groups, batch, _ = run(rollout_function_path=f"{PLUGINS}.always_on.generate_rollout")
        assert len(groups) == 4 and batch.raw_rewards.tolist() == [1.0] * 8 and asked_with_the_token(router)
    finally:
        always_on._worker.stop()
        always_on._worker = None


def not_two(args, group):
    return DynamicFilterOutput(keep=group[0].label != "2", reason="two")


def test_a_loop_of_ones_own_gives_what_is_left_back_to_the_source(run, router):
    def hang_on_large_sums(text, payload):
        if sum_in(text) >= 4 and not router.aborted.wait(0.02):
            router.aborted.wait(20)
            return "\\boxed{", "abort"
        return f"\\boxed{{{sum_in(text)}}}", "stop"

    router.answer = hang_on_large_sums
    groups, batch, source = run(
        rollout_function_path=f"{PLUGINS}.own_loop.generate_rollout", over_sampling_batch_size=6, partial_rollout=True,
        dynamic_sampling_filter_path=f"{__name__}.not_two",
    )  # fmt: skip
    assert "2" not in {group[0].label for group in groups}
    assert router.aborted.is_set() and len(groups) == 4 and batch.raw_rewards.tolist() == [1.0] * 8
    left = [sample for group in source.buffer for sample in group]
    halted = [sample for sample in left if sample.status is Status.ABORTED]
    assert (
        [sample.label for sample in left] == ["4", "4"]
        and halted
        and all(sample.metadata["start_rollout_id"] == 0 for sample in halted)
    )


def test_a_loop_of_ones_own_evaluates_with_the_stock_one(rollout_config, runtime_args, router, prompt_file):
    data = EvalDataset(
        name="sums", path=f"{prompt_file}@[:3]", input_key="prompt", label_key="label", apply_chat_template=True,
        max_response_len=8,
    )  # fmt: skip
    config = rollout_config(rollout_function_path=f"{PLUGINS}.own_loop.generate_rollout", datasets=(data,))
    output = load_plugins(config).evaluate(runtime_args(config), 0, None, evaluation=True)
    assert output.data["sums"]["rewards"] == [1.0] * 3


YAML = str(Path(mismatch.__file__).with_suffix(".yaml"))


def importance_of(gaps: list[list[float]], **changed) -> tuple:
    """The example's answer for samples with these log-ratios; the engine's log-probs are -1, the policy loss is 2 a token."""
    args = config_of(
        "--custom-config-path", YAML, "--custom-tis-function-path", f"{PLUGINS}.mismatch.importance"
    ).args.for_call()
    assert args.use_tis is True
    for name, value in changed.items():
        setattr(args, name, value)
    engine = [torch.full((len(gap),), -1.0) for gap in gaps]
    masks = [torch.ones(len(gap)) for gap in gaps]
    lengths = [len(gap) for gap in gaps]
    return mismatch.importance(
        args=args, pg_loss=torch.full((sum(lengths),), 2.0),
        train_log_probs=[torch.tensor(gap) - 1 for gap in gaps], rollout_log_probs=engine, loss_masks=masks,
        total_lengths=[n + 3 for n in lengths], response_lengths=lengths,
    )  # fmt: skip


def test_importance_weights_take_their_settings_from_a_yaml():
    """Ratios 1, 3 and 1/4 in the first sample, 1.5 and e^-10 (below the veto) in the second; kept are those in [1/2, 2]."""
    gaps = [[0.0, float(np.log(3)), float(np.log(0.25))], [float(np.log(1.5)), -10.0]]
    loss, masks, shown = importance_of(gaps)
    torch.testing.assert_close(loss[:4], torch.tensor([2.0, 6.0, 0.5, 3.0]))
    assert [mask.tolist() for mask in masks] == [[1, 0, 0], [0, 0]]
    assert shown["mis_dropped"].tolist() == [0, 1, 1, 1, 1]
    # By sequence: e^(ln 3 + ln 1/4) = 3/4 for every token of the first sample.
    loss, masks, _ = importance_of(gaps, mis_level="sequence", mis_veto=None)
    torch.testing.assert_close(loss[:3], torch.full((3,), 1.5))
    assert [mask.tolist() for mask in masks] == [[1, 1, 1], [0, 0]]
    loss, masks, _ = importance_of(gaps, mis_mode="truncate", mis_veto=None)
    torch.testing.assert_close(loss[:4], torch.tensor([2.0, 4.0, 0.5, 3.0]))
    assert all(mask.all() for mask in masks)
