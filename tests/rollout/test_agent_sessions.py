"""Turns of an agent: recorded tokens stay as they are, what branches is a sample of its own, limits end a session."""

from __future__ import annotations

import re

import pytest
from agent_helpers import CALCULATOR, glm_call, policy
from rollout_helpers import sum_in

from slime.rollout.agents.loop import Tool, environment_turn, model_turn, run_agent, tool_generate
from slime.rollout.agents.session import SessionEnded, same_message
from slime.rollout.base_types import flatten
from slime.types.sample import Status


def user(text):
    return {"role": "user", "content": text}


def agent(play, **limits):
    """The generate function of an async fn(session)."""

    async def generate(args, sample, sampling_params):
        return await run_agent(args, sample, sampling_params, play, **limits)

    return generate


def add(a: int, b: int) -> str:
    if b == 4:
        raise ValueError("four is not for me")
    return str(a + b)


def write_with_the_calculator(text):
    found = re.search(r"<tool_response>(.*?)</tool_response>", text)
    if found is None:
        a, b = re.search(r"(\d+) plus (\d+)", text).groups()
        # Written otherwise than the template writes it: a rendering of this turn would be other tokens.
        return f" {glm_call('add', b=b, a=a)}\n<|observation|>", "stop"
    return f"\\boxed{{{found[1]}}}<|user|>", "stop"


def test_a_tool_answers_between_two_turns_and_only_the_policys_tokens_are_trained(agent_rollout, router):
    router.answer = policy(write_with_the_calculator)
    output, batch = agent_rollout(tool_generate([Tool(add, CALCULATOR)]))
    encode = lambda text: router.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    requests = [payload["input_ids"] for payload, _ in router.requests if "input_ids" in payload]
    for row, sample in enumerate(flatten(output.samples)):
        a, b = re.search(r"(\d+) plus (\d+)", sample.response + str(sample.prompt)).groups()
        result = "error: four is not for me" if b == "4" else str(int(a) + int(b))
        written = encode(f" {glm_call('add', b=b, a=a)}\n<|observation|>")
        answered = encode(f"<tool_response>{result}</tool_response><|assistant|>")
        last = encode(f"\\boxed{{{result}}}<|user|>")
        assert sample.tokens[sample.prompt_length :] == written + answered + last
        assert sample.loss_mask == [1] * len(written) + [0] * len(answered) + [1] * len(last)
        assert sample.loss_mask == batch.loss_masks[row].tolist()
        own = [-0.5 - i / 8 for i in range(len(written))], [-0.5 - i / 8 for i in range(len(last))]
        assert sample.rollout_log_probs == own[0] + [0.0] * len(answered) + own[1]
        written_by = [["3", len(written)], ["", len(answered)], ["3", len(last)]]
        assert sample.weight_version_spans == written_by and sample.metadata["num_turns"] == 2
        assert sample.tokens[: sample.prompt_length] in requests, "the first request is the prompt"
        assert sample.tokens[: -len(last)] in requests, "the second is the first, its answer and the tool's, token by token"
        assert (sample.reward == 1) == (b != "4")


def test_a_call_that_fits_no_tool_is_told_to_the_policy(agent_rollout, router):
    wrong = [glm_call("add", a=1), glm_call("take", a=1), glm_call("add", a=1, b=2)]

    def write(text):
        results = text.count("<tool_response>")
        return (f"{wrong[results]}<|observation|>", "stop") if results < 3 else ("ok<|user|>", "stop")

    router.answer = policy(write)
    output, _ = agent_rollout(tool_generate([Tool(add, CALCULATOR)]), rollout_batch_size=1, n_samples_per_prompt=1,
                    over_sampling_batch_size=1, rollout_max_response_len=1024)  # fmt: skip
    (sample,) = flatten(output.samples)
    assert "error: add: missing a required argument: 'b'" in sample.response
    assert "error: there is no tool 'take', only add" in sample.response
    assert "<tool_response>3</tool_response>" in sample.response and sample.status is Status.COMPLETED


