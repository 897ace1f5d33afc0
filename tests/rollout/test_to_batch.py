"""Samples become columns: numbers computed by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from rollout_helpers import make_config

from slime.batch.pack import pack
from slime.rollout.to_batch import make_rollout_batch
from slime.training.columns import Columns, call_with_rollout_data
from slime.types.sample import Sample, Status
from slime.types.selections import Selections


def sample(index, group, reward, *, prompt=2, response=3, **values):
    values = {"loss_mask": [1] * response, "rollout_log_probs": [-0.25] * response, "status": Status.COMPLETED} | values
    return Sample(
        index=index, group_index=group, tokens=list(range(prompt + response)), response_length=response, reward=reward, **values
    )


def test_rewards_are_centred_and_scaled_within_groups_of_any_size():
    groups = [[sample(0, 0, 1.0), sample(1, 0, 0.0), sample(2, 0, 0.0)], [sample(3, 1, 2.0), sample(4, 1, 2.0)]]
    batch = make_rollout_batch(groups, rollout_id=6, config=make_config())
    # group 0: mean 1/3, unbiased std sqrt(((2/3)^2 + 2 (1/3)^2) / 2) = sqrt(1/3); group 1: no spread.
    std = (1 / 3) ** 0.5
    np.testing.assert_allclose(batch.rewards, [2 / 3 / std, -1 / 3 / std, -1 / 3 / std, 0, 0], rtol=1e-5)
    assert batch.raw_rewards.tolist() == [1, 0, 0, 2, 2] and batch.rollout_id == 6
    assert batch.groups.tolist() == [0, 0, 0, 1, 1] and batch.trajectories.tolist() == [0, 1, 2, 3, 4]
    assert batch.sample_ids.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"grpo_std_normalization": False}, [0.5, -0.5]),
        ({"rewards_normalization": False}, [1.0, 0.0]),
        ({"advantage_estimator": "reinforce_plus_plus"}, [1.0, 0.0]),
        ({"advantage_estimator": "reinforce_plus_plus_baseline"}, [0.5, -0.5]),
        ({"advantage_estimator": "rloo"}, [1.0, -1.0]),  # 1 - 0 and 0 - 1
        # Three response tokens of at most five, the last four of them punished: 1 - 2/4 and 0 - 2/4 times the factor 2
        (
            {
                "overlong_buffer_len": 4,
                "rollout_max_response_len": 5,
                "overlong_penalty_factor": 2.0,
                "advantage_estimator": "reinforce_plus_plus",
            },
            [0.0, -1.0],
        ),
    ],
)
def test_normalisation_follows_estimator_and_flags(values, expected):
    batch = make_rollout_batch([[sample(0, 0, 1.0), sample(1, 0, 0.0)]], rollout_id=0, config=make_config(**values))
    np.testing.assert_allclose(batch.rewards, expected, rtol=1e-6)


def test_masks_truncation_and_versions_travel():
    first = sample(0, 0, 1.0, loss_mask=None, status=Status.TRUNCATED, weight_versions=["1", "2"])
    removed = sample(1, 0, 0.0, remove_sample=True)
    masked = sample(2, 1, 0.0, response=2, loss_mask=[0, 1], rollout_log_probs=[0.0, -2.0])
    batch = make_rollout_batch([[first, removed], [masked]], rollout_id=0, config=make_config())
    assert [mask.tolist() for mask in batch.loss_masks] == [[1, 1, 1], [0, 0, 0], [0, 1]]
    assert batch.truncated.tolist() == [True, False, False]
    assert batch.weight_versions == (("1", "2"), (), ())
    assert batch.rollout_log_probs[2].tolist() == [0.0, -2.0] and batch.rollout_log_probs[2].dtype == np.float32
    assert batch.tokens[2].tolist() == [0, 1, 2, 3] and batch.response_lengths.tolist() == [3, 3, 2]


def test_a_removed_sample_counts_in_its_group_and_trains_nothing_whatever_it_lacks():
    """Rewards 1, 0, 0, 0 less their mean 1/4; the rows of the removed ones are one masked token at least."""
    gone = {"response": 0, "loss_mask": None, "rollout_log_probs": None, "remove_sample": True}
    group = [
        sample(0, 0, 1.0),
        sample(1, 0, np.float32(0), status=Status.ABORTED, loss_mask=[0, 0, 0], rollout_log_probs=None),
        sample(2, 0, 0.0, status=Status.ABORTED, **gone),
        sample(3, 0, 0.0, prompt=0, **gone),
    ]
    batch = make_rollout_batch([group], rollout_id=0, config=make_config(grpo_std_normalization=False))
    assert batch.rewards.tolist() == [0.75, -0.25, -0.25, -0.25]
    assert [mask.tolist() for mask in batch.loss_masks] == [[1, 1, 1], [0, 0, 0], [0], [0]]
    assert [row.tolist() for row in batch.rollout_log_probs] == [[-0.25] * 3, [0, 0, 0], [0], [0]]
    assert [row.tolist() for row in batch.tokens[2:]] == [[0, 1, 0], [0, 0]] and batch.response_lengths.tolist() == [3, 3, 1, 1]
    assert group[2].response_length == 0, "the sample itself is as its plugin left it"


def test_rewards_of_other_libraries_are_trained():
    group = [sample(0, 0, np.float32(1)), sample(1, 0, torch.tensor(0)), sample(2, 0, np.bool_(True))]
    batch = make_rollout_batch([group], rollout_id=0, config=make_config(rewards_normalization=False))
    assert batch.rewards.tolist() == batch.raw_rewards.tolist() == [1, 0, 1]
    group = [sample(0, 0, {"score": np.int64(2)}, metadata={"raw_reward": np.float32(5)}), sample(1, 0, {"score": 0})]
    batch = make_rollout_batch([group], rollout_id=0, config=make_config(reward_key="score", rewards_normalization=False))
    assert batch.rewards.tolist() == [2, 0] and batch.raw_rewards.tolist() == [5, 0]


def test_siblings_of_a_fan_out_share_a_trajectory():
    siblings = [sample(0, 0, 1.0, rollout_id=0), sample(0, 0, 1.0, rollout_id=0)]
    batch = make_rollout_batch([[siblings, sample(1, 0, 0.0)]], rollout_id=0, config=make_config())
    assert batch.trajectories.tolist() == [0, 0, 1] and batch.groups.tolist() == [0, 0, 0]
    assert len(set(batch.sample_ids.tolist())) == 3


def test_a_column_is_there_for_all_samples_or_for_none():
    without = [[sample(0, 0, 1.0, rollout_log_probs=None), sample(1, 0, 0.0, rollout_log_probs=None)]]
    assert make_rollout_batch(without, rollout_id=0, config=make_config()).rollout_log_probs is None
    mixed = [[sample(0, 0, 1.0), sample(1, 0, 0.0, rollout_log_probs=None)]]
    with pytest.raises(ValueError, match="sample 1 has no rollout_log_probs, but 1 of 2"):
        make_rollout_batch(mixed, rollout_id=0, config=make_config())


def test_reward_mappings_need_a_key_and_a_plugin_may_keep_the_raw_reward():
    group = [[sample(0, 0, {"score": 1.0, "acc": True}), sample(1, 0, {"score": -1.0}, metadata={"raw_reward": 5.0})]]
    batch = make_rollout_batch(group, rollout_id=0, config=make_config(reward_key="score", grpo_std_normalization=False))
    assert batch.raw_rewards.tolist() == [1.0, 5.0] and batch.rewards.tolist() == [1.0, -1.0]
    with pytest.raises(ValueError, match="name its entry with --reward-key"):
        make_rollout_batch(group, rollout_id=0, config=make_config())


@pytest.mark.parametrize(
    "values, message",
    [
        ({"status": Status.ABORTED}, "rollout 4, sample 0 is aborted"),
        ({"response": 0}, "has no response token"),
        ({"loss_mask": [1]}, "loss_mask has 1 entries, the response has 3 tokens"),
    ],
)
def test_what_cannot_be_trained_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        make_rollout_batch([[sample(0, 0, 1.0, **values)]], rollout_id=3, config=make_config())


def halve(args, samples):
    return [s.reward for s in samples], [s.reward / 2 for s in samples]


def first_two_tokens(args, samples):
    return {
        "tokens": [s.tokens[:2] for s in samples], "response_lengths": [1] * len(samples), "rewards": [3.0] * len(samples),
        "loss_masks": [[1]] * len(samples), "rollout_ids": [9, 9],
    }  # fmt: skip


def test_custom_conversions_replace_the_default():
    group = [[sample(0, 0, 1.0), sample(1, 0, 0.0)]]
    config = make_config(custom_reward_post_process_path=f"{__name__}.halve")
    batch = make_rollout_batch(group, rollout_id=0, config=config)
    assert batch.raw_rewards.tolist() == [1, 0] and batch.rewards.tolist() == [0.5, 0]
    config = make_config(custom_convert_samples_to_train_data_path=f"{__name__}.first_two_tokens")
    batch = make_rollout_batch(group, rollout_id=0, config=config)
    assert batch.tokens[0].tolist() == [0, 1] and batch.rewards.tolist() == [3, 3]
    assert batch.trajectories.tolist() == [0, 0] and batch.groups.tolist() == [0, 0]


def every_column(args, samples):
    """As slime's own conversion does (what the first sample has), with what this test adds to it in its samples' metadata."""
    names = ("rollout_top_p_token_ids", "rollout_top_p_token_offsets", "rollout_routed_experts")
    return {
        "tokens": [s.tokens for s in samples], "response_lengths": [s.response_length for s in samples],
        "rewards": [s.reward for s in samples], "rollout_ids": [s.index for s in samples],
        "loss_masks": [[0] * s.response_length if s.remove_sample else s.loss_mask for s in samples],
        "metadata": [s.train_metadata for s in samples],
        **{name: [getattr(s, name) for s in samples] for name in names if getattr(samples[0], name) is not None},
        **samples[0].metadata.get("more", {}),
    }  # fmt: skip


def converted(samples, **rollout):
    config = make_config(custom_convert_samples_to_train_data_path=f"{__name__}.every_column")
    config = replace(config, model=replace(config.model, megatron={"num_layers": 2, "moe_router_topk": 3}))
    config = replace(config, rollout=replace(config.rollout, **rollout))
    return make_rollout_batch([samples], rollout_id=0, config=config)


def test_a_conversion_hands_on_what_sampling_left_and_is_refused_without():
    drawn = sample(0, 0, 1.0, response=2, loss_mask=[1, 0])
    drawn.tokens = [1, 2, 8, 9]
    assert converted([drawn]).kept_words is None
    with pytest.raises(ValueError, match="its mapping lacks rollout_top_p_token_ids and rollout_top_p_token_offsets, without"):
        converted([drawn], most_kept_words=3)
    drawn.rollout_top_p_token_ids, drawn.rollout_top_p_token_offsets = [4, 8, 5], [0, 3, 3]
    gone = sample(1, 0, 0.0, response=2, remove_sample=True)
    batch = converted([drawn, gone], most_kept_words=3)
    assert [(kept.ids.tolist(), kept.offsets.tolist()) for kept in batch.kept_words] == [
        ([4, 8, 5], [0, 3, 3]),
        ([], [0, 0, 0]),
    ]
    for offsets, said in (
        ([0, 3], "row 0: top-p offsets must be 3 rising numbers from 0 to 3; got 2"),
        ([0, 1, 3], r"0 \(8\)"),
    ):
        drawn.metadata["more"] = {"rollout_top_p_token_offsets": [offsets, None]}
        with pytest.raises(ValueError, match=said):
            converted([drawn, gone], most_kept_words=3)


def test_a_conversion_without_what_a_replay_flag_trains_with_is_refused():
    config = make_config(
        custom_convert_samples_to_train_data_path=f"{__name__}.every_column", use_rollout_routing_replay=True,
        use_rollout_indexer_replay=True,
    )  # fmt: skip
    config = replace(config, model=replace(config.model, megatron={"num_layers": 2, "moe_router_topk": 3}))
    with pytest.raises(ValueError, match="lacks rollout_routed_experts, without which --use-rollout-routing-replay"):
        make_rollout_batch([[sample(0, 0, 1.0)]], rollout_id=0, config=config)
    seen = sample(0, 0, 1.0, rollout_routed_experts=np.ones((4, 2, 3), np.uint8))
    with pytest.raises(ValueError, match="lacks rollout_indexer_topk, without which --use-rollout-indexer-replay"):
        make_rollout_batch([[seen]], rollout_id=0, config=config)
    seen.metadata["more"] = {"rollout_indexer_topk": [[[1, 2]]]}
    with pytest.raises(ValueError, match="rollout_indexer_topk of row 0 is a list; hand on the sample's own"):
        make_rollout_batch([[seen]], rollout_id=0, config=config)
    seen.metadata["more"] = {"rollout_indexer_topk": [Selections(())] * 2}
    batch = make_rollout_batch([[seen, sample(1, 0, 0.0, remove_sample=True)]], rollout_id=0, config=config)
    assert [rows.shape for rows in batch.routed_experts] == [(4, 2, 3), (0, 2, 3)] and len(batch.indexer_topk) == 2
    config = make_config(custom_convert_samples_to_train_data_path=f"{__name__}.every_column")
    batch = make_rollout_batch([[seen, sample(1, 0, 0.0)]], rollout_id=0, config=config)
    assert batch.routed_experts is None and batch.indexer_topk is None, "without its flag a column is not taken"


def test_columns_of_a_conversion_that_nothing_reads_are_named_once(caplog):
    """Of masks [1, 1, 1] a trajectory sums to 3; slime's conversion may say otherwise, and here the driver divides."""
    one = sample(0, 0, 1.0, metadata={"more": {"colour": [1], "round_number": [2], "rollout_mask_sums": [5]}})
    for _ in range(2):
        converted([one])
    notes = [record.message for record in caplog.records if "every_column" in record.message]
    assert [note.split("every_column: ")[1] for note in notes] == [
        "nothing reads its columns colour, round_number; metadata is handed to functions of the training side",
        "its rollout_mask_sums are [5.0], the masks of its trajectories sum to [3.0]; losses are divided by the latter",
    ]
    one.metadata["more"] = {"multimodal_train_inputs": [{"pixel_values": 0}]}
    with pytest.raises(ValueError, match="multimodal_train_inputs, but this version trains text alone"):
        converted([one])


