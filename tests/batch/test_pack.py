from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.batch.pack import pack
from slime.batch.plan import plan_steps
from slime.types import RolloutBatch
from slime.types.kept_words import KeptWords


def make_batch(lengths, responses, seed=0):
    rng = np.random.default_rng(seed)
    n = len(lengths)
    return RolloutBatch(
        rollout_id=0,
        tokens=tuple(rng.integers(1, 1000, length) for length in lengths),
        response_lengths=np.array(responses, dtype=np.int64),
        loss_masks=tuple(rng.integers(0, 2, response).astype(np.float32) for response in responses),
        rewards=np.zeros(n, np.float32),
        raw_rewards=np.zeros(n, np.float32),
        groups=np.zeros(n, np.int64),
        trajectories=np.arange(n),
        sample_ids=np.arange(n) + 100,
        truncated=np.zeros(n, bool),
        rollout_log_probs=tuple(-rng.random(response).astype(np.float32) for response in responses),
    )


def test_two_samples_by_hand():
    batch = make_batch([4, 3], [2, 1])
    micro = pack(batch, [1, 0], loss_weight=np.array([0.25, 0.5]), multiple=4)
    a, b = batch.tokens[1].tolist(), batch.tokens[0].tolist()
    assert micro.tokens.tolist() == [a + b + [0]]
    assert micro.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    assert micro.targets.tolist() == a[1:] + [0] + b[1:] + [0, 0]
    assert micro.response_rows.tolist() == [1, 4, 5]
    assert micro.draft_targets.tolist() == [a[2], 0, 0, b[2], b[3], 0, 0, 0]
    assert micro.draft_rows.tolist() == [0, 3, 4]
    assert micro.segments.tolist() == [0, 1, 1]
    assert micro.loss_weight.tolist() == [0.5, 0.25, 0.25]
    # Losses are float32 and rows are indices, whatever numpy made of a list.
    assert micro.loss_weight.dtype == micro.loss_mask.dtype == torch.float32 and micro.segments.dtype == torch.int64
    assert micro.layout.cu_seqlens.tolist() == [0, 3, 7, 8]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(1, 5),
    st.booleans(),
)
def test_the_row_that_predicts_each_response_token_has_it_as_target_in_every_layout(shapes, cp_size, multiple, contiguous):
    prompts, responses = zip(*shapes)
    batch = make_batch([p + r for p, r in shapes], responses)
    order = list(range(len(shapes)))[::-1]
    micros = [
        pack(
            batch,
            order,
            loss_weight=np.ones(len(order)),
            contiguous=contiguous,
            cp_rank=rank,
            cp_size=cp_size,
            multiple=multiple,
        )
        for rank in range(cp_size)
    ]
    whole_targets = sum(micro.layout.spread(micro.targets) for micro in micros)
    whole_tokens = sum(micro.layout.spread(micro.tokens[0]) for micro in micros)
    assert torch.equal(whole_tokens, torch.from_numpy(np.concatenate([batch.tokens[p] for p in order])))
    expected = np.concatenate([batch.tokens[p][-batch.response_lengths[p] :] for p in order])
    drafts = sum(micro.layout.spread(micro.draft_targets) for micro in micros)
    samples = np.repeat(np.arange(len(order)), [len(batch.tokens[p]) for p in order])
    for micro in micros:
        guessed = micro.draft_rows >= 0
        assert torch.equal(drafts[micro.draft_rows[guessed]], torch.from_numpy(expected)[guessed])
        # Two tokens on in the same sample; only a sample's second token, after a prompt of one, is guessed by nobody.
        assert np.array_equal(samples[micro.draft_rows[guessed].numpy()], micro.segments[guessed].numpy())
        assert int((~guessed).sum()) == sum(prompts[p] == 1 for p in order)
        assert torch.equal(whole_targets[micro.response_rows], torch.from_numpy(expected))
        assert torch.equal(
            micro.rollout_log_probs, torch.from_numpy(np.concatenate([batch.rollout_log_probs[p] for p in order]))
        )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, 99),
)
def test_kept_words_are_on_the_row_that_predicts_their_token_in_every_layout(shapes, cp_size, multiple, contiguous, seed):
    """Word 1000 * sample + token of each response token that has any, and as many more as its number says."""
    batch, rng = make_batch([p + r for p, r in shapes], [r for _, r in shapes]), np.random.default_rng(seed)
    column, expected = [], {}
    for sample, (prompt, response) in enumerate(shapes):
        spans = [1000 * sample + np.arange(token, token + rng.integers(0, 4)) for token in range(response)]
        offsets = np.cumsum([0, *map(len, spans)])
        column.append(KeptWords(np.concatenate(spans).astype(np.int32), offsets.astype(np.int32)))
        expected |= {(sample, prompt - 1 + token): words.tolist() for token, words in enumerate(spans) if len(words)}
    batch, order, found = replace(batch, kept_words=tuple(column)), list(range(len(shapes)))[::-1], {}
    for rank in range(cp_size):
        cut = {"contiguous": contiguous, "cp_rank": rank, "cp_size": cp_size, "multiple": multiple}
        micro = pack(batch, order, loss_weight=np.ones(len(order)), **cut)
        assert (micro.kept_rows.diff() >= 0).all() and set(micro.kept_rows.tolist()) == set(
            micro.kept_limited.nonzero()[:, 0].tolist()
        )
        for row, word in zip(micro.kept_rows.tolist(), micro.kept_words.tolist(), strict=True):
            place = int(micro.layout.rows[row])
            number = int(np.searchsorted(micro.layout.starts, place, side="right")) - 1
            found.setdefault((order[number], place - micro.layout.starts[number]), []).append(word)
    assert found == expected
    empty = pack(batch, [], loss_weight=np.ones(len(order)), multiple=multiple)
    assert not empty.kept_limited.any() and len(empty.kept_words) == 0


