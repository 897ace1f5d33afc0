"""Generation that goes on all the time, against a router that answers real HTTP: what is handed over, continued, resumed."""

from __future__ import annotations

import threading
import time

import pytest
from rollout_helpers import sum_in

from slime.rollout.base_types import flatten
from slime.rollout.data_source import RolloutDataSource, RolloutDataSourceWithBuffer, return_to
from slime.rollout.fully_async_rollout import Stream, generate_rollout_fully_async


@pytest.fixture
def stream_of(rollout_config, runtime_args):
    """(stream, hand over a rollout with weights of that version); 4 prompts of 2 samples in a rollout."""

    def make(source_class=RolloutDataSourceWithBuffer, **values):
        args = runtime_args(rollout_config(**{"max_weight_staleness": 1} | values))
        stream = Stream(source_class(args))

        def hand_over(rollout_id: int, version: int):
            return generate_rollout_fully_async(args.with_runtime(weight_version=version), rollout_id, stream)

        return stream, hand_over

    return make


def indices(output) -> list[int]:
    return [flatten(group)[0].group_index for group in output.samples]


def answering(router, version: list[int]):
    """By the weights of `version[0]`."""
    router.answer = lambda text, payload: (
        f"\\boxed{{{sum_in(text)}}}<|endoftext|>",
        "stop",
        {"weight_version": str(version[0])},
    )


def begun(position: dict) -> list[int]:
    """Prompts of a position that were taken and not trained."""
    return sorted(group[0]["group_index"] for group in position["begun"]["groups"])


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_next_rollout_is_generated_while_nobody_asks(stream_of, router):
    answering(router, [1])
    stream, hand_over = stream_of()
    first = hand_over(0, 1)
    wait_for(lambda: len(stream._stock.ready) == 4)
    router.answer = lambda text, payload: 400
    second = hand_over(1, 1)
    assert sorted(indices(first) + indices(second)) == list(range(8)), "they were there"
    assert indices(second) == sorted(indices(second))
    assert second.metrics["rollout/groups_ready"] == 0 and second.metrics["perf/rollout_time"] > 0


def test_the_weights_of_every_token_are_known_where_an_answer_was_interrupted_and_where_they_changed_in_it(stream_of, router):
    def answer(text, payload):
        if sum_in(text) == 0 and not text.endswith("\\boxed{"):
            return "\\boxed{", "abort", {"weight_version": "1"}
        if sum_in(text) == 0:
            return "0}<|endoftext|>", "stop", {"weight_version": "2"}
        spans = [{"version": "1", "start": 0, "end": 1}, {"version": "2", "start": 1, "end": 4}]
        return f"\\boxed{{{sum_in(text)}}}<|endoftext|>", "stop", {"weight_version": "2", "weight_versions": spans}

    router.answer = answer
    _, hand_over = stream_of(rollout_batch_size=2)
    outputs = [hand_over(0, 2), hand_over(1, 2)]
    groups = sorted((group for output in outputs for group in output.samples), key=lambda group: group[0].group_index)
    (first, *_), (second, *_), *_ = groups
    assert first.response == "\\boxed{0}<|endoftext|>" and first.weight_versions == ["1", "2"]
    numbers = len(router.tokenizer.encode("\\boxed{", add_special_tokens=False))
    assert first.token_weight_versions == ["1"] * numbers + ["2"] * (first.response_length - numbers)
    assert second.token_weight_versions == ["1", "2", "2", "2"] and second.weight_versions == ["1", "2"]
    assert second.weight_version_spans == [["1", 1], ["2", 3]]
    assert outputs[1].metrics["rollout/groups_interrupted"] == 1


def test_only_what_the_newest_weights_wrote_is_trained_where_a_flag_says_so(stream_of, router):
    spans = [{"version": "1", "start": 0, "end": 3}, {"version": "2", "start": 3, "end": 4}]
    router.answer = lambda text, payload: (
        f"\\boxed{{{sum_in(text)}}}<|endoftext|>", "stop", {"weight_version": "2", "weight_versions": spans}
    )  # fmt: skip
    _, hand_over = stream_of(mask_offpolicy_in_partial_rollout=True)
    assert {tuple(sample.loss_mask) for group in hand_over(0, 2).samples for sample in group} == {(0, 0, 0, 1)}