def test_a_history_that_branches_is_two_samples_and_what_they_share_is_trained_once(agent_rollout, router):
    router.answer = policy(lambda text: (f"\\boxed{{{sum_in(text)}}}<|user|>", "stop"))
    kept = {}

    async def play(session):
        messages = session.messages
        first = await session.ask(messages)
        messages.append(first.answer)
        left = await session.ask([*messages, user("left?")])
        await session.ask([*messages, user("right?")])
        # What an agent sends back may have lost what it does not use.
        spelled = {"role": "assistant", "content": [{"type": "text", "text": left.answer["content"]}], "refusal": None}
        deeper = await session.ask([*messages, user("left?"), spelled, user("more?")])
        assert deeper.parent is left and left.parent is first
        alone = await session.ask([user("3 plus 3?")])
        assert alone.parent is None
        kept["first"] = len(first.own)
        return 0.5

    output, batch = agent_rollout(agent(play), rollout_batch_size=2, over_sampling_batch_size=2)
    for group in output.samples:
        for execution in group:
            right, deep, alone = execution
            assert [sample.metadata["num_turns"] for sample in execution] == [2, 3, 1]
            assert "right?" in right.response and "left?" not in right.response and "more?" in deep.response
            n = kept["first"]
            assert right.tokens[: right.prompt_length + n] == deep.tokens[: deep.prompt_length + n]
            assert sum(right.loss_mask[:n]) == n and sum(deep.loss_mask[:n]) == 0
            answers = len(router.tokenizer.encode(f"\\boxed{{{sum_in(right.tokens and str(right.prompt))}}}<|user|>"))
            assert sum(deep.loss_mask) == 2 * answers and alone.prompt_length < right.prompt_length
            assert {sample.rollout_id for sample in execution} == {execution[0].index}
            assert {sample.reward for sample in execution} == {0.5}
    assert len(batch.trajectories) == 12 and len(set(batch.trajectories.tolist())) == 4


@pytest.mark.parametrize(("limits", "values"), [({"max_turns": 2}, {}), ({}, {"rollout_max_context_len": 120})])
def test_a_session_ends_by_its_turns_or_tokens_and_its_sample_is_truncated(agent_rollout, router, limits, values):
    router.answer = policy(lambda text: ("once more<|user|>", "stop"))

    async def play(session):
        messages = session.messages
        while True:
            turn = await session.ask(messages)
            messages += [turn.answer, user("and then?")]

    output, batch = agent_rollout(agent(play, **limits), rollout_batch_size=2, over_sampling_batch_size=2, **values)
    for sample in flatten(output.samples):
        assert sample.status is Status.TRUNCATED and sample.loss_mask[-1] == 1, "the last word is the policy's"
        answer = len(router.tokenizer.encode("once more<|user|>", add_special_tokens=False))
        turns = sample.metadata["num_turns"]
        if limits:
            assert turns == 2
        else:  # another question and answer would begin after the context's end
            longer = (sample.response_length - answer) // (turns - 1)
            assert len(sample.tokens) - answer < 120 <= len(sample.tokens) - answer + longer
    assert batch.truncated.all()


def test_max_tokens_and_stop_bound_one_answer_and_the_budget_all_of_them(agent_rollout, router):
    router.answer = policy(lambda text: ("a stop b", "length"))

    async def play(session):
        first = await session.ask(session.messages, max_tokens=5, stop=["stop"])
        await session.ask([*session.messages, first.answer, user("?")], max_tokens=500)
        return 1.0

    output, _ = agent_rollout(agent(play), rollout_max_response_len=64, rollout_batch_size=1, over_sampling_batch_size=1)
    sample = flatten(output.samples)[0]
    asked = [payload["sampling_params"] for payload, _ in router.requests if "input_ids" in payload]
    first, second = ({p["max_new_tokens"] for p in asked if bool(p["stop"]) == stops} for stops in (True, False))
    before_second = sample.response_length - len(router.tokenizer.encode("a stop b", add_special_tokens=False))
    assert first == {5} and second == {64 - before_second}
    assert {tuple(params["stop"] or ()) for params in asked} == {("stop",), ()}


