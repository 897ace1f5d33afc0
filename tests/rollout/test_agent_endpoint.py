"""The policy behind OpenAI's own client: tools, streams, refusals, keys; what was said is trained token by token."""

from __future__ import annotations

import json
import re
import threading

import httpx
import openai
import pytest
from agent_helpers import CALCULATOR, glm_call, policy
from rollout_helpers import sum_in

from slime.rollout.agents.endpoint import serve_agent
from slime.rollout.base_types import flatten
from slime.types.sample import Status

ONE_PROMPT = {"rollout_batch_size": 1, "over_sampling_batch_size": 1, "n_samples_per_prompt": 1}


def served(play, **limits):
    async def generate(args, sample, sampling_params):
        return await serve_agent(args, sample, sampling_params, play, **limits)

    return generate


def write(text):
    """Calls the calculator once, then answers what it said."""
    if found := re.search(r"<tool_response>(.*?)</tool_response>", text):
        return f"It is {found[1]}.<|user|>", "stop"
    if "# Tools" in text:
        a, b = re.search(r"(\d+) plus (\d+)", text).groups()
        return f"{glm_call('add', a=a, b=b)}<|observation|>", "stop"
    return f"\\boxed{{{sum_in(text)}}}<|user|>", "stop"


async def a_framework(address):
    client = openai.AsyncOpenAI(base_url=address.base_url, api_key=address.api_key)
    messages = list(address.messages)
    first = await client.chat.completions.create(model="gpt-4o", messages=messages, tools=[CALCULATOR], temperature=0)
    [choice] = first.choices
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    # As most frameworks do: the message as the client dumps it, nulls and all.
    messages.append(choice.message.model_dump())
    messages.append({"role": "tool", "tool_call_id": call.id, "content": str(sum(arguments.values()))})
    last = await client.chat.completions.create(model="gpt-4o", messages=messages, tools=[CALCULATOR])
    assert last.choices[0].finish_reason == "stop"
    assert last.usage.prompt_tokens > first.usage.total_tokens and last.usage.completion_tokens > 0
    return float(last.choices[0].message.content == f"It is {sum(arguments.values())}.")


def test_an_agent_framework_trains_by_another_base_url(agent_rollout, router):
    router.answer = policy(write)
    output, batch = agent_rollout(served(a_framework))
    encode = lambda text: router.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    requests = [payload for payload, _ in router.requests if "input_ids" in payload]
    assert len(requests) == 16 and {payload["sampling_params"]["temperature"] for payload in requests} == {1.0}
    for sample in flatten(output.samples):
        a, b = re.search(r"(\d+) plus (\d+)", str(sample.prompt)).groups()
        called = encode(f"{glm_call('add', a=a, b=b)}<|observation|>")
        result = encode(f"<tool_response>{int(a) + int(b)}</tool_response><|assistant|>")
        said = encode(f"It is {int(a) + int(b)}.<|user|>")
        assert sample.tokens[sample.prompt_length :] == called + result + said and sample.status is Status.COMPLETED
        assert sample.loss_mask == [1] * len(called) + [0] * len(result) + [1] * len(said)
        assert sample.reward == 1.0 and sample.rollout_id == sample.index
    assert batch.raw_rewards.tolist() == [1.0] * 8


def test_a_framework_that_blocks_runs_in_a_thread_and_may_stream(agent_rollout, router):
    router.answer = policy(write)
    threads = set()

    def blocking(address):
        threads.add(threading.current_thread())
        environment = address.environment
        client = openai.OpenAI(base_url=environment["OPENAI_BASE_URL"], api_key=environment["OPENAI_API_KEY"])
        assert [model.id for model in client.models.list()] == ["policy"]
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = list(client.chat.completions.create(model="policy", messages=address.messages, **options))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices] == [None, "stop"]
        assert chunks[-1].usage.completion_tokens > 0
        asked = client.chat.completions.create(model="policy", messages=address.messages, tools=[CALCULATOR], stream=True)
        [name] = [call.function.name for chunk in asked if chunk.choices for call in chunk.choices[0].delta.tool_calls or ()]
        assert name == "add"
        return float(text == f"\\boxed{{{sum_in(str(address.messages))}}}")

    output, batch = agent_rollout(served(blocking))
    assert threading.main_thread() not in threads
    assert [len(execution) for group in output.samples for execution in group] == [2] * 8, "two prompts: with and without tools"
    assert batch.raw_rewards.tolist() == [1.0] * 16


