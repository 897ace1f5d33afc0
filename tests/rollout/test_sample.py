"""A Sample is whole after every append, or unchanged."""

from __future__ import annotations

import base64
import copy
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.types.sample import Sample, Status


class Args:
    sglang_speculative_algorithm = "EAGLE"
    num_layers, moe_router_topk = 3, 2
    reward_key = None


def test_masks_and_log_probs_follow_trainable_and_environment_tokens():
    sample = Sample(index=7, tokens=[10, 11])
    sample.append_response_tokens(tokens=[1, 2], log_probs=[-0.1, -0.2], text="ab")
    sample.append_response_tokens(tokens=[3], trainable=False, text="T")
    sample.append_response_tokens(tokens=[4], log_probs=[-0.4], text="c")
    assert (sample.tokens, sample.response_length, sample.response) == ([10, 11, 1, 2, 3, 4], 4, "abTc")
    assert sample.loss_mask == [1, 1, 0, 1]
    assert sample.rollout_log_probs == [-0.1, -0.2, 0.0, -0.4]
    assert sample.effective_response_length == 3 and sample.prompt_length == 2


def test_an_absent_mask_stands_for_ones_over_the_earlier_response():
    sample = Sample(tokens=[1, 2, 3], response_length=2)
    sample.append_response_tokens(tokens=[4], trainable=False)
    assert sample.loss_mask == [1, 1, 0] and sample.rollout_log_probs == [0.0, 0.0, 0.0]


def test_lists_that_a_plugin_assigned_grow_in_place():
    mask, log_probs = [], []
    sample = Sample(tokens=[1], loss_mask=mask, rollout_log_probs=log_probs)
    sample.append_response_tokens(tokens=[2, 3], log_probs=[-0.1, -0.2])
    sample.append_response_tokens(tokens=[4], trainable=False)
    assert sample.loss_mask is mask and mask == [1, 1, 0]
    assert sample.rollout_log_probs is log_probs and log_probs == [-0.1, -0.2, 0.0]
    other = Sample(tokens=[1, 2], response_length=1, loss_mask=np.array([0]), rollout_log_probs=(-0.5,))
    other.append_response_tokens(tokens=[3], log_probs=np.array([-1.0]))
    assert other.loss_mask == [0, 1] and other.rollout_log_probs == [-0.5, -1.0]


@pytest.mark.parametrize("prompt", [[7, 8], (7, 8), np.array([7, 8])])
def test_prompt_ids_are_followed_by_the_response_and_never_changed(prompt):
    samples = [Sample(tokens=prompt), Sample(tokens=prompt)]
    samples[0].append_response_tokens(tokens=np.array([1, 2]), log_probs=[-1.0, -1.0])
    assert samples[0].tokens == [7, 8, 1, 2] and {type(token) for token in samples[0].tokens} == {int}
    assert list(prompt) == list(samples[1].tokens) == [7, 8]


@pytest.mark.parametrize("nothing", [{}, {"tokens": None}, {"tokens": []}])
@pytest.mark.parametrize("log_probs", [None, [], np.zeros(0)])
@pytest.mark.parametrize("before", [{}, {"response_length": 1}, {"response_length": 1, "rollout_log_probs": [-0.5]}])
def test_a_request_that_gave_nothing_ends_the_sample_and_changes_no_length(nothing, log_probs, before):
    sample = Sample(tokens=[1, 2], **before)
    sample.append_response_tokens(**nothing, log_probs=log_probs, meta_info={"finish_reason": {"type": "abort"}})
    assert sample.status is Status.ABORTED and sample.tokens == [1, 2]
    assert sample.rollout_log_probs == before.get("rollout_log_probs")
    sample.validate()


def test_nothing_is_appended_behind_a_teachers_log_probs():
    sample = Sample(tokens=[1, 2], response_length=1, rollout_log_probs=[-1.0], teacher_log_probs=[-2.0])
    with pytest.raises(ValueError, match="teacher's log-probs"):
        sample.append_response_tokens(tokens=[3], log_probs=[-1.0])
    assert sample.tokens == [1, 2] and sample.rollout_log_probs == [-1.0]


