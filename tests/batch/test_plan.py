"""The planner's promises, on random rollouts and by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.batch.plan import _even_bins_with_room, _first_fit, plan_steps


@dataclass(frozen=True)
class Rules:
    global_batch_size: int = 4
    micro_batch_size: int = 1
    use_dynamic_batch_size: bool = True
    max_tokens_per_gpu: int | None = 32
    balance_data: bool = False
    balance_by_flops: bool = False


@st.composite
def rollouts(draw):
    n = draw(st.integers(1, 40))
    lengths = draw(st.lists(st.integers(2, 70), min_size=n, max_size=n))
    trajectories = draw(st.lists(st.integers(0, n), min_size=n, max_size=n))
    mask_sums = [draw(st.integers(0, length - 1)) for length in lengths]
    dynamic = draw(st.booleans())
    rules = Rules(
        global_batch_size=draw(st.integers(1, 12)),
        micro_batch_size=draw(st.integers(1, 4)),
        use_dynamic_batch_size=dynamic,
        balance_data=draw(st.booleans()),
        balance_by_flops=dynamic and draw(st.booleans()),
    )
    sizes = dict(dp_size=draw(st.integers(1, 5)), cp_size=draw(st.integers(1, 3)), vpp_group=draw(st.integers(1, 3)))
    return lengths, trajectories, mask_sums, rules, sizes


@settings(max_examples=300, deadline=None)
@given(rollouts(), st.booleans())
def test_nothing_is_lost_nothing_is_twice_and_every_rank_keeps_step(rollout, per_token):
    lengths, trajectories, mask_sums, rules, sizes = rollout
    plans = plan_steps(lengths, trajectories, mask_sums, batch=rules, per_token=per_token, **sizes)
    placed = [position for plan in plans for position in plan.positions]
    assert sorted(placed) == list(range(len(lengths)))
    for plan in plans:
        assert len(plan.micro_batches) == sizes["dp_size"]
        assert plan.num_micro_batches % sizes["vpp_group"] == 0
        inside = {trajectories[p] for p in plan.positions}
        assert len(inside) == plan.num_trajectories
        tokens = sum(mask_sums[p] for p in plan.positions)
        assert plan.denominator == (max(tokens, 1) if per_token else len(inside))
        assert not inside & {trajectories[p] for other in plans if other is not plan for p in other.positions}
        assert set(np.flatnonzero(plan.loss_weight)) == set(plan.positions), "weights are positive in the step, zero outside"
    counts = [plan.num_trajectories for plan in plans]
    assert max(counts) - min(counts) <= 1
    assert len(plans) == max(1, sum(counts) // rules.global_batch_size)


@settings(max_examples=200, deadline=None)
@given(rollouts())
def test_loss_weights_give_the_mean_over_trajectories_of_token_means(rollout):
    lengths, trajectories, mask_sums, rules, sizes = rollout
    token_loss = np.arange(1, len(lengths) + 1) * 0.25  # the same loss on every token of a sample
    for plan in plan_steps(lengths, trajectories, mask_sums, batch=rules, per_token=False, **sizes):
        means = []
        for trajectory in {trajectories[p] for p in plan.positions}:
            mine = [p for p in range(len(lengths)) if trajectories[p] == trajectory]
            means.append(sum(mask_sums[p] * token_loss[p] for p in mine) / max(sum(mask_sums[p] for p in mine), 1))
        assert np.dot(plan.loss_weight, np.array(mask_sums) * token_loss) == pytest.approx(np.mean(means))


@settings(max_examples=100, deadline=None)
@given(rollouts())
def test_per_token_weights_give_the_mean_over_the_steps_tokens(rollout):
    lengths, trajectories, mask_sums, rules, sizes = rollout
    for plan in plan_steps(lengths, trajectories, mask_sums, batch=rules, per_token=True, **sizes):
        total = sum(mask_sums[p] for p in plan.positions)
        assert np.dot(plan.loss_weight, mask_sums) == pytest.approx(1.0 if total else 0.0)


@settings(max_examples=200, deadline=None)
@given(rollouts())
def test_a_packed_micro_batch_exceeds_the_capacity_only_when_one_sample_does(rollout):
    lengths, trajectories, mask_sums, rules, sizes = rollout
    if not rules.use_dynamic_batch_size:
        return
    for plan in plan_steps(lengths, trajectories, mask_sums, batch=rules, per_token=False, **sizes):
        for micro in (m for rank in plan.micro_batches for m in rank):
            assert len(micro) <= 1 or sum(lengths[p] for p in micro) <= rules.max_tokens_per_gpu * sizes["cp_size"]


@settings(max_examples=300, deadline=None)
@given(rollouts())
def test_balancing_leaves_no_rank_busier_than_dealing_in_turn_nor_a_micro_batch_above_the_mean(rollout):
    lengths, trajectories, mask_sums, rules, sizes = rollout
    given_ = dict(per_token=False, **sizes)
    plain = plan_steps(lengths, trajectories, mask_sums, batch=replace(rules, balance_data=False), **given_)
    planned = plan_steps(lengths, trajectories, mask_sums, batch=replace(rules, balance_data=True), **given_)
    for before, after in zip(plain, planned, strict=True):
        work = lambda micro: sum(lengths[p] for p in micro)  # noqa: E731
        loads, unplanned = ([sum(map(work, rank)) for rank in plan.micro_batches] for plan in (after, before))
        micros = sorted(micro for rank in before.micro_batches for micro in rank)
        assert micros == sorted(micro for rank in after.micro_batches for micro in rank)
        assert max(loads) <= max(unplanned)
        assert max(loads) <= sum(loads) / len(loads) + max(map(work, micros))


def test_balancing_keeps_the_order_where_dealing_the_heaviest_first_is_worse():
    """Heaviest first gives 3 + 2 + 2 = 7; in turn it is 2 + 2 + 2 and 3 + 3."""
    rules = Rules(global_batch_size=5, use_dynamic_batch_size=False, balance_data=True)
    lengths = [2, 3, 2, 3, 2]
    plan_of = lambda rules: plan_steps(lengths, range(5), [1] * 5, dp_size=2, cp_size=1, batch=rules, per_token=False)[0]  # noqa: E731
    assert [sum(lengths[p] for micro in rank for p in micro) for rank in plan_of(rules).micro_batches] == [6, 6]


@settings(max_examples=200, deadline=None)
@given(rollouts())
def test_bins_by_work_are_within_one_sample_of_the_mean_and_packing_by_tokens_wastes_less_than_half(rollout):
    lengths, trajectories, mask_sums, rules, sizes = rollout
    alone = dict(dp_size=1, cp_size=sizes["cp_size"], vpp_group=1, per_token=False)
    rules = replace(rules, use_dynamic_batch_size=True, balance_data=False)
    costs = [length * length for length in lengths]
    capacity = rules.max_tokens_per_gpu * sizes["cp_size"]
    by_work = plan_steps(lengths, trajectories, mask_sums, batch=replace(rules, balance_by_flops=True), costs=costs, **alone)
    for plan in by_work:
        (micros,), total = plan.micro_batches, sum(costs[p] for p in plan.positions)
        assert max(sum(costs[p] for p in micro) for micro in micros) <= total / len(micros) + max(
            costs[p] for p in plan.positions
        )
    for plan in plan_steps(lengths, trajectories, mask_sums, batch=replace(rules, balance_by_flops=False), **alone):
        (micros,) = plan.micro_batches
        # Two micro-batches that are half empty would have been one.
        assert len(micros) < 2 * sum(lengths[p] for p in plan.positions) / capacity + 1


def test_bins_by_work_are_as_many_as_their_tokens_need():
    """60 tokens would go into two bins of 32, but no two of these samples together."""
    rules = Rules(global_batch_size=3, max_tokens_per_gpu=32, balance_by_flops=True)
    (plan,) = plan_steps([20, 20, 20], range(3), [1] * 3, dp_size=1, cp_size=1, batch=rules, per_token=False)
    assert plan.micro_batches == (((0,), (1,), (2,)),)


def test_first_fit_by_hand():
    rules = Rules(global_batch_size=5, max_tokens_per_gpu=10)
    (plan,) = plan_steps([6, 5, 4, 12, 5], range(5), [1] * 5, dp_size=1, cp_size=1, batch=rules, per_token=False)
    assert plan.micro_batches == (((0, 2), (1, 4), (3,)),)


def test_balancing_puts_the_heavy_micro_batches_on_different_ranks():
    rules = Rules(global_batch_size=4, use_dynamic_batch_size=False, balance_data=True)
    lengths = [100, 10, 100, 10]
    (plan,) = plan_steps(lengths, range(4), [1] * 4, dp_size=2, cp_size=1, batch=rules, per_token=False)
    assert [sum(lengths[p] for micro in rank for p in micro) for rank in plan.micro_batches] == [110, 110]
    (plain,) = plan_steps(
        lengths, range(4), [1] * 4, dp_size=2, cp_size=1, batch=Rules(use_dynamic_batch_size=False), per_token=False
    )
    assert [sum(lengths[p] for micro in rank for p in micro) for rank in plain.micro_batches] == [200, 20]


def test_fewer_samples_than_ranks_leaves_empty_micro_batches_instead_of_a_hang():
    (plan,) = plan_steps([5], [0], [3], dp_size=3, cp_size=1, batch=Rules(), per_token=False)
    assert plan.micro_batches == (((0,),), ((),), ((),))


def test_dynamic_batches_need_a_capacity():
    with pytest.raises(ValueError, match="--max-tokens-per-gpu"):
        plan_steps([5], [0], [3], dp_size=1, cp_size=1, batch=Rules(max_tokens_per_gpu=None), per_token=False)


def test_micro_batches_that_are_exactly_full_stay_so():
    """5 + 3 and 4 + 4 tokens in room for 8: two bins, not three."""
    lengths = np.array([5, 4, 4, 3])
    assert sorted(map(sorted, _even_bins_with_room([0, 1, 2, 3], lengths, lengths.astype(float), 8))) == [[0, 3], [1, 2]]


def first_fit_by_the_definition(positions: list[int], lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """A search through all micro-batches for every sample."""
    bins: list[list[int]] = []
    for position in positions:
        need = int(lengths[position])
        rooms = [capacity - int(lengths[bin_].sum()) for bin_ in bins]
        target = next((index for index, room in enumerate(rooms) if room >= need), None)
        if target is None:
            bins.append([position])
        else:
            bins[target].append(position)
    return bins


def test_the_first_micro_batch_with_room_is_found_among_any_number():
    draw = np.random.default_rng(0)
    for _ in range(200):
        count, capacity = int(draw.integers(1, 60)), int(draw.integers(1, 200))
        lengths, positions = draw.integers(1, 120, count), draw.permutation(count).tolist()
        assert _first_fit(positions, lengths, capacity) == first_fit_by_the_definition(positions, lengths, capacity)