def test_what_breaks_in_an_agent_fails_its_sample_and_what_a_session_says_does_not(agent_rollout, router):
    router.answer = policy(lambda text: ("x<|user|>", "stop"))

    async def breaks(session):
        await session.ask(session.messages)
        raise KeyError("lost")

    with pytest.raises(RuntimeError, match="KeyError: 'lost'"):
        agent_rollout(agent(breaks))

    async def silent(session):
        return 1.0

    with pytest.raises(RuntimeError, match="asked the policy for nothing"):
        agent_rollout(agent(silent))

    async def toolless(session):
        await session.ask(session.messages, tools=[CALCULATOR])

    with pytest.raises(RuntimeError, match="pass --sglang-tool-call-parser"):
        agent_rollout(agent(toolless), sglang={})

    async def rendered(session):
        await session.ask(session.messages)

    with pytest.raises(RuntimeError, match="remove --apply-chat-template"):
        agent_rollout(agent(rendered), apply_chat_template=True)


def test_an_execution_that_the_rollouts_end_interrupts_begins_anew(agent_rollout, router):
    """Over-sampled prompts are aborted; with --partial-rollout they go back as they came, without half an execution."""

    def write(text):
        if sum_in(text) >= 4 and "go on" in text and not router.aborted.wait(0.02):
            router.aborted.wait(20)
            return "\\boxed{", "abort"
        return f"\\boxed{{{sum_in(text)}}}<|user|>", "stop"

    router.answer = policy(write)
    refused = []

    async def play(session):
        messages = session.messages
        first = await session.ask(messages)
        try:
            await session.ask([*messages, first.answer, user("go on")])
        except SessionEnded as error:
            refused.append(str(error))
            raise
        return 1.0

    output, batch = agent_rollout(agent(play), rollout_batch_size=4, over_sampling_batch_size=8, partial_rollout=True)
    assert len(output.samples) == 4 and batch.raw_rewards.tolist() == [1.0] * 8
    assert output.metrics["rollout/groups_buffered"] >= 1 and set(refused) <= {"the rollout has ended"}


def test_text_of_an_environment_without_messages(agent_rollout, router):
    router.answer = lambda text, payload: ("\\boxed{5}<|user|>" if "found" in text else "<search>five</search>", "stop")

    async def generate(args, sample, sampling_params):
        asked = await model_turn(args, sample, sampling_params, stop=["</search>"])
        assert asked == "<search>five</search>"
        environment_turn(args, sample, "<found>5</found>")
        assert await model_turn(args, sample, sampling_params) == "\\boxed{5}<|user|>"
        return sample

    output, batch = agent_rollout(generate, apply_chat_template=True)
    encode = lambda text: len(router.tokenizer.encode(text, add_special_tokens=False))  # noqa: E731
    for sample, mask in zip(flatten(output.samples), batch.loss_masks, strict=True):
        search, found, box = map(encode, ("<search>five</search>", "<found>5</found>", "\\boxed{5}<|user|>"))
        assert mask.tolist() == [1] * search + [0] * found + [1] * box
        assert sample.response == "<search>five</search><found>5</found>\\boxed{5}<|user|>"
    stops = [payload["sampling_params"]["stop"] for payload, _ in router.requests]
    assert stops.count(["</search>"]) == stops.count(None) == 8


def test_messages_that_say_the_same():
    said = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function",
            "function": {"name": "f", "arguments": '{"a": 1}'}}]}  # fmt: skip
    echoed = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [{"id": "2", "type": "function",
              "function": {"name": "f", "arguments": '{"a":1}'}}]}  # fmt: skip
    assert same_message(said, echoed)
    assert same_message(said | {"reasoning_content": "hm"}, echoed)
    for other in (
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "x"} | {"tool_calls": said["tool_calls"]},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 2}'}}]},
    ):
        assert not same_message(said, other)


def test_a_tool_is_defined_by_its_hints_and_its_docstring():
    async def python(code: str, seconds: int = 5) -> str:
        """Runs Python.

        Args:
            code: The program.
            seconds: How long it may take.
        """

    properties = {
        "code": {"type": "string", "description": "The program."},
        "seconds": {"type": "integer", "description": "How long it may take."},
    }
    tool = Tool.of(python)
    assert tool.name == "python" and tool.definition["function"]["description"] == "Runs Python."
    assert tool.definition["function"]["parameters"] == {"type": "object", "properties": properties, "required": ["code"]}
