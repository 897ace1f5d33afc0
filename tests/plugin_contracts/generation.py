"""Generate functions, hooks on samples, and whole rollout functions, against a router that answers over HTTP."""

from __future__ import annotations

import asyncio
import inspect
import math

from plugin_contracts import contract

from slime.config.dotted import accepted_keywords
from slime.rollout.base_types import eval_output, flatten, train_output
from slime.rollout.generation import GenerateState, enter, rollout_sampling_params
from slime.rollout.plugins import load_plugins
from slime.rollout.to_batch import make_rollout_batch
from slime.types.sample import Sample, Status

SECONDS = 120
ENDS = (Status.COMPLETED, Status.TRUNCATED, Status.ABORTED)


def _generated(function, stage, *, number: int = 1, evaluation: bool = False) -> list[list[Sample]]:
    """What it gives for so many samples at the same time."""

    async def all_at_once() -> list:
        args = stage.args()
        enter(GenerateState(args))
        offered = accepted_keywords(function, {"evaluation": evaluation})
        calls = [
            function(args.for_call(), stage.pending(index=index), rollout_sampling_params(args), **offered)
            for index in range(number)
        ]
        return await asyncio.gather(*calls)

    results = contract.within(SECONDS, all_at_once())
    return [flatten(result) if isinstance(result, list) else [result] for result in results]


def gives_samples_that_can_be_trained(function, stage) -> None:
    for evaluation in (False, True):
        [samples] = _generated(function, stage, evaluation=evaluation)
        assert samples, "it gave an empty list; expected a Sample or a list of Samples"
        for sample in samples:
            assert isinstance(sample, Sample), f"it gave a {type(sample).__name__}; expected a Sample or a list of Samples"
            sample.validate()
            status = Status(sample.status)
            assert status in ENDS, f"it ended with status {status.value}; expected completed, truncated or aborted"
            assert sample.response_length or sample.remove_sample, (
                "it gave no response token; set remove_sample where that is meant"
            )


def knows_the_log_prob_of_every_trained_token(function, stage) -> None:
    for sample in _generated(function, stage)[0]:
        if sample.rollout_log_probs is None or sample.remove_sample:
            continue
        mask = sample.loss_mask or [1] * sample.response_length
        lost = [
            at
            for at, (kept, value) in enumerate(zip(mask, sample.rollout_log_probs, strict=True))
            if kept and not math.isfinite(value)
        ]
        assert not lost, f"log-probs of trained tokens {lost[:5]} are not finite"


def samples_of_one_trajectory_share_its_number(function, stage) -> None:
    [samples] = _generated(function, stage)
    if len(samples) > 1:
        numbers = {sample.rollout_id for sample in samples}
        assert len(numbers) == 1 and None not in numbers, (
            f"{len(samples)} samples have rollout_id {numbers}; one that is not None"
        )


def can_run_for_many_samples_at_once(function, stage) -> None:
    results = _generated(function, stage, number=8)
    identities = [id(sample) for samples in results for sample in samples]
    assert len(set(identities)) == len(identities), "two calls gave the same Sample: state is shared between them"


def comes_back_when_an_answer_is_cut(function, stage) -> None:
    answer, stage.router.answer = stage.router.answer, lambda text, payload: ("\\boxed{", "length")
    try:
        gives_samples_that_can_be_trained(function, stage)
    finally:
        stage.router.answer = answer


def gives_nothing_or_a_sample(function, stage) -> None:
    args, sample = stage.args(), stage.sample()
    offered = accepted_keywords(function, {"rollout_id": 0, "evaluation": False})
    value = function(args, sample, **offered)
    if inspect.isawaitable(value):
        value = contract.within(SECONDS, value)
    assert value is None or isinstance(value, Sample), f"it gave a {type(value).__name__}; expected a Sample or None"
    (sample if value is None else value).validate()


def gives_as_many_groups_as_a_rollout_has(function, stage) -> None:
    config = stage.config()
    args, source = stage.args(config), load_plugins(config).data_source(stage.args(config))
    groups = train_output(function(args, 0, source, evaluation=False)).samples
    assert len(groups) == config.data.rollout_batch_size, (
        f"it gave {len(groups)} groups for --rollout-batch-size {config.data.rollout_batch_size}"
    )
    make_rollout_batch(groups, rollout_id=0, config=config)


def gives_rewards_for_each_data_set(function, stage) -> None:
    config = stage.config()
    answer = eval_output(function(stage.args(config), 0, None, evaluation=True))
    assert isinstance(answer.data, dict), f"it gave a {type(answer.data).__name__}; expected a mapping by data set"
    for name, held in answer.data.items():
        assert "rewards" in held, f"{name} has {', '.join(held)}; expected rewards"


PROMISES = {
    "--custom-generate-function-path": (
        gives_samples_that_can_be_trained,
        knows_the_log_prob_of_every_trained_token,
        samples_of_one_trajectory_share_its_number,
        can_run_for_many_samples_at_once,
        comes_back_when_an_answer_is_cut,
    ),
    "--rollout-sample-hook-path": (gives_nothing_or_a_sample,),
    "--rollout-function-path": (gives_as_many_groups_as_a_rollout_has,),
    "--eval-function-path": (gives_rewards_for_each_data_set,),
}