def test_an_empty_micro_batch_is_padding_only():
    micro = pack(make_batch([4], [2]), [], loss_weight=np.zeros(1), multiple=8)
    assert (
        micro.tokens.tolist() == [[0] * 8] and micro.response_rows.numel() == 0 and micro.layout.cu_seqlens.tolist() == [0, 8]
    )


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=12),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)
def test_what_is_planned_and_packed_is_the_rollout_however_it_is_cut(shapes, dp_size, cp_size, contiguous, per_token):
    """Every token of every sample is in one row of one rank, and the step's loss is that of the columns it was made of."""
    responses = [response for _, response in shapes]
    batch = make_batch([prompt + response for prompt, response in shapes], responses)
    rules = SimpleNamespace(
        global_batch_size=4, micro_batch_size=1, use_dynamic_batch_size=True, max_tokens_per_gpu=32, balance_data=True,
        balance_by_flops=False,
    )  # fmt: skip
    steps = plan_steps(
        batch.total_lengths, batch.trajectories, batch.mask_sums, dp_size=dp_size, cp_size=cp_size, batch=rules,
        per_token=per_token,
    )  # fmt: skip
    values = {position: np.random.default_rng(position).normal(size=response) for position, response in enumerate(responses)}
    seen = {}
    for step in steps:
        loss, tokens, means = 0.0, 0.0, []
        for positions in (micro for rank in step.micro_batches for micro in rank):
            micros = [
                pack(
                    batch, positions, loss_weight=step.loss_weight, contiguous=contiguous, cp_rank=rank, cp_size=cp_size,
                    columns={"advantages": values},
                )
                for rank in range(cp_size)
            ]  # fmt: skip
            held = torch.cat([micro.layout.rows for micro in micros])
            assert sorted(held[held >= 0].tolist()) == list(range(sum(len(batch.tokens[p]) for p in positions)))
            whole = sum(micro.layout.spread(micro.tokens[0]) for micro in micros)
            for position, start in zip(positions, micros[0].layout.starts, strict=True):
                assert position not in seen
                seen[position] = whole[start : start + len(batch.tokens[position])].tolist()
            loss += float((micros[0].loss_weight * micros[0].loss_mask * micros[0].advantages).double().sum())
        for position in step.positions:
            mask = batch.loss_masks[position]
            tokens += mask.sum()
            means.append((mask * values[position]).sum() / (1 if per_token else max(mask.sum(), 1)))
        assert loss == pytest.approx(sum(means) / (max(tokens, 1) if per_token else len(means)), abs=1e-5)
    assert seen == {position: batch.tokens[position].tolist() for position in range(len(shapes))}
