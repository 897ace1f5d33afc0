"""generate_rollout against a router that answers real HTTP on loopback: what is trained, dropped and put back adds up."""

from __future__ import annotations

import asyncio
import collections
import copy
import json
import re
import time

import numpy as np
import pytest
import torch
from rollout_helpers import sum_in

from slime.rollout.base_types import flatten
from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.rollout.filter_hub.base_types import DynamicFilterOutput
from slime.rollout.sglang_rollout import generate, generate_rollout
from slime.rollout.to_batch import make_rollout_batch
from slime.types.sample import Sample, Status
from slime.types.selections import Piece, Selections

CHECK_STD = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"


@pytest.fixture
def run(rollout_config, runtime_args):
    """(rollout_id, **config values) -> (output, data source)."""

    def one(rollout_id=0, source=None, **values):
        args = runtime_args(rollout_config(**values))
        source = source or RolloutDataSourceWithBuffer(args)
        return generate_rollout(args, rollout_id, source), source

    return one


def right_every_second_time(counter):
    def answer(text, payload):
        counter[text] += 1
        value = sum_in(text) + (counter[text] % 2)
        return f"\\boxed{{{value}}}<|endoftext|>", "stop"

    return answer


def test_training_asks_for_choices_to_replay_once_a_token_and_evaluation_for_none(rollout_config, runtime_args, router):
    """A first turn from the beginning, a second from the tokens that the first one's answer told of."""
    flags = {"use_rollout_routing_replay": True, "use_rollout_indexer_replay": True}
    args = runtime_args(rollout_config(**flags))

    async def turns() -> None:
        sample = Sample(prompt="1 plus 1", index=0)
        await generate(args, sample, {"max_new_tokens": 8})
        sample.rollout_routed_experts = np.zeros((len(sample.tokens) - 1, 1, 1), np.uint8)
        rows = np.zeros((len(sample.tokens) - 1, 1), np.int32)
        sample.rollout_indexer_topk = Selections((Piece.of({0: rows}, 0, 1),))
        sample.append_response_tokens(tokens=sample.tokens[:3], trainable=False)
        sample.status, known = Status.PENDING, len(sample.rollout_routed_experts)
        await generate(args, sample, {"max_new_tokens": 20})
        await generate(args, Sample(prompt="1 plus 1", index=1), {"max_new_tokens": 8}, evaluation=True)
        questions = [payload.get("custom_labels") for payload, _ in router.requests]
        asked = [json.loads(next(iter(labels.values()))) for labels in questions[:2]]
        assert [question["routed_experts_start_len"] for question in asked] == [0, known] and questions[2] is None
        assert all(question["return_routed_experts"] and question["return_indexer_topk"] for question in asked)

    asyncio.run(turns())


def test_samples_carry_what_the_engine_said(run, router):
    output, _ = run()
    assert [len(group) for group in output.samples] == [2, 2, 2, 2]
    sample = output.samples[0][0]
    assert sample.response == "\\boxed{0}<|endoftext|>" and sample.label == "0" and sample.reward == 1
    assert sample.status is Status.COMPLETED and sample.weight_versions == ["3"]
    prompt = router.tokenizer.encode(sample.prompt, add_special_tokens=False)
    assert sample.tokens[: len(prompt)] == prompt and sample.response_length == 4
    assert sample.rollout_log_probs == [-0.5, -0.625, -0.75, -0.875]
    payload, headers = router.requests[0]
    assert payload["return_logprob"] is True and payload["sampling_params"]["max_new_tokens"] == 8
    assert headers["Authorization"] == "Bearer t0ken"
    assert len({headers["X-SMG-Routing-Key"] for _, headers in router.requests}) == len(router.requests) == 8


def test_order_does_not_depend_on_who_finishes_first(run, router):
    def slow_first(text, payload):
        time.sleep(0.3 if sum_in(text) == 0 else 0.0)
        return f"\\boxed{{{sum_in(text)}}}<|endoftext|>", "stop"

    router.answer = slow_first
    output, _ = run()
    assert [group[0].group_index for group in output.samples] == [0, 1, 2, 3]
    assert [sample.index for group in output.samples for sample in group] == list(range(8))


