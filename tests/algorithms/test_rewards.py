from __future__ import annotations

import numpy as np
import pytest

from slime.algorithms.rewards import normalize_by_group


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