@pytest.mark.parametrize("path", [None, f"{__name__}.every_column"])
def test_train_metadata_reaches_the_functions_of_the_training_side(path):
    """Whether any sample has some is not the first one's to decide; rows of a micro-batch keep their order."""
    group = [sample(0, 0, 1.0), sample(1, 0, 0.0, train_metadata={"level": 3})]
    config = make_config(custom_convert_samples_to_train_data_path=path)
    batch = make_rollout_batch([group], rollout_id=0, config=config)
    assert batch.metadata == ({}, {"level": 3})
    assert pack(batch, [1, 0], loss_weight=np.ones(2)).metadata == ({"level": 3}, {})
    seen = []

    def advantages(args, data):
        seen.append(data["metadata"])
        data["advantages"] = data["returns"] = [torch.zeros(length) for length in data["response_lengths"]]

    call_with_rollout_data(advantages, Columns(positions=(1,)), batch, None, flag="--custom-advantage-function-path")
    assert seen == [[{"level": 3}]]
    assert make_rollout_batch([[sample(0, 0, 1.0)]], rollout_id=0, config=make_config()).metadata is None


def test_the_engines_experts_travel_and_what_they_did_not_see_is_open():
    """Rows of all but the last token; a tool's answer after the last request, and a removed sample, have none."""
    config = make_config(use_rollout_routing_replay=True)
    config = replace(config, model=replace(config.model, megatron={"num_layers": 2, "moe_router_topk": 3}))
    said = np.arange(4 * 2 * 3, dtype=np.uint8).reshape(4, 2, 3)
    first = sample(0, 0, 1.0, rollout_routed_experts=said)
    later = sample(1, 0, 0.0, rollout_routed_experts=said[:2])
    gone = sample(2, 0, 0.0, remove_sample=True)
    batch = make_rollout_batch([[first, later, gone]], rollout_id=0, config=config)
    assert [rows.shape for rows in batch.routed_experts] == [(4, 2, 3), (2, 2, 3), (0, 2, 3)]
    assert (batch.routed_experts[0] == said).all() and (batch.routed_experts[1] == said[:2]).all()
    assert batch.routed_experts[0].dtype == np.uint8, "they travel to the trainer in the bytes that the engine took"
    with pytest.raises(ValueError, match="sample 3 has no routed experts, which --use-rollout-routing-replay trains with"):
        make_rollout_batch([[sample(3, 0, 1.0)]], rollout_id=0, config=config)
    assert make_rollout_batch([[sample(3, 0, 1.0)]], rollout_id=0, config=make_config()).routed_experts is None