def test_a_filter_drops_groups_by_reason_and_more_prompts_are_taken(run, router):
    counter = collections.Counter()
    alternate = right_every_second_time(counter)
    router.answer = lambda text, payload: (
        alternate(text, payload) if sum_in(text) % 2 else (f"\\boxed{{{sum_in(text)}}}<|endoftext|>", "stop")
    )
    output, source = run(dynamic_sampling_filter_path=CHECK_STD)
    assert len(output.samples) == 4
    assert all({sample.reward for sample in group} == {0, 1} for group in output.samples)
    metrics = output.metrics
    dropped = sum(value for name, value in metrics.items() if name.startswith("rollout/dynamic_filter/drop_"))
    assert metrics["rollout/dynamic_filter/drop_zero_std_1.0"] >= 1
    assert metrics["rollout/groups_submitted"] == 4 + dropped == source.sample_group_index


def drop_all_unless_needed(args, group):
    return DynamicFilterOutput(keep=False, reason="dull", keep_when_insufficient=True)


def test_a_filter_may_keep_what_would_otherwise_be_missing(run):
    output, source = run(dynamic_sampling_filter_path=f"{__name__}.drop_all_unless_needed", over_sampling_batch_size=6)
    assert len(output.samples) == 4 and source.sample_group_index == 6
    assert output.metrics["rollout/dynamic_filter/drop_dull"] == 2


def conserved(output, source):
    metrics = output.metrics
    dropped = sum(value for name, value in metrics.items() if "/drop_" in name)
    return metrics["rollout/groups_submitted"] == len(output.samples) + dropped + len(source.buffer)


@pytest.mark.parametrize("partial", [False, True])
def test_oversampled_groups_are_aborted_and_accounted_for(run, router, partial):
    def hang_on_large_sums(text, payload):
        if sum_in(text) >= 3 and not router.aborted.wait(0.02):
            router.aborted.wait(20)
            return "\\boxed{", "abort"
        return f"\\boxed{{{sum_in(text)}}}<|endoftext|>", "stop"

    router.answer = hang_on_large_sums
    output, source = run(rollout_id=7, over_sampling_batch_size=8, rollout_batch_size=4, partial_rollout=partial)
    assert router.aborted.is_set() and len(output.samples) == 4
    assert conserved(output, source)
    if not partial:
        assert source.buffer == []
        return
    halted = [sample for group in source.buffer for sample in group if sample.status is Status.ABORTED]
    assert halted and all(sample.metadata["start_rollout_id"] == 7 for sample in halted)
    assert all(sample.response in ("", "\\boxed{") for sample in halted)

    # The next rollout continues them: the request carries what is there, and the budget is what is left of 8.
    router.requests.clear()
    router.answer = lambda text, payload: (f"{sum_in(text)}}}<|endoftext|>", "stop")
    begun = next(sample for sample in halted if sample.response_length)
    output, source = run(rollout_id=8, source=source, partial_rollout=True, mask_offpolicy_in_partial_rollout=True)
    continued = next(sample for group in output.samples for sample in group if sample.index == begun.index)
    assert continued.response == f"\\boxed{{{continued.label}}}<|endoftext|>" and continued.reward == 1
    assert continued.loss_mask == [0] + [1] * (continued.response_length - 1)
    sent = [
        payload for payload, _ in router.requests if payload["input_ids"] == continued.tokens[: -continued.response_length + 1]
    ]
    assert sent and {payload["sampling_params"]["max_new_tokens"] for payload in sent} == {7}
    assert continued.weight_versions == ["3", "3"]


def test_groups_that_never_began_are_put_back_untouched(run, router):
    seen = []

    def process(args, all_groups, data_source):
        seen.extend(all_groups)

    globals()["see_all"] = process
    router.answer = lambda text, payload: time.sleep(0.02) or (f"\\boxed{{{sum_in(text)}}}<|endoftext|>", "stop")
    output, source = run(
        over_sampling_batch_size=20,
        partial_rollout=True,
        sglang_server_concurrency=1,
        rollout_all_samples_process_path=f"{__name__}.see_all",
    )
    assert conserved(output, source) and output.metrics["rollout/groups_submitted"] == 20
    untouched = [sample for group in source.buffer for sample in group if not sample.tokens]
    assert len(untouched) >= 20 and all(sample.status is not Status.COMPLETED for sample in untouched)
    assert all(sample.reward == 1 for group in seen for sample in group)
    output, source = run(rollout_id=1, source=source, partial_rollout=True)
    assert [group[0].group_index for group in output.samples] == [4, 5, 6, 7]