@pytest.mark.parametrize(
    ("wrong", "status", "said"),
    [
        ({"n": 2}, 400, "n is 2; ask once for each answer"),
        ({"tool_choice": "required"}, 400, "tool_choice is 'required'; the policy chooses"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format is 'json_object'"),
        ({"messages": []}, 400, "a conversation is a list of messages"),
        ({"messages": [{"content": "x"}]}, 400, "a message has a role and a content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "reads text only",
        ),
        ({"messages": "x"}, 400, "messages: Input should be a valid list"),
        ({"max_tokens": "many"}, 400, "max_tokens: Input should be a valid integer"),
        ({"key": "sk-wrong"}, 401, "no open session has this key"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_openais_words(agent_rollout, router, wrong, status, said):
    router.answer = policy(write)
    seen = []

    async def play(address):
        client = httpx.AsyncClient(base_url=address.base_url, trust_env=False)
        wrong_body = dict(wrong)
        headers = {"Authorization": f"Bearer {wrong_body.pop('key', address.api_key)}"}
        answer = await client.post("chat/completions", json={"messages": address.messages} | wrong_body, headers=headers)
        seen.append((answer.status_code, answer.json()["error"]["message"], answer.headers["x-should-retry"]))
        headers = {"Authorization": f"Bearer {address.api_key}"}
        answer = await client.post("chat/completions", json={"messages": address.messages}, headers=headers)
        assert answer.status_code == 200, "the session goes on"
        return 1.0

    agent_rollout(served(play), **ONE_PROMPT)
    [(code, message, again)] = seen
    assert code == status and said in message and again == "false"


def test_a_session_without_room_is_told_as_openai_tells_it_and_a_closed_one_has_no_key(agent_rollout, router):
    router.answer = policy(write)
    seen = []

    def play(address):
        client = openai.OpenAI(base_url=address.base_url, api_key=address.api_key)
        seen.append(client)
        messages = list(address.messages)
        while True:
            answer = client.chat.completions.create(model="policy", messages=messages).choices[0].message
            messages += [answer, {"role": "user", "content": "1 plus 1"}]

    output, _ = agent_rollout(served(play, max_turns=3), **ONE_PROMPT)
    [sample] = flatten(output.samples)
    assert sample.status is Status.TRUNCATED and sample.metadata["num_turns"] == 3
    with pytest.raises(openai.AuthenticationError, match="no open session has this key"):
        seen[0].chat.completions.create(model="policy", messages=[{"role": "user", "content": "2 plus 2"}])


def test_a_client_that_goes_away_leaves_nothing_behind(agent_rollout, router):
    left = threading.Event()

    def slow(text):
        if "slow" in text:
            left.wait(20)
        return f"\\boxed{{{sum_in(text)}}}<|user|>", "stop"

    router.answer = policy(slow)

    async def play(address):
        client = openai.AsyncOpenAI(base_url=address.base_url, api_key=address.api_key, max_retries=0)
        hasty = client.with_options(timeout=httpx.Timeout(5.0, read=0.3))
        with pytest.raises(openai.APITimeoutError):
            await hasty.chat.completions.create(model="policy", messages=[{"role": "user", "content": "slow 1 plus 1"}])
        await client.chat.completions.create(model="policy", messages=address.messages)
        left.set()
        return 1.0

    output, _ = agent_rollout(served(play), **ONE_PROMPT)
    [sample] = flatten(output.samples)
    assert sample.metadata["num_turns"] == 1 and "slow" not in router.tokenizer.decode(sample.tokens)


def test_the_server_listens_on_loopback_alone(agent_rollout, router):
    router.answer = policy(write)
    found = []

    async def play(address):
        found.append(httpx.URL(address.base_url))
        await openai.AsyncOpenAI(base_url=address.base_url, api_key=address.api_key).chat.completions.create(
            model="policy", messages=address.messages
        )
        return 1.0

    agent_rollout(served(play), **ONE_PROMPT)
    table = [line.split() for line in open("/proc/net/tcp").read().splitlines()[1:]]
    listening = {fields[1] for fields in table if fields[3] == "0A"}
    assert f"0100007F:{found[0].port:04X}" in listening and f"00000000:{found[0].port:04X}" not in listening
    assert found[0].host == "127.0.0.1"
