"""The kit itself: each mistake is found by the promise that it breaks, with its values; and how a user calls it."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from plugin_contracts import data, generation, groups, logs, rewards, training
from plugin_contracts.registry import load

from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.types.sample import Sample

ROOT = Path(__file__).resolve().parents[2]


async def nan(args, sample, **kwargs):
    return float("nan")


async def text(args, sample, **kwargs):
    return "good"


async def looks_inside(args, sample, **kwargs):
    return float(sample.response.split("{")[1].rstrip("}") == sample.label)


async def draws(args, sample, **kwargs):
    return random.random()


async def cuts(args, sample, **kwargs):
    sample.response = sample.response.strip("\\")
    return 1.0


def raw_alone(args, samples):
    return [1.0 for _ in samples]


def too_few(args, samples):
    return [1.0], [1.0]


async def dictionary(args, sample, sampling_params):
    return {"response": "4"}


async def nothing(args, sample, sampling_params):
    return sample


async def two_of_one(args, sample, sampling_params):
    await generation_of(args, sample, sampling_params)
    return [sample, Sample.from_dict(sample.to_dict())]


async def generation_of(args, sample, sampling_params):
    from slime.rollout.sglang_rollout import generate

    return await generate(args, sample, sampling_params)


_SHARED: list[Sample] = []


async def always_the_first(args, sample, sampling_params):
    if not _SHARED:
        _SHARED.append(sample)
        await generation_of(args, sample, sampling_params)
    return _SHARED[0]


async def impossible(args, sample, sampling_params):
    await generation_of(args, sample, sampling_params)
    sample.rollout_log_probs[0] = float("-inf")
    return sample


def a_list(args, sample):
    return [sample]


def two_groups(args, rollout_id, data_source, evaluation=False):
    return data_source.get_samples(2)


def words(args, group):
    return "keep"


def sorts(args, group):
    group.sort(key=lambda sample: -sample.reward)
    return True


def leaves_them_there(args, rollout_id, buffer, num_samples):
    return buffer[:num_samples]


def loses(args, rollout_id, buffer, num_samples):
    taken = buffer[:1]
    buffer.clear()
    return taken


def removes(args, groups):
    groups.pop()


def gives(args, groups):
    return groups


def speaks(rollout_id, args, samples, extra_metrics, rollout_time):
    return "logged"


class Forgets(RolloutDataSourceWithBuffer):
    def add_samples(self, groups):
        pass

    def load_state_dict(self, state):
        pass


def no_returns(args, rollout_data):
    rollout_data["advantages"] = rollout_data["loss_masks"]


def one_a_sample(args, rollout_data):
    rollout_data["advantages"] = rollout_data["returns"] = [[1.0] for _ in rollout_data["rewards"]]


def unbounded(*, args, pg_loss, train_log_probs, rollout_log_probs, loss_masks, total_lengths, response_lengths):
    import torch

    ratio = (torch.cat(train_log_probs) - torch.cat(rollout_log_probs)).exp()
    return pg_loss * ratio, loss_masks, {"tis": ratio.mean()}


def squares(total_lengths, response_lengths, loss_masks, calculate_per_token_loss):
    return lambda values: (values**2).sum()


def of_logits(args, batch, logits, sum_of_sample_mean):
    return logits.float().mean(), {}


def by_token(args, batch, logits, sum_of_sample_mean):
    values = logits[0, batch.response_rows].float().mean(-1)
    return values * batch.loss_weight, {}


def detached(args, batch, logits, sum_of_sample_mean):
    return sum_of_sample_mean(logits[0, batch.response_rows].detach().mean(-1)), {}


def many_metrics(args, batch, logits, sum_of_sample_mean):
    values = logits[0, batch.response_rows].float().mean(-1)
    return sum_of_sample_mean(values), {"values": values}


def loss_alone(args, batch, logits, sum_of_sample_mean):
    return sum_of_sample_mean(logits[0, batch.response_rows].float().mean(-1))


def empties(args, version_dir, rollout_engines):
    for file in Path(version_dir).glob("*.json"):
        file.unlink()


RM, GENERATE, LOSS = "--custom-rm-path", "--custom-generate-function-path", "--custom-loss-function-path"
MISTAKES = [
    (RM, "nan", rewards.gives_a_finite_number_or_a_mapping_that_holds_one, "the reward is nan"),
    (RM, "text", rewards.gives_a_finite_number_or_a_mapping_that_holds_one, "the reward is 'good'"),
    (RM, "looks_inside", rewards.grades_odd_answers_too, "makes it raise IndexError"),
    (RM, "draws", rewards.grades_the_same_answer_the_same, "the same answer got .* and then"),
    (RM, "cuts", rewards.leaves_the_sample_as_it_is, "it changed tokens, response or mask"),
    ("--custom-reward-post-process-path", "raw_alone", rewards.gives_two_lists_of_finite_numbers, "it gave a list; expected"),
    ("--custom-reward-post-process-path", "too_few", rewards.gives_two_lists_of_finite_numbers, "raw_rewards are 1 for 4"),
    (GENERATE, "dictionary", generation.gives_samples_that_can_be_trained, "it gave a dict; expected a Sample"),
    (GENERATE, "nothing", generation.gives_samples_that_can_be_trained, "it ended with status pending"),
    (GENERATE, "two_of_one", generation.samples_of_one_trajectory_share_its_number, "2 samples have rollout_id {None}"),
    (GENERATE, "always_the_first", generation.can_run_for_many_samples_at_once, "two calls gave the same Sample"),
    (GENERATE, "impossible", generation.knows_the_log_prob_of_every_trained_token, r"log-probs of trained tokens \[0\]"),
    ("--rollout-sample-hook-path", "a_list", generation.gives_nothing_or_a_sample, "it gave a list; expected a Sample or None"),
    ("--rollout-function-path", "two_groups", generation.gives_as_many_groups_as_a_rollout_has, "gave 2 groups for .* 4"),
    ("--dynamic-sampling-filter-path", "words", groups.answers_for_groups_of_every_spread, "it says 'keep'"),
    ("--dynamic-sampling-filter-path", "sorts", groups.leaves_the_group_as_it_is, "it changed the group"),
    ("--buffer-filter-path", "leaves_them_there", groups.takes_what_it_gives_out_of_the_buffer, "1 groups .* trained twice"),
    ("--buffer-filter-path", "loses", groups.takes_what_it_gives_out_of_the_buffer, "2 groups are neither given nor in"),
    ("--rollout-sample-filter-path", "removes", groups.marks_samples_and_removes_none, "it changed the groups"),
    ("--rollout-sample-filter-path", "gives", groups.marks_samples_and_removes_none, "it gave a list, which nobody reads"),
    ("--custom-rollout-log-function-path", "speaks", logs.logs_a_rollout, "it gave 'logged'"),
    ("--data-source-path", "Forgets", data.gives_back_what_it_was_given, "what was put back is lost"),
    ("--data-source-path", "Forgets", data.goes_on_from_its_state, "after load_state_dict it goes on with"),
    ("--custom-advantage-function-path", "no_returns", training.sets_an_advantage_and_a_return_for_every_token, "'returns'"),
    (
        "--custom-advantage-function-path",
        "one_a_sample",
        training.sets_an_advantage_and_a_return_for_every_token,
        r"shape \(1,\)",
    ),
    ("--custom-tis-function-path", "unbounded", training.gives_a_loss_masks_and_values_by_token, "tis has shape"),
    ("--custom-tis-function-path", "unbounded", training.gives_no_nan_where_a_ratio_is_infinite, "the loss of trained tokens"),
    ("--custom-pg-loss-reducer-function-path", "squares", training.gives_a_function_that_sums, "it is no sum"),
    (LOSS, "loss_alone", training.gives_one_finite_loss_with_a_gradient_and_its_metrics, "it gave a Tensor; expected"),
    (LOSS, "by_token", training.gives_one_finite_loss_with_a_gradient_and_its_metrics, r"the loss is a tensor \(5,\)"),
    (LOSS, "detached", training.gives_one_finite_loss_with_a_gradient_and_its_metrics, "the loss has no gradient"),
    (LOSS, "many_metrics", training.gives_one_finite_loss_with_a_gradient_and_its_metrics, "its metric values is tensor"),
    (LOSS, "of_logits", training.gives_a_loss_of_nothing_too, "the loss of a micro-batch without samples is"),
    (
        "--custom-update-weight-post-write-path",
        "empties",
        training.leaves_a_version_as_it_was_written,
        "it changed config.json, model.safetensors.index.json, version.json of weight_v000001",
    ),
]


@pytest.mark.parametrize(("flag", "name", "broken", "said"), MISTAKES, ids=[f"{row[0]} {row[1]}" for row in MISTAKES])
def test_a_mistake_breaks_the_promise_that_names_it(flag: str, name: str, broken, said: str, stage) -> None:
    with pytest.raises((AssertionError, ValueError), match=re.compile(said, re.DOTALL)):
        broken(load(flag, f"{__name__}.{name}"), stage)


OUTSIDE = """
async def grade(args, sample, **kwargs):
    return 1.0 if sample.response else 0.0

async def half(args, sample, **kwargs):
    return sample.no_such_field

def plain(args, sample):
    return 1.0
"""


@pytest.mark.parametrize(
    ("words", "variables", "status", "said"),
    [
        (["--custom-rm-path", "outside.grade"], {}, 0, "....."),
        (["--custom-rm-path", "outside.half"], {}, 1, "has no attribute 'no_such_field'"),
        ([], {"SLIME_CONTRACT_CUSTOM_RM_PATH": "outside.plain"}, 1, "found a plain function; expected async fn"),
    ],
)
def test_a_user_points_it_at_a_function_from_a_folder_of_ones_own(
    words: list[str], variables: dict[str, str], status: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "outside.py").write_text(OUTSIDE)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        str(ROOT / "tests/plugin_contracts/test_contracts.py"),
        "-k",
        "promise",
        *words,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, said in done.stdout) == (status, True), done.stdout[-3000:]