def test_one_bad_prompt_is_left_out_counted_and_never_scored(run, router):
    good = router.answer
    router.answer = lambda text, payload: 400 if sum_in(text) == 1 else good(text, payload)
    output, source = run()
    assert len(output.samples) == 4 and conserved(output, source)
    assert output.metrics["rollout/dynamic_filter/drop_failed"] >= 1
    assert all(sample.reward == 1 for group in output.samples for sample in group)


def test_many_failures_end_the_run_with_the_reason(run, router):
    router.answer = lambda text, payload: 400
    with pytest.raises(RuntimeError, match=r"8 of \d+ groups of this rollout failed.*answered 400: made to fail"):
        run()


def test_a_busy_server_is_asked_again(run, router):
    calls = collections.Counter()
    good = router.answer

    def busy_once(text, payload):
        calls[tuple(payload["input_ids"])] += 1
        return 503 if calls[tuple(payload["input_ids"])] == 1 else good(text, payload)

    router.answer = busy_once
    output, _ = run(n_samples_per_prompt=1, rm_type="math")
    assert len(output.samples) == 4 and "rollout/dynamic_filter/drop_failed" not in output.metrics


@pytest.mark.parametrize("status", [408, 429])
def test_a_server_that_says_later_is_asked_again_for_as_long_as_that_takes(run, router, monkeypatch, status):
    from slime.rollout import http

    calls = collections.Counter()
    good = router.answer

    def later_seven_times(text, payload):
        calls[tuple(payload["input_ids"])] += 1
        return status if calls[tuple(payload["input_ids"])] <= 7 else good(text, payload)

    router.answer = later_seven_times
    monkeypatch.setattr(http, "FIRST_PAUSE_SECONDS", 0.001)
    output, _ = run(n_samples_per_prompt=1, rm_type="math")
    assert len(output.samples) == 4 and set(calls.values()) == {8}
    assert "rollout/dynamic_filter/drop_failed" not in output.metrics


def keep_nothing(args, group):
    return DynamicFilterOutput(keep=False, reason="dull")


def test_a_filter_that_keeps_nothing_is_told_with_its_reasons_and_ends_the_run(run, caplog):
    caplog.set_level("INFO")
    end = r"rollout 3: 0 of 4 groups are kept so far, and none of the last 6\d was; dropped: dull: 6\d"
    with pytest.raises(RuntimeError, match=end):
        run(rollout_id=2, dynamic_sampling_filter_path=f"{__name__}.keep_nothing", max_drops_in_a_row=64)
    line = r"rollout 3: 0 of 4 groups are kept so far, (\d+) were dropped \(dull: \1\)"
    counts = [int(told[1]) for record in caplog.records if (told := re.fullmatch(line, record.getMessage()))]
    assert len(counts) >= 3 and 8 <= counts[0] < 12, counts
    assert all(later >= 2 * earlier for earlier, later in zip(counts, counts[1:], strict=False)), counts


_JUDGE = collections.Counter()


async def slow_on_large_sums(args, sample, **kwargs):
    import asyncio

    if sum_in(sample.prompt) < 4:
        return 1.0
    _JUDGE["started"] += 1
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        _JUDGE["cancelled"] += 1
        raise


