"""Graders, and what becomes of rewards before training."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from plugin_contracts import contract

from slime.types.reward import one_reward_each, plain_reward

ODD_ANSWERS = (
    "\\boxed{",
    "",
    "no answer at all",
    "😀 \\boxed{４}",
    "\\boxed{4} " * 400,
    "\x00\ud83d".encode("utf-8", "replace").decode(),
)
SECONDS = 60


def _graded(function, stage, samples: list) -> list[Any]:
    args = stage.args(stage.config(group_rm=stage.group_rm))
    if stage.group_rm:
        return one_reward_each(contract.within(SECONDS, function(args, samples)), len(samples), who="the grader")
    return [plain_reward(contract.within(SECONDS, function(args, sample))) for sample in samples]


def _is_reward(value: Any) -> bool:
    values = list(value.values()) if isinstance(value, Mapping) else [value]
    numbers = [one for one in values if isinstance(one, int | float)]
    return bool(numbers) and all(math.isfinite(one) for one in numbers)


def gives_a_finite_number_or_a_mapping_that_holds_one(function, stage) -> None:
    for reward in _graded(function, stage, [stage.sample(), stage.sample("\\boxed{5}", index=1)]):
        assert _is_reward(reward), f"the reward is {reward!r}; expected a finite number, or a mapping that holds one"


def grades_odd_answers_too(function, stage) -> None:
    """A broken grading leaves its sample, and with half of them its group, out of training."""
    for answer in ODD_ANSWERS:
        try:
            [reward] = _graded(function, stage, [stage.sample(answer)])
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"the answer {answer[:20]!r} makes it raise {type(error).__name__}: {error}") from error
        assert _is_reward(reward), f"the answer {answer[:20]!r} gets {reward!r}; expected a finite number"


def grades_the_same_answer_the_same(function, stage) -> None:
    if stage.random_rewards:
        return
    first, second = (_graded(function, stage, [stage.sample()]) for _ in range(2))
    assert first == second, f"the same answer got {first[0]!r} and then {second[0]!r} (--random-rewards allows it)"


def leaves_the_sample_as_it_is(function, stage) -> None:
    samples = [stage.sample(), stage.sample(index=1)]
    before = copy.deepcopy([(sample.tokens, sample.response, sample.loss_mask) for sample in samples])
    _graded(function, stage, samples)
    contract.unchanged("tokens, response or mask", before, [(one.tokens, one.response, one.loss_mask) for one in samples])


def gives_two_lists_of_finite_numbers(function, stage) -> None:
    samples = [*stage.group([0.0, 1.0]), *stage.group([1.0, 1.0], of=1)]
    answer = function(stage.args(), samples)
    assert isinstance(answer, tuple) and len(answer) == 2, f"it gave a {type(answer).__name__}; expected (raw_rewards, rewards)"
    for name, values in zip(("raw_rewards", "rewards"), answer, strict=True):
        assert len(values) == len(samples), f"{name} are {len(values)} for {len(samples)} samples"
        assert all(math.isfinite(float(value)) for value in values), f"{name} hold {list(values)!r}; expected finite numbers"


PROMISES = {
    "--custom-rm-path": (
        gives_a_finite_number_or_a_mapping_that_holds_one,
        grades_odd_answers_too,
        grades_the_same_answer_the_same,
        leaves_the_sample_as_it_is,
    ),
    "--custom-reward-post-process-path": (gives_two_lists_of_finite_numbers,),
}
