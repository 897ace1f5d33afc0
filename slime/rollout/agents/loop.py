"""Generate functions of several turns: tools that the policy calls, agents of any make, text of an environment."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slime.rollout.agents.calls import arguments_of
from slime.rollout.agents.session import Session
from slime.rollout.generation import generate, state_for
from slime.rollout.messages import Message
from slime.types.sample import Sample, Status

Reward = float | dict[str, Any] | None
Agent = Callable[[Session], Awaitable[Reward]]
GenerateFunction = Callable[..., Awaitable[list[Sample]]]


@dataclass(frozen=True)
class Tool:
    """A function that the policy may call."""

    function: Callable[..., Awaitable[str] | str]
    """Gets the call's arguments by name. A ValueError is told to the policy, any other error fails the sample."""
    definition: dict[str, Any]
    """What the chat template shows of it: {"type": "function", "function": {"name", "description", "parameters"}}."""

    @property
    def name(self) -> str:
        return self.definition["function"]["name"]

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Tool:
        """Defined by its type hints and its docstring, whose `Args:` describe them (transformers' get_json_schema)."""
        from transformers.utils import get_json_schema

        return cls(function, get_json_schema(function))


async def run_agent(
    args: Any, sample: Sample, sampling_params: dict[str, Any], agent: Agent, *, max_turns: int | None = 64
) -> list[Sample]:
    """Let `agent` work on the sample's prompt; what its session recorded, as samples of one trajectory.

    What the agent gives back is the reward of all its samples, None leaves them to the grader. An error of an agent whose
    session has ended by a limit is no error: its samples end there, truncated. Raises what the agent raises otherwise, and
    ValueError if it asked for nothing.
    """
    session = Session(args, sample, sampling_params, state_for(args), max_turns=max_turns)
    started = time.monotonic()
    reward = None
    try:
        reward = await agent(session)
    except Exception:
        if not session.has_ended:
            raise
    if session.aborted:
        sample.status = Status.ABORTED
        return [sample]
    samples = session.samples()
    if not samples:
        raise ValueError("the agent asked the policy for nothing, so there is nothing to train")
    for one in samples:
        one.reward = reward
    samples[0].non_generation_time += time.monotonic() - started - session.seconds
    return samples


def tool_generate(tools: Sequence[Tool], *, max_turns: int = 8) -> GenerateFunction:
    """A function for --custom-generate-function-path: the policy answers, its calls are run, until it calls nothing."""

    async def generate_with_tools(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> list[Sample]:
        async def agent(session: Session) -> None:
            await use_tools(session, tools)

        return await run_agent(args, sample, sampling_params, agent, max_turns=max_turns)

    return generate_with_tools


async def use_tools(session: Session, tools: Sequence[Tool], messages: list[Message] | None = None) -> list[Message]:
    """The conversation from `messages` (default: the session's prompt) to an answer that calls no tool."""
    messages = list(session.messages if messages is None else messages)
    known = {tool.name: tool for tool in tools}
    while True:
        turn = await session.ask(messages, tools=[tool.definition for tool in tools])
        messages.append(turn.answer)
        calls = turn.answer.get("tool_calls")
        if not calls:
            return messages
        messages += await asyncio.gather(*(_run_call(call, known) for call in calls))


async def _run_call(call: dict[str, Any], tools: dict[str, Tool]) -> Message:
    name = call["function"]["name"]
    try:
        if name not in tools:
            raise ValueError(f"there is no tool {name!r}, only {', '.join(tools)}")
        arguments = arguments_of(call)
        try:
            inspect.signature(tools[name].function).bind(**arguments)
        except TypeError as error:
            raise ValueError(f"{name}: {error}") from None
        content = tools[name].function(**arguments)
        if inspect.isawaitable(content):
            content = await content
    except ValueError as error:
        content = f"error: {error}"
    return {"role": "tool", "tool_call_id": call["id"], "content": str(content)}


# ------------------------------------------------------------------------------------ text between requests, no messages


async def model_turn(args: Any, sample: Sample, sampling_params: dict[str, Any], *, stop: Sequence[str] = ()) -> str:
    """One request that goes on from all that the sample holds; the text that it brought, "" when there was no room.

    stop: texts that end this turn, beside those of the sampling parameters. They are part of the text and of what is trained.
    """
    before = len(sample.response)
    if sample.status is Status.COMPLETED:
        sample.status = Status.PENDING  # the last turn ended, and an environment has answered
    params = dict(sampling_params)
    if stop:
        params["stop"] = [*(params.get("stop") or ()), *stop]
    await generate(args, sample, params)
    return sample.response[before:]


def environment_turn(args: Any, sample: Sample, text: str) -> None:
    """Text that the policy reads next and did not write: its tokens have mask 0 and no log-probs."""
    ids = state_for(args).tokenizer.encode(text, add_special_tokens=False)
    sample.append_response_tokens(tokens=ids, trainable=False, text=text)