BAD_APPENDS = {
    "no log-probs": ({"tokens": [5]}, "1 trainable tokens need 1 log-probs, got none"),
    "too few log-probs": ({"tokens": [5, 6], "log_probs": [-1.0]}, "2 trainable tokens need 2 log-probs, got 1"),
    "log-probs of the environment": ({"tokens": [5], "log_probs": [-1.0], "trainable": False}, "pass none"),
    "half a top-p span": ({"tokens": [5], "log_probs": [-1.0], "meta_info": {"top_p_token_ids": [1]}}, "only one of"),
    "top-p offsets of another length": (
        {"tokens": [5], "log_probs": [-1.0], "meta_info": {"top_p_token_ids": [1], "top_p_token_offsets": [0, 1, 1]}},
        "must be 2 rising numbers from 0 to 1",
    ),
    "routing of another length": (
        {"args": Args, "tokens": [5], "log_probs": [-1.0], "meta_info": {"routed_experts": [0] * 5}},
        "routed experts have 5 entries; 3 tokens",
    ),
}


@pytest.mark.parametrize("call, message", BAD_APPENDS.values(), ids=BAD_APPENDS.keys())
def test_a_refused_append_changes_nothing(call, message):
    sample = Sample(index=7, tokens=[1, 2, 9], response_length=1, rollout_log_probs=[-0.3], loss_mask=[1])
    before = copy.deepcopy(sample.to_dict())
    with pytest.raises(ValueError, match="sample 7") as caught:
        sample.append_response_tokens(**call)
    assert message in str(caught.value)
    assert sample.to_dict() == before


def test_trainable_tokens_after_a_response_without_log_probs_are_refused():
    with pytest.raises(ValueError, match="the 1 response tokens before have no log-probs"):
        Sample(tokens=[1, 2], response_length=1).append_response_tokens(tokens=[3], log_probs=[-1.0])


def test_the_end_of_a_request_sets_status_version_and_statistics():
    sample = Sample(tokens=[1])
    meta = {
        "finish_reason": {"type": "length"}, "weight_version": 4, "cached_tokens": 3, "prompt_tokens": 12,
        "spec_accept_token_num": 6, "spec_draft_token_num": 8, "spec_verify_ct": 2, "completion_tokens": 8,
    }  # fmt: skip
    sample.append_response_tokens(Args, tokens=[2], log_probs=[-1.0], meta_info=meta)
    sample.append_response_tokens(Args, tokens=[3], log_probs=[-1.0], meta_info=meta | {"finish_reason": {"type": "stop"}})
    assert sample.status is Status.COMPLETED and sample.weight_versions == ["4", "4"]
    assert sample.prefix_cache_info.prefix_cache_hit_rate == 6 / 24
    assert sample.spec_info.spec_accept_rate == 12 / 16 and sample.spec_info.spec_accept_length == 16 / 4
    assert Sample(tokens=[1], status=Status.PENDING).status is Status.PENDING


def test_top_p_spans_are_merged_and_environment_tokens_get_empty_ones():
    sample = Sample(tokens=[1])
    packed = base64.b64encode(np.array([5, 6, 7], np.int32).tobytes()).decode()
    sample.append_response_tokens(
        tokens=[5, 7], log_probs=[-1, -1], meta_info={"top_p_token_ids": packed, "top_p_token_offsets": [0, 2, 3]}
    )
    sample.append_response_tokens(tokens=[9], trainable=False)
    sample.append_response_tokens(
        tokens=[8], log_probs=[-1], meta_info={"top_p_kept_token_ids": [8, 4], "top_p_kept_token_offsets": [0, 2]}
    )
    assert sample.rollout_top_p_token_ids.tolist() == [5, 6, 7, 8, 4]
    assert sample.rollout_top_p_token_offsets.tolist() == [0, 2, 3, 3, 5]
    with pytest.raises(ValueError, match="these 1 have none"):
        sample.append_response_tokens(tokens=[8], log_probs=[-1])


