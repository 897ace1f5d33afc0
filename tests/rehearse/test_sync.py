"""What a weight sync of given flags takes: by the plan on shared GPUs, by a broadcast to engines elsewhere."""

from __future__ import annotations

import pytest
from rehearse.recipes import one_node

from slime.rehearse.options import Options
from slime.rehearse.report.sync import sync_lines
from slime.rehearse.report.text import as_json
from slime.rehearse.result import Rehearsal, rehearse

EMBEDDING, LAYERS = 151_936 * 2560, 36
ATTENTION, MLP, NORMS = 2560 * 128 * (2 * 32 + 2 * 8), 3 * 2560 * 9728, 2 * 2560 + 2 * 128
MODEL = 2 * (EMBEDDING + LAYERS * (ATTENTION + MLP + NORMS) + 2560)
"""Bytes of Qwen3-4B in bf16, the output layer being the embedding."""
STEPS = 0.45
"""Seconds that engines take around a sync (`sync_steps_s`)."""


def _rehearsed(*more: str) -> Rehearsal:
    argv = [word for word in one_node("qwen3-4B", "Qwen3-4B", tp="2", ep="1") if word != "--colocate" or not more]
    return rehearse([*argv, *more], Options(engine_version="0.5.23", build_ranks=False))


def test_engines_on_the_trainers_gpus_are_given_what_the_plan_says() -> None:
    """Four engines of two, cut as the trainer is: a GPU has what its engine rank loads, but for some rows of the vocabulary."""
    done = _rehearsed()
    assert done.sync is not None and not done.sync.broadcasts and done.sync.plan is done.sync.carried_out
    found = done.sync.price
    # The trainer's first half of the vocabulary is 76,032 rows of 151,936, for it is padded to 152,064; SGLang's is 75,968.
    rows = 76_032 - 151_936 // 2
    assert found.received == (0, rows * 2560 * 2) and found.network_out == (0, 0)
    # Each round waits for the rank that loads most, so for 64 rows more than half of the vocabulary in none.
    half = MODEL // 2 + LAYERS * NORMS + 2560
    assert found.load_seconds == pytest.approx(half / 50e9, rel=1e-3)
    # The norms aside, half of the model: the bucket has room for all of it.
    assert sum(one.bucket for one in found.rounds) == pytest.approx(MODEL, rel=1e-4)
    phase = next(phase for phase in done.cost.phases if phase.name == "weight sync")
    assert (
        phase.seconds == pytest.approx(found.seconds + STEPS) and as_json(done)["weights"]["stream_digest"] == done.sync.digest
    )


def test_weights_that_are_sent_every_fourth_rollout_cost_a_rollout_a_quarter() -> None:
    ahead = ("--schedule", "one-step-ahead", "--rollout-num-gpus", "8", "--update-weights-interval")
    once, fourth = (_rehearsed(*ahead, rollouts) for rollouts in ("1", "4"))
    every, quarter = (next(phase for phase in done.cost.phases if phase.name == "weight sync") for done in (once, fourth))
    assert quarter.seconds == pytest.approx(every.seconds / 4) and quarter.why.startswith("of one every 4 rollouts: gathered")


def test_an_engine_that_cuts_attention_otherwise_is_given_whole_tensors() -> None:
    """Data-parallel attention: half of what the trainer cuts is made on the GPU itself, the other half it takes in."""
    found = _rehearsed("--sglang-enable-dp-attention", "--sglang-dp-size", "2", "--colocate").sync.price
    half, rows = (MODEL - 2 * (LAYERS * NORMS + 2560)) // 2, 76_032 - 151_936 // 2
    assert found.received == (half - rows * 2560 * 2, half + rows * 2560 * 2)
    assert found.load_seconds == pytest.approx(MODEL / 50e9, rel=1e-6)


def test_engines_on_gpus_of_their_own_get_a_broadcast_which_is_what_the_rehearsal_counts() -> None:
    done = _rehearsed("--rollout-num-gpus", "8")
    assert done.sync is not None and done.sync.broadcasts
    assert {gpu for lane in done.sync.plan.lanes for gpu in lane.gpus} == set(range(8, 16))
    assert {gpu for lane in done.sync.carried_out.lanes for gpu in lane.gpus} == {16}, "one stands for all of them"
    phase = next(phase for phase in done.cost.phases if phase.name == "weight sync")
    assert phase.seconds == pytest.approx(MODEL / 50e9 + STEPS, rel=1e-6) and "gathered on one rank" in phase.why
    assert done.sync.price.wire_seconds < phase.seconds / 3, "the plan would use all eight ports of the node"
    assert "engines elsewhere get a broadcast" in sync_lines(done.sync)[0]
    assert all(row.round is not None and row.makers for row in done.weights.rows) and not done.weights.problems
