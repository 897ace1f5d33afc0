"""Metrics of a rollout and an evaluation, by hand."""

from __future__ import annotations

import itertools
import math

import pytest

from slime.rollout.metrics import evaluation_metrics, pass_at_k, repeats_itself, rollout_metrics
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