def test_routed_experts_of_a_later_turn_continue_the_earlier_ones():
    sample = Sample(tokens=[1, 2])
    first = np.arange(2 * 6, dtype=np.int32)
    sample.append_response_tokens(Args, tokens=[3], log_probs=[-1], meta_info={"routed_experts": first})
    second = 100 + np.arange(2 * 6, dtype=np.int32)
    meta = {"routed_experts": second, "routed_experts_start_len": 1}
    sample.append_response_tokens(Args, tokens=[4], log_probs=[-1], meta_info=meta)
    assert sample.rollout_routed_experts.shape == (3, 3, 2)
    assert sample.rollout_routed_experts.reshape(-1).tolist() == [*range(6), *(100 + i for i in range(12))]


def test_a_prompts_experts_and_a_responses_come_from_two_engines():
    """3 prompt tokens and 4 new ones have 6 rows, 3 of each; the response's first was taken back, so its engine knows none."""
    meta = {"prompt_routed_experts": bytes(range(18)), "routed_experts": base64.b64encode(bytes(range(100, 118))).decode()}
    sample = Sample(tokens=[1, 2, 3])
    sample.append_response_tokens(Args, tokens=[4, 5, 6, 7], log_probs=[-1] * 4, meta_info=meta)
    assert sample.rollout_routed_experts.dtype == np.uint8
    assert sample.rollout_routed_experts.reshape(-1).tolist() == [*range(18), *range(100, 118)]
    lost = np.array([-1] * 6 + list(range(12)), np.int16).tobytes()
    other = Sample(tokens=[1, 2, 3])
    other.append_response_tokens(Args, tokens=[4, 5, 6, 7], log_probs=[-1] * 4, meta_info=meta | {"routed_experts": lost})
    assert other.rollout_routed_experts.reshape(-1).tolist() == [*range(18), *[-1] * 6, *range(12)]
    for wrong in ({"prompt_routed_experts": bytes(12)}, {"routed_experts": bytes(30)}, {"routed_experts": None}):
        with pytest.raises(ValueError, match="routed experts have .* entries; 3 tokens from position .* top-2 need 18"):
            Sample(tokens=[1, 2, 3]).append_response_tokens(
                Args, tokens=[4, 5, 6, 7], log_probs=[-1] * 4, meta_info=meta | wrong
            )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=6))
def test_any_sequence_of_appends_keeps_all_lengths_equal(turns):
    sample = Sample(tokens=[0])
    for count, trainable in turns:
        log_probs = [-0.5] * count if trainable else None
        sample.append_response_tokens(tokens=[1] * count, log_probs=log_probs, trainable=trainable)
    sample.validate()
    total = sum(count for count, _ in turns)
    assert sample.response_length == total == len(sample.tokens) - 1
    assert sample.effective_response_length == sum(count for count, trainable in turns if trainable)


def test_a_dump_restores_the_sample_with_what_a_plugin_added():
    sample = Sample(index=3, tokens=[1, 2], response_length=1, reward={"score": 1.0}, status=Status.TRUNCATED)
    sample.trace = {"events": []}
    again = Sample.from_dict(sample.to_dict())
    assert again.to_dict() == sample.to_dict() and again.trace == {"events": []}
    assert Sample.from_dict({"tokens": [1]}).status is Status.PENDING


def test_a_reward_key_that_the_reward_lacks_is_named():
    class Keyed:
        reward_key = "acc"

    assert Sample(reward={"acc": 1.0}).get_reward_value(Keyed) == 1.0
    with pytest.raises(ValueError, match=r"--reward-key is 'acc', but its reward is \['score'\]"):
        Sample(reward={"score": 1.0}).get_reward_value(Keyed)


def test_samples_need_no_torch():
    code = "import sys, slime.utils.types, slime.types.sample; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
