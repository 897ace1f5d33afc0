"""Numbers of other libraries are numbers."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from slime.types.reward import one_reward_each, plain_reward

NUMBERS = [
    (np.float32(0.5), 0.5, float),
    (np.float64(0.5), 0.5, float),
    (np.int64(-3), -3, int),
    (np.bool_(True), True, bool),
    (np.array(2.0), 2.0, float),
    (np.array([2]), 2, int),
    (torch.tensor(0.25), 0.25, float),
    (torch.tensor([1], dtype=torch.int64), 1, int),
    (torch.tensor(True), True, bool),
    (torch.tensor(1.5, dtype=torch.bfloat16, requires_grad=True), 1.5, float),
    (Fraction(1, 4), 0.25, float),
    (Decimal("0.25"), 0.25, float),
    (7, 7, int),
    (True, True, bool),
]


@pytest.mark.parametrize("given, wanted, kind", NUMBERS, ids=[repr(row[0]) for row in NUMBERS])
def test_a_scalar_of_another_library_is_the_same_python_number(given, wanted, kind):
    found = plain_reward(given)
    assert found == wanted and type(found) is kind
    assert plain_reward({"score": given, "pred": "x"}) == {"score": wanted, "pred": "x"}


def test_what_is_no_number_stays_for_the_check_that_names_it():
    assert plain_reward(None) is None and plain_reward("1.0") == "1.0"
    assert math.isnan(plain_reward(np.float32("nan")))
    assert plain_reward(np.zeros(2)).shape == (2,) and plain_reward(torch.zeros(2)).shape == (2,)


@pytest.mark.parametrize(
    "answer",
    [
        [1.0, 0.0], (1.0, 0.0), [np.float32(1), torch.tensor(0)], np.array([1.0, 0.0]), np.array([[1], [0]]),
        torch.tensor([1.0, 0.0]), torch.tensor([[True], [False]]),
    ],
)  # fmt: skip
def test_a_grader_of_lists_may_answer_with_an_array(answer):
    found = one_reward_each(answer, 2, who="me")
    assert found == [1, 0] and {type(value) for value in found} <= {float, int, bool}


@pytest.mark.parametrize("answer", [1.0, [1.0], np.ones(3), np.float32(1), None, "12", {0: 1.0, 1: 0.0}])
def test_an_answer_that_is_not_one_reward_each_is_named(answer):
    with pytest.raises(ValueError, match="me gave .* for a list of 2 samples"):
        one_reward_each(answer, 2, who="me")