async def slow_on_large_sums_in_a_group(args, samples, **kwargs):
    return [await slow_on_large_sums(args, samples[0])] * len(samples)


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("group_rm", [False, True])
def test_a_judge_of_surplus_groups_is_not_waited_for(run, router, partial, group_rm):
    _JUDGE.clear()
    judge = slow_on_large_sums_in_a_group if group_rm else slow_on_large_sums
    how = {"custom_rm_path": f"{__name__}.{judge.__name__}", "group_rm": group_rm, "partial_rollout": partial}
    output, source = run(over_sampling_batch_size=5, **how)  # 0+0 ... 0+4
    assert [group[0].label for group in output.samples] == ["0", "1", "2", "3"] and conserved(output, source)
    # Graders have a loop of their own, which hears of it a moment later; one that had not begun never does.
    deadline = time.monotonic() + 30
    while _JUDGE["cancelled"] < _JUDGE["started"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _JUDGE["cancelled"] == _JUDGE["started"] <= (1 if group_rm else 2)
    if not partial:
        assert output.metrics["rollout/dynamic_filter/drop_surplus"] == 1 and source.buffer == []
        return
    (kept,) = source.buffer
    assert [(sample.status, sample.reward, sample.response_length) for sample in kept] == [(Status.COMPLETED, None, 4)] * 2
    # It is graded when its turn comes, and not generated again.
    router.requests.clear()
    output, _ = run(rollout_id=1, source=source, partial_rollout=True, rm_type="math")
    assert output.samples[0][0] is kept[0] and kept[0].reward == 1 and len(router.requests) == 6


def test_a_missing_grader_is_an_error_not_a_zero(run):
    with pytest.raises(RuntimeError, match="pass --rm-type NAME or --custom-rm-path PATH"):
        run(rm_type=None)
    with pytest.raises(RuntimeError, match="'maths' is no grader; did you mean math?"):
        run(rm_type="maths")


async def two_turns(args, sample, sampling_params, evaluation=False):
    sampling_params["max_new_tokens"] = 5
    await generate(args, sample, sampling_params)
    sample.append_response_tokens(tokens=[1, 2], trainable=False)
    sample.metadata["evaluation"] = evaluation
    return sample


async def fan_out(args, sample, sampling_params):
    other = copy.deepcopy(sample)
    for item in (sample, other):
        item.rollout_id = sample.index
        await generate(args, item, dict(sampling_params))
    return [sample, other]


def note_label(args, sample, *, rollout_id):
    sample.metadata["hook"] = (sample.label, rollout_id)
    sample.status = sample.status.value  # its name, as a plugin may say it


async def another_one(args, sample):
    made = copy.deepcopy(sample)
    made.metadata["made"] = True
    return made


def a_number(args, sample):
    return 3


def test_a_hook_may_give_another_sample_back_and_nothing_else(run):
    output, _ = run(
        rollout_id=5, custom_generate_function_path=f"{__name__}.fan_out",
        rollout_sample_hook_path=(f"{__name__}.note_label", f"{__name__}.another_one"),
    )  # fmt: skip
    samples = [sample for group in output.samples for sample in flatten(group)]
    assert len(samples) == 16 and all(sample.metadata["made"] and sample.reward == 1 for sample in samples)
    assert samples[0].metadata["hook"] == (samples[0].label, 5)
    with pytest.raises(RuntimeError, match="a_number returned a int; expected a Sample or None"):
        run(rollout_sample_hook_path=(f"{__name__}.a_number",))


async def whole_group(args, samples, **kwargs):
    return [float(len(samples)) for _ in samples]


async def place(args, samples, **kwargs):
    return np.arange(len(samples), dtype=np.float64)


def test_custom_generate_hooks_and_group_reward_take_part(run, router):
    output, _ = run(
        rollout_id=5,
        custom_generate_function_path=f"{__name__}.two_turns",
        rollout_sample_hook_path=(f"{__name__}.note_label",),
        custom_rm_path=f"{__name__}.whole_group",
        group_rm=True,
    )
    sample = output.samples[1][1]
    assert sample.loss_mask == [1, 1, 1, 1, 0, 0] and sample.metadata["hook"] == (sample.label, 5)
    assert sample.reward == 2.0 and sample.metadata["evaluation"] is False
    assert {payload["sampling_params"]["max_new_tokens"] for payload, _ in router.requests} == {5}


asked: list = []


async def as_told(args, samples, **kwargs):
    """Notes what it was given; answers with an array, with rewards of NumPy's and torch's."""
    asked.append(samples)
    if isinstance(samples, list):
        return np.array([len(s.response) % 2 for s in samples], dtype=np.bool_)
    return torch.tensor(float(len(samples.response)))


async def grades_all_but_the_last(args, sample, sampling_params):
    await generate(args, sample, sampling_params)
    if sample.index % args.n_samples_per_prompt < args.n_samples_per_prompt - 1:
        sample.reward = np.float32(0.5)
    return sample


async def alone_in_a_list(args, sample, sampling_params):
    return [await generate(args, sample, sampling_params)]


@pytest.mark.parametrize(
    "values, sizes",
    [
        ({"group_rm": True, "n_samples_per_prompt": 1}, {1}),
        ({"group_rm": True}, {2}),
        ({"group_rm": True, "custom_generate_function_path": f"{__name__}.grades_all_but_the_last"}, {1}),
        ({"custom_generate_function_path": f"{__name__}.alone_in_a_list"}, {1}),
        ({}, {None}),
    ],
)
def test_a_group_grader_always_gets_a_list_and_may_answer_with_an_array(run, values, sizes):
    asked.clear()
    output, _ = run(custom_rm_path=f"{__name__}.as_told", **values)
    assert {len(given) if isinstance(given, list) else None for given in asked} == sizes
    samples = [sample for group in output.samples for sample in flatten(group)]
    assert len(output.samples) == 4 and {type(sample.reward) for sample in samples} <= {float, bool}


async def gives_up(args, sample, sampling_params):
    """Of each pair the second: aborted with a reward, or without a response, as metadata of the run says."""
    if sample.index % 2 == 0:
        return await generate(args, sample, sampling_params)
    sample.remove_sample = True
    kind = args.kind
    sample.status = Status.ABORTED if "aborted" in kind else Status.COMPLETED
    sample.reward = None if "ungraded" in kind else np.float32(0)
    if "some" in kind:
        sample.tokens, sample.response_length, sample.loss_mask = [0, 0], 1, [0]
    if "masked" in kind:
        sample.remove_sample = False
    return sample


@pytest.mark.parametrize("group_rm", [False, True])
@pytest.mark.parametrize(
    "kind", ["aborted some", "aborted some masked", "aborted empty", "empty", "empty ungraded", "aborted empty ungraded"]
)
def test_a_sample_that_its_plugin_gave_up_stays_in_its_group_masked(run, rollout_config, kind, group_rm):
    values = dict(custom_generate_function_path=f"{__name__}.gives_up", custom={"kind": kind}, group_rm=group_rm)
    output, _ = run(custom_rm_path=f"{__name__}.ones", **values)
    assert output.metrics["rollout/groups_submitted"] == 4 and len(output.samples) == 4
    batch = make_rollout_batch(output.samples, rollout_id=0, config=rollout_config(**values))
    assert batch.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [bool(mask.any()) for mask in batch.loss_masks] == [True, False] * 4
    assert batch.raw_rewards.tolist() == [1, 1 if "ungraded" in kind else 0] * 4


async def ones(args, samples, **kwargs):
    return [1.0] * len(samples) if isinstance(samples, list) else 1.0


async def nothing(args, sample, sampling_params):
    return []


async def of_its_own_making(args, sample, sampling_params):
    made = Sample(prompt=sample.prompt, tokens=[1, 2], response_length=1, reward=1.0, status="completed")
    return made if sample.index % 2 else [made]


def test_what_a_generate_function_returns_belongs_to_its_prompt(run):
    with pytest.raises(RuntimeError, match="returned an empty list; expected a Sample or a list of Samples"):
        run(custom_generate_function_path=f"{__name__}.nothing")
    output, _ = run(custom_generate_function_path=f"{__name__}.of_its_own_making")
    samples = [sample for group in output.samples for sample in flatten(group)]
    assert [(s.group_index, s.index) for s in samples] == [(i // 2, i) for i in range(8)]
    assert {sample.status for sample in samples} == {Status.COMPLETED}


async def infinite(args, sample, sampling_params):
    await generate(args, sample, sampling_params)
    sample.reward = np.float32("inf")
    return sample


def test_a_reward_that_is_not_finite_fails_its_sample_not_the_run(run):
    with pytest.raises(RuntimeError, match="groups of this rollout failed.*the reward of sample .* is inf; expected a finite"):
        run(custom_generate_function_path=f"{__name__}.infinite")


def test_fan_out_groups_hold_all_siblings(run):
    output, _ = run(custom_generate_function_path=f"{__name__}.fan_out")
    assert [[len(item) for item in group] for group in output.samples] == [[2, 2]] * 4
    assert all(sample.reward == 1 for group in output.samples for item in group for sample in item)


def test_siblings_of_a_fan_out_are_graded_with_their_whole_group(run):
    """--group-rm: one list of two samples with two siblings each, in order; what comes back is nested as it was."""
    output, _ = run(custom_generate_function_path=f"{__name__}.fan_out", custom_rm_path=f"{__name__}.place", group_rm=True)
    assert [[len(item) for item in group] for group in output.samples] == [[2, 2]] * 4
    rewards = [[[sample.reward for sample in item] for item in group] for group in output.samples]
    assert rewards == [[[0.0, 1.0], [2.0, 3.0]]] * 4
    trajectories = [[{sample.rollout_id for sample in item} for item in group] for group in output.samples]
    assert all(len(first) == len(second) == 1 and first != second for first, second in trajectories)


def test_a_response_without_room_is_refused_by_name(run):
    with pytest.raises(RuntimeError, match="a context of 5 leaves no room"):
        run(rollout_max_context_len=5)
    with pytest.raises(ValueError, match="--rollout-max-response-len"):
        run(rollout_max_response_len=None)


def test_evaluation_takes_every_prompt_of_every_data_set(rollout_config, runtime_args, router, prompt_file):
    from slime.config import EvalDataset
    from slime.rollout.metrics import evaluation_metrics

    def common(name, **values):
        return EvalDataset(
            name=name, input_key="prompt", label_key="label", apply_chat_template=True, max_response_len=6, **values
        )

    router.answer = lambda text, payload: (
        f"\\boxed{{{sum_in(text) if sum_in(text) < 2 else 99}}}<|endoftext|>",
        "length" if sum_in(text) == 0 else "stop",
    )
    datasets = (
        common("first", path=prompt_file + "@[:4]", n_samples_per_eval_prompt=2, temperature=0.5),
        common("second", path=prompt_file + "@[:1]", rm_type="random", metadata_overrides={"source": "x"}),
    )
    args = runtime_args(rollout_config(datasets=datasets, dynamic_sampling_filter_path=CHECK_STD))
    output = generate_rollout(args, 0, None, evaluation=True)
    # The first four prompts are 0+0, 0+1, 0+2, 0+3: half of them are answered rightly.
    assert output.data["first"]["rewards"] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert output.data["first"]["truncated"] == [True, True] + [False] * 6
    assert output.data["second"]["samples"][0].metadata["source"] == "x"
    metrics = evaluation_metrics(output.data)
    assert metrics["eval/first"] == 0.5 and metrics["eval/first-pass@2"] == 0.5
    assert metrics["eval/first-truncated_ratio"] == 0.25
    temperatures = sorted(payload["sampling_params"]["temperature"] for payload, _ in router.requests)
    assert temperatures == [0.5] * 8 + [1.0]


def test_an_evaluation_counts_what_was_refused_and_ends_only_where_most_was(rollout_config, runtime_args, router, prompt_file):
    from slime.config import EvalDataset
    from slime.rollout.metrics import evaluation_metrics

    common = {"input_key": "prompt", "label_key": "label", "apply_chat_template": True, "max_response_len": 6}
    datasets = (EvalDataset(name="sums", path=prompt_file + "@[:5]", **common),)  # 0+0 ... 0+4
    args = runtime_args(rollout_config(datasets=datasets))
    good = router.answer
    router.answer = lambda text, payload: 400 if sum_in(text) < 2 else good(text, payload)
    output = generate_rollout(args, 0, None, evaluation=True)
    metrics = evaluation_metrics(output.data)
    assert output.data["sums"]["rewards"] == [1, 1, 1] and metrics["eval/sums/num_failed"] == 2.0
    router.answer = lambda text, payload: 400 if sum_in(text) < 3 else good(text, payload)
    with pytest.raises(RuntimeError, match="evaluation sums: 3 of 5 samples failed. One error: .*answered 400: made to fail"):
        generate_rollout(args, 0, None, evaluation=True)
