"""Metrics of a rollout and an evaluation, by hand."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest

from slime.rollout.metrics import asked_metrics, evaluation_metrics, pass_at_k, repeats_itself, rollout_metrics
from slime.types.sample import Sample, Status


def sample(reward, length, *, status=Status.COMPLETED, **values):
    return Sample(tokens=[0] * (length + 1), response_length=length, reward=reward, status=status, **values)


def test_rollout_metrics_count_lengths_truncation_and_dull_groups():
    groups = [
        [sample(1, 2, weight_versions=["4"]), sample(0, 4, status=Status.TRUNCATED, weight_versions=["5"])],
        [sample(1, 6), sample(1, 8)],
    ]
    metrics = rollout_metrics(groups, {"perf/rollout_time": 4.0, "rollout/dynamic_filter/drop_failed": 1.0})
    assert metrics["rollout/response_len/mean"] == 5 and metrics["rollout/response_len/max"] == 8
    assert metrics["rollout/truncated_ratio"] == 0.25 and metrics["rollout/raw_reward"] == 0.75
    assert metrics["rollout/zero_std/count_1.0"] == 1 and metrics["rollout/zero_std/ratio"] == 0.5
    assert metrics["rollout/weight_version/min"] == 4 and metrics["rollout/weight_version/max"] == 5
    assert metrics["perf/tokens_per_sec"] == 5 and metrics["rollout/dynamic_filter/drop_failed"] == 1


@pytest.mark.parametrize("correct, n, k", [(0, 4, 2), (1, 4, 2), (2, 5, 3), (4, 4, 1), (3, 6, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(correct, n, k):
    outcomes = [True] * correct + [False] * (n - correct)
    subsets = list(itertools.combinations(outcomes, k))
    assert math.isclose(pass_at_k(outcomes, k), sum(any(subset) for subset in subsets) / len(subsets), abs_tol=1e-12)


def test_a_loop_is_told_from_prose():
    assert repeats_itself("again and " * 400)
    assert not repeats_itself("The quick brown fox jumps over the lazy dog, and nothing of it comes twice.")


def test_an_evaluation_without_answers_is_not_zero():
    assert math.isnan(evaluation_metrics({"d": {"rewards": [], "truncated": [], "samples": []}})["eval/d"])


def asked(groups, **flags):
    none = dict(log_passrate=False, log_correct_samples=False, log_multi_turn=False, log_reward_category=None)
    return asked_metrics(SimpleNamespace(**(none | flags)), groups)


GROUPS = [
    [sample(1, 2), sample(0, 4), sample(0, 4), sample(0, 4)],
    [sample(1, 6), sample(1, 8), sample(0, 8), sample(0, 8)],
]


def test_what_no_flag_asks_for_is_not_reported():
    assert asked(GROUPS) == {}


def test_pass_rates_of_trained_groups_by_hand():
    # Of the 6 pairs of four samples, 3 hold the one right answer, and 5 hold one of two.
    expected = {"passrate/pass@2": (3 / 6 + 5 / 6) / 2, "passrate/pass@4": 1.0}
    assert asked(GROUPS, log_passrate=True) == pytest.approx(expected)


def test_correct_samples_have_a_share_and_lengths_of_their_own():
    metrics = asked(GROUPS, log_correct_samples=True)
    assert metrics["rollout/correct_ratio"] == 3 / 8
    assert metrics["rollout/correct_response_len/mean"] == (2 + 6 + 8) / 3
    assert asked([[sample(0, 3)]], log_correct_samples=True) == {"rollout/correct_ratio": 0.0}


def test_turns_are_counted_with_and_without_what_the_environment_said():
    spoken = sample(1, 6, loss_mask=[1, 1, 0, 0, 0, 1], metadata={"round_number": 2})
    metrics = asked([[spoken, sample(0, 3)]], log_multi_turn=True)
    assert metrics["multi_turn/raw_response_length/mean"] == 4.5
    assert metrics["multi_turn/wo_obs_response_length/mean"] == 3.0
    assert metrics["multi_turn/round_number/max"] == 2 and metrics["multi_turn/round_number/min"] == 2


def test_categories_of_a_reward_mapping_are_shares_and_a_missing_one_is_named():
    kinds = ("wrong", "wrong", "format", "right")
    groups = [[sample({"score": 0.0, "kind": kind}, 2) for kind in kinds]]
    assert asked(groups, log_reward_category="kind") == {
        "rollout/error_cat/format": 0.25, "rollout/error_cat/right": 0.25, "rollout/error_cat/wrong": 0.5,
    }  # fmt: skip
    with pytest.raises(ValueError, match="--log-reward-category kind: the reward of sample None is 1, without such an entry"):
        asked([[sample(1, 2)]], log_reward_category="kind")