def test_what_sampling_left_travels_and_a_trained_token_is_among_it():
    """Response of two tokens, 8 and 9: the first drawn from three words, the second an environment's."""
    config = make_config()
    config = replace(config, rollout=replace(config.rollout, most_kept_words=3))

    def drawn(index: int, ids: list[int], **changes):
        made = sample(index, 0, 1.0, response=2, loss_mask=[1, 0])
        made.tokens = [1, 2, 8, 9]
        made.rollout_top_p_token_ids, made.rollout_top_p_token_offsets = np.array(ids, np.int32), np.array([0, 3, 3], np.int32)
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    gone = drawn(1, [], remove_sample=True, rollout_top_p_token_ids=None, rollout_top_p_token_offsets=None)
    batch = make_rollout_batch([[drawn(0, [4, 8, 5]), gone]], rollout_id=0, config=config)
    assert [kept.offsets.tolist() for kept in batch.kept_words] == [[0, 3, 3], [0, 0, 0]]
    assert batch.kept_words[0].ids.tolist() == [4, 8, 5]
    with pytest.raises(ValueError, match=r"sample 3: response token 0 \(8\) is trained, but not among the words"):
        make_rollout_batch([[drawn(3, [4, 9, 5])]], rollout_id=0, config=config)
    silent = drawn(4, [], rollout_top_p_token_ids=None, rollout_top_p_token_offsets=None)
    with pytest.raises(ValueError, match="sample 4 does not tell what top-p or top-k left of the vocabulary"):
        make_rollout_batch([[silent]], rollout_id=0, config=config)
