"""Malformed rewards and answers of plugins and engines: one clear error each, with sample, values and what was expected.

Every case is a whole rollout of 4 prompts x 2 samples in which one prompt goes wrong: its group is dropped and counted, another
prompt takes its place, and the ledger (submitted = trained + dropped + put back, checked by the loop) balances.
"""

from __future__ import annotations

import logging
import re
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
from rollout_helpers import sum_in

from slime.rollout.plugins import load_plugins
from slime.rollout.to_batch import make_rollout_batch
from slime.types.sample import Sample, Status

BAD = "0"
"""Label of the one prompt that goes wrong."""
CASE = SimpleNamespace(reward=None, generate=None)


class Odd:
    """An answer of no known kind."""


async def grader(args, sample, **kwargs):
    if isinstance(sample, list):
        return CASE.reward(sample) if sample[0].label == BAD else [1.0 for _ in sample]
    return CASE.reward(sample) if sample.label == BAD else 1.0


async def generator(args, sample, sampling_params):
    from slime.rollout.sglang_rollout import generate

    await generate(args, sample, sampling_params)
    return CASE.generate(sample) if sample.label == BAD else sample


def raises(error: BaseException):
    def call(*args):
        raise type(error)(*error.args)

    return call


def changed(**values):
    def call(sample):
        for name, value in values.items():
            setattr(sample, name, value(sample) if callable(value) else value)
        return sample

    return call


@pytest.fixture
def judged(rollout_config, runtime_args, router, caplog):
    """(**config values) -> (labels of the trained groups, the metrics, warnings about failed samples)."""

    def one(**values):
        config = rollout_config(over_sampling_batch_size=4, **values)
        args, plugins = runtime_args(config), load_plugins(config)
        with caplog.at_level(logging.WARNING):
            output = plugins.rollout(args, 0, plugins.data_source(args))
        make_rollout_batch(output.samples, rollout_id=0, config=config)
        told = [record.getMessage() for record in caplog.records if " failed: " in record.getMessage()]
        return [group[0].label for group in output.samples], output.metrics or {}, told

    return one


def is_told_once(found, said: str, reason: str) -> None:
    labels, metrics, told = found
    assert len(labels) == 4 and BAD not in labels, "another prompt takes its place"
    assert metrics["rollout/dynamic_filter/drop_failed"] == 1
    assert metrics[f"rollout/failed_samples/{reason}"] == 2
    assert len(told) == 1 and re.search(said, told[0]) and "\n" not in told[0], told


