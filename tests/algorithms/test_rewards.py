from __future__ import annotations

import numpy as np
import pytest

from slime.algorithms.rewards import leave_one_out, normalize_by_group, overlong_penalty


def test_groups_of_unequal_size_and_any_order_are_centred_by_hand():
    rewards = np.array([1.0, 5.0, 3.0, 0.0, 4.0, 2.0], dtype=np.float32)
    groups = np.array([7, 3, 7, 3, 7, 7])
    # group 7: 1 3 4 2 -> mean 2.5; group 3: 5 0 -> mean 2.5
    np.testing.assert_allclose(normalize_by_group(rewards, groups, False), [-1.5, 2.5, 0.5, -2.5, 1.5, -0.5])


def test_scaled_rewards_use_the_unbiased_deviation():
    rewards = np.array([0.0, 1.0, 1.0, 0.0], dtype=np.float32)
    # mean 0.5, unbiased variance 4 * 0.25 / 3 = 1/3
    expected = np.array([-1, 1, 1, -1]) * 0.5 * 3**0.5
    np.testing.assert_allclose(normalize_by_group(rewards, np.zeros(4, int), True), expected, rtol=1e-5)


def test_equal_rewards_and_single_samples_give_exact_zeros():
    rewards = np.array([0.1, 0.1, 0.1, 9.0], dtype=np.float32)
    assert np.abs(normalize_by_group(rewards, np.array([0, 0, 0, 1]), True)).max() == 0.0


def test_a_nan_reward_is_refused_by_row():
    with pytest.raises(ValueError, match=r"rows \[1\].*nan"):
        normalize_by_group(np.array([0.0, np.nan]), np.array([0, 0]), False)


def test_leave_one_out_subtracts_the_mean_of_the_others():
    rewards = np.array([1.0, 5.0, 3.0, 0.0, 4.0, 2.0, 9.0], dtype=np.float32)
    groups = np.array([7, 3, 7, 3, 7, 7, 8])
    # group 7: 1 - (3+4+2)/3, 3 - (1+4+2)/3, 4 - 2, 2 - 8/3; group 3: 5 - 0, 0 - 5; group 8 has no other
    np.testing.assert_allclose(leave_one_out(rewards, groups), [-2, 5, 2 / 3, -5, 2, -2 / 3, 0], rtol=1e-6)


def test_leave_one_out_equals_a_loop_over_the_others():
    rng = np.random.default_rng(3)
    rewards, groups = rng.normal(size=40).astype(np.float32), rng.integers(0, 6, 40)
    loop = []
    for row, group in enumerate(groups):
        others = [r for other, r in enumerate(rewards) if groups[other] == group and other != row]
        loop.append(rewards[row] - np.mean(others) if others else 0.0)
    np.testing.assert_allclose(leave_one_out(rewards, groups), loop, rtol=1e-4, atol=1e-6)


def test_the_overlong_penalty_by_hand():
    # DAPO's own numbers: 20,480 tokens at most, the last 4,096 of them punished
    lengths = np.array([100, 16384, 17408, 18432, 20480, 30000])
    found = overlong_penalty(lengths, longest=20480, buffer=4096, factor=1.0)
    np.testing.assert_allclose(found, [0, 0, -0.25, -0.5, -1, -1])
    np.testing.assert_allclose(overlong_penalty(lengths, longest=20480, buffer=4096, factor=0.5), found / 2)


def test_the_overlong_penalty_equals_the_papers_three_cases():
    rng = np.random.default_rng(4)
    for _ in range(20):
        longest = int(rng.integers(2, 5000))
        buffer, factor = int(rng.integers(1, longest)), float(rng.uniform(0.1, 2))
        lengths = rng.integers(1, 2 * longest, 50)
        cases = []
        for length in lengths.tolist():
            if length + buffer <= longest:
                cases.append(0.0)
            elif length <= longest:
                cases.append(factor * (longest - buffer - length) / buffer)
            else:
                cases.append(-factor)
        found = overlong_penalty(lengths, longest=longest, buffer=buffer, factor=factor)
        np.testing.assert_allclose(found, cases, rtol=1e-12, atol=1e-12)