@pytest.mark.parametrize("policy", ["regenerate", "drop"])
def test_what_waited_longer_than_the_bound_is_generated_again_or_dropped(stream_of, router, policy):
    version = [1]
    answering(router, version)
    stream, hand_over = stream_of(max_weight_staleness=1, on_stale_group=policy)
    first = hand_over(0, 1)
    wait_for(lambda: len(stream._stock.ready) == 4)
    version[0] = 3
    output = hand_over(1, 3)
    assert {sample.weight_versions[0] for group in output.samples for sample in group} == {"3"}
    trained = sorted(indices(first) + indices(output))
    counts = [output.metrics[f"rollout/groups_{name}"] for name in ("regenerated", "stale_dropped")]
    if policy == "regenerate":
        assert counts == [4, 0] and len(set(trained)) == 8
        assert set(range(8)) <= {*trained, *begun(stream.position(1))}, "no prompt is lost"
    else:
        assert counts == [0, 4] and min(indices(output)) == 8, "four prompts are lost, and counted"


@pytest.mark.parametrize("policy", ["regenerate", "drop"])
def test_answers_that_stay_too_old_end_the_run(stream_of, router, policy):
    answering(router, [1])
    _, hand_over = stream_of(max_weight_staleness=1, max_drops_in_a_row=20, on_stale_group=policy)
    with pytest.raises(RuntimeError, match=r"older than --max-weight-staleness 1, and so were those in their place; look at"):
        hand_over(0, 5)


@pytest.mark.parametrize("source_class", [RolloutDataSourceWithBuffer, RolloutDataSource])
def test_a_killed_run_goes_on_with_all_that_was_begun_and_trains_nothing_twice(stream_of, router, source_class):
    held = threading.Event()

    def answer(text, payload):
        if sum_in(text) == 2:
            held.wait(20)
        return f"\\boxed{{{sum_in(text)}}}<|endoftext|>", "stop", {"weight_version": "7"}

    router.answer = answer
    stream, hand_over = stream_of(source_class, max_weight_staleness=None)
    first = hand_over(0, 7)
    wait_for(lambda: stream._stock.ready)
    state = stream.position(0)
    held.set()
    later, hand_over = stream_of(source_class, max_weight_staleness=None)
    later.go_back(state)
    second = [hand_over(rollout_id, 1) for rollout_id in (1, 2)]
    trained = [*indices(first), *(index for output in second for index in indices(output))]
    left = begun(later.position(2))
    assert sorted(trained + left) == list(range(len(trained) + len(left))), "each once, trained or still to be"
    assert len(set(trained)) == 12 and set(range(12)) <= {*trained, *left}
    old = [sample for output in second for group in output.samples for sample in group if sample.weight_versions == ["0"]]
    assert old, "what was ready keeps its answers; their weights, the newest of that run, are version 0 of this one"


def test_a_run_in_turn_takes_over_what_was_begun(stream_of, router, rollout_config, runtime_args):
    answering(router, [5])
    stream, hand_over = stream_of()
    first = hand_over(0, 5)
    wait_for(lambda: len(stream._stock.ready) == 4)
    source = RolloutDataSourceWithBuffer(runtime_args(rollout_config()))
    return_to(source, stream.position(0))
    assert sorted([*indices(first), *(group[0].group_index for group in source.buffer)]) == list(range(8))
    assert {sample.weight_versions[0] for group in source.buffer for sample in group} == {"0"}
    assert source.get_samples(5)[4][0].group_index == 8


def test_what_breaks_the_generation_is_raised_where_it_is_waited_for_and_begins_anew_from_a_position(stream_of, router):
    answering(router, [1])
    stream, hand_over = stream_of()
    first = hand_over(0, 1)
    wait_for(lambda: len(stream._stock.ready) == 4)
    state = stream.position(0)
    router.answer = lambda text, payload: 400
    hand_over(1, 1)
    with pytest.raises(RuntimeError, match=r"8 of \d+ groups of this rollout failed"):
        hand_over(2, 2)
    answering(router, [1])
    stream.go_back(state)
    again = [hand_over(1, 1), hand_over(2, 2)]
    assert len({*indices(first), *indices(again[0]), *indices(again[1])}) == 12