EXPECTED = "expected a finite number, or a mapping that holds one"
REWARDS = {
    "nan": (lambda sample: float("nan"), f"the reward of sample [01] is nan; {EXPECTED}"),
    "infinity": (lambda sample: float("-inf"), f"is -inf; {EXPECTED}"),
    "more than float32 holds": (lambda sample: 1e39, r"is 1e\+39; expected a finite number"),
    "an integer of a thousand digits": (lambda sample: 10**1000, "is 1000.*; expected a finite number"),
    "none": (lambda sample: None, f"is None; {EXPECTED}"),
    "a text": (lambda sample: "1.0", f"is '1.0'; {EXPECTED}"),
    "a list for one sample": (lambda sample: [1.0], rf"is \[1.0\]; {EXPECTED}"),
    "an array of two": (lambda sample: np.ones(2), rf"is array\(\[1., 1.\]\); {EXPECTED}"),
    "a complex number": (lambda sample: 1j, f"is 1j; {EXPECTED}"),
    "an object": (lambda sample: Odd(), f"is <.*Odd object.*; {EXPECTED}"),
    "a NaN of Decimal's": (lambda sample: Decimal("nan"), f"is nan; {EXPECTED}"),
    "a mapping without a number": (lambda sample: {"note": "good"}, rf"is {{'note': 'good'}}; {EXPECTED}"),
    "a mapping with a NaN": (lambda sample: {"score": 1.0, "length": float("nan")}, f"is {{.*nan}}; {EXPECTED}"),
    "an empty mapping": (lambda sample: {}, rf"is {{}}; {EXPECTED}"),
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_that_is_none(name: str, judged) -> None:
    CASE.reward, said = REWARDS[name]
    is_told_once(judged(custom_rm_path=f"{__name__}.grader"), said, "grading_ValueError")


RAISED = {
    "a missing key": (raises(KeyError("gold")), r"KeyError: 'gold' \(.*test_malformed.py:\d+ in call: raise type", "KeyError"),
    "an assertion without words": (raises(AssertionError()), r"AssertionError:.*test_malformed.py", "AssertionError"),
    "several lines": (raises(RuntimeError("one\ntwo\nthree")), "RuntimeError: one two three", "RuntimeError"),
    "an end of Python": (raises(SystemExit(3)), "SystemExit: 3", "SystemExit"),
}


@pytest.mark.parametrize("name", RAISED)
def test_a_grader_that_raises(name: str, judged) -> None:
    CASE.reward, said, reason = RAISED[name]
    is_told_once(judged(custom_rm_path=f"{__name__}.grader"), said, f"grading_{reason}")


LISTS = {
    "one too few": (lambda samples: [1.0], "gave 1 rewards for a list of 2 samples"),
    "one number": (lambda samples: 1.0, "gave 1.0 for a list of 2 samples"),
    "nothing": (lambda samples: None, "gave None for a list of 2 samples"),
    "a matrix": (lambda samples: np.ones((2, 2)), "gave 4 rewards for a list of 2 samples"),
    "a NaN among them": (lambda samples: [1.0, float("nan")], f"the reward of sample 1 is nan; {EXPECTED}"),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_rewards_that_is_none(name: str, judged) -> None:
    CASE.reward, said = LISTS[name]
    is_told_once(judged(custom_rm_path=f"{__name__}.grader", group_rm=True), said, "grading_ValueError")


GENERATED = {
    "nothing": (lambda sample: None, r"generator returned a NoneType; expected a Sample or a list of Samples"),
    "an empty list": (lambda sample: [], "generator returned an empty list; expected a Sample"),
    "a mapping": (lambda sample: sample.to_dict(), "generator returned a dict; expected a Sample"),
    "a text among samples": (lambda sample: [sample, "x"], "generator returned a str; expected a Sample"),
    "a mask that is too short": (changed(loss_mask=[1]), r"loss_mask has 1 entries, the response has \d tokens"),
    "too many log-probs": (
        changed(rollout_log_probs=[-0.5] * 40), r"rollout_log_probs has 40 entries, the response has \d tokens"),
    "more response than tokens": (changed(response_length=400), "response_length is 400, but there"),
    "an unknown status": (changed(status="done"), "'done' is not a valid Status"),
    "never finished": (changed(status=Status.PENDING), "generation ended with status pending; expected completed"),
    "no response": (
        changed(response_length=0, loss_mask=None, rollout_log_probs=None), "without a response token; set remove_sample"),
    "siblings without a number": (
        lambda sample: [sample, Sample.from_dict(sample.to_dict())], "must share a rollout_id that is not None"),
    "a log-prob of a trained token that is NaN": (
        changed(rollout_log_probs=lambda sample: [float("nan")] * sample.response_length),
        "rollout_log_probs of response token 0 is nan, and that token is trained"),
    "token ids that are none": (
        changed(tokens=lambda sample: [*sample.tokens[:-1], "x"]), "token .* is 'x'; token ids are"),
    "a negative token id": (
        changed(tokens=lambda sample: [*sample.tokens[:-1], -7]), "token .* is -7; token ids are"),
    "a mask of words": (
        changed(loss_mask=lambda sample: ["yes"] * sample.response_length), "loss_mask of response token 0 is 'yes'; "),
}  # fmt: skip


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_sample_that_is_none(name: str, judged) -> None:
    CASE.generate, said = GENERATED[name]
    found = judged(custom_generate_function_path=f"{__name__}.generator", rm_type="random")
    is_told_once(found, said, "generation_ValueError")


def answer(**meta) -> dict:
    """An engine's answer of three tokens."""
    whole = {
        "output_token_logprobs": [[-0.5, 65, None], [-0.25, 66, None], [-0.125, 67, None]],
        "finish_reason": {"type": "stop"},
    }
    return {"text": "abc", "meta_info": whole | meta}


ANSWERS = {
    "no log-probs": (answer(output_token_logprobs=None), "holds no output_token_logprobs, although"),
    "no meta_info": ({"text": "abc"}, "holds no output_token_logprobs"),
    "a log-prob that is null": (answer(output_token_logprobs=[[None, 65, None]]), "log-prob of response token 0 is None"),
    "a log-prob that is a text": (answer(output_token_logprobs=[["x", 65, None]]), "log-prob of response token 0 is 'x'"),
    "a token that is a text": (answer(output_token_logprobs=[[-0.5, "x", None]]), "the engine's response token 0 is 'x'"),
    "a negative token": (answer(output_token_logprobs=[[-0.5, -1, None]]), "the engine's response token 0 is -1"),
    "an entry without a token": (answer(output_token_logprobs=[[-0.5]]), r"the engine's response token 0 is \[-0.5\]"),
    "fewer tokens than it says": (
        answer(completion_tokens=5), "the engine's answer holds 3 tokens and says that it made 5",
    ),
    "no token at all": (answer(output_token_logprobs=[]), "without a response token"),
    "a list": ([1, 2], r"the engine's answer is a list, no JSON object"),
    "a text": ("cut off", r"the engine's answer is a str, no JSON object"),
    "a finish reason that is a text": (answer(finish_reason="stop"), "the engine's finish_reason is 'stop'"),
    "an unknown end": (answer(finish_reason={"type": "odd"}), "generation ended with status pending"),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_an_engines_answer_that_is_none(name: str, judged, router, monkeypatch) -> None:
    body, said = ANSWERS[name]
    whole = router.generated
    monkeypatch.setattr(
        router, "generated", lambda text, finish: whole(text, finish) if isinstance(text, str) and finish != "raw" else text
    )
    router.answer = lambda text, payload: (body, "raw") if sum_in(text) == int(BAD) else (f"\\boxed{{{sum_in(text)}}}", "stop")
    is_told_once(judged(), said, "generation_ValueError")


def nan_rewards(args, samples):
    return [1.0 for _ in samples], [float("nan") for _ in samples]


def word_rewards(args, samples):
    return [1.0 for _ in samples], ["good" for _ in samples]


def one_list(args, samples):
    return [1.0 for _ in samples]


def huge_rewards(args, samples):
    return [1.0 for _ in samples], [1e39 for _ in samples]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nan_rewards", "nan_rewards: the reward of sample 0 is nan; expected"),
        ("huge_rewards", "huge_rewards: the reward of sample 0 is inf"),
        ("word_rewards", "word_rewards: .*'good'"),
        ("one_list", r"one_list gave a list; expected \(raw_rewards, rewards\)"),
    ],
)
def test_a_post_processing_that_gives_none(name: str, said: str, judged) -> None:
    with pytest.raises(ValueError, match=f"--custom-reward-post-process-path {__name__}.{said}"):
        judged(custom_reward_post_process_path=f"{__name__}.{name}", rm_type="random")


def columns(samples, **other) -> dict:
    whole = {
        "tokens": [sample.tokens for sample in samples], "response_lengths": [sample.response_length for sample in samples],
        "rewards": [1.0 for _ in samples], "loss_masks": [[1] * sample.response_length for sample in samples],
        "rollout_ids": [sample.index for sample in samples],
    }  # fmt: skip
    return whole | other


def a_list_of_samples(args, samples):
    return samples


def short_masks(args, samples):
    return columns(samples, loss_masks=[[1] for _ in samples])


def few_rewards(args, samples):
    return columns(samples, rewards=[1.0])


def nan_column(args, samples):
    return columns(samples, rewards=[float("nan") for _ in samples])


def word_tokens(args, samples):
    return columns(samples, tokens=[["a"] * len(sample.tokens) for sample in samples])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a_list_of_samples", "a_list_of_samples gave a list; expected a mapping of columns"),
        ("short_masks", r"loss_masks has shape \(1,\), the response has \d tokens"),
        ("few_rewards", r"column rewards has shape \(1,\), but there are 8 samples"),
        ("nan_column", "the reward of sample 0 is nan"),
        ("word_tokens", "word_tokens: column tokens: .*'a'"),
    ],
)
def test_a_conversion_that_gives_none(name: str, said: str, judged) -> None:
    with pytest.raises(ValueError, match=said):
        judged(custom_convert_samples_to_train_data_path=f"{__name__}.{name}", rm_type="random")
