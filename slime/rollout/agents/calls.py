"""What an answer's text says: thoughts, content and tool calls.

Every model family writes calls its own way, and SGLang knows them: each engine answers /parse_function_call and
/separate_reasoning for the parser that is named, so --sglang-tool-call-parser and --sglang-reasoning-parser name here what
they name there.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

from slime.engine.client import EngineError, RouterClient
from slime.rollout.http import post
from slime.rollout.messages import Message


@dataclass(frozen=True)
class Parsers:
    """Names of SGLang's parsers; None reads nothing."""

    tool_calls: str | None
    reasoning: str | None

    @classmethod
    def of(cls, args: Any) -> Parsers:
        options = getattr(args, "sglang", None) or {}
        return cls(options.get("tool_call_parser"), options.get("reasoning_parser"))


async def read_answer(text: str, tools: list[dict] | None, parsers: Parsers, router: RouterClient) -> Message:
    """The assistant's message. Raises ValueError for tools without a parser, EngineError where no engine can be asked."""
    message: Message = {"role": "assistant", "content": text}
    if parsers.reasoning:
        found = await _ask_an_engine(router, "/separate_reasoning", {"text": text, "reasoning_parser": parsers.reasoning})
        message["content"] = found["text"]
        if found["reasoning_text"]:
            message["reasoning_content"] = found["reasoning_text"]
    if not tools:
        return message
    if not parsers.tool_calls:
        raise ValueError(
            "the request has tools, and nothing says how this model writes calls; pass --sglang-tool-call-parser "
            "(glm47, qwen25, deepseekv32, llama3, ...)"
        )
    body = {"text": message["content"], "tools": tools, "tool_call_parser": parsers.tool_calls}
    found = await _ask_an_engine(router, "/parse_function_call", body)
    message["content"] = found["normal_text"]
    if found["calls"]:
        message["tool_calls"] = [_call(item["name"], item["parameters"]) for item in found["calls"]]
    return message


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": {"name": name, "arguments": arguments}}


def arguments_of(call: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments. Raises ValueError, worded for the model, unless they are a JSON object."""
    text = call["function"]["arguments"]
    try:
        found = json.loads(text or "{}") if isinstance(text, str) else text
    except ValueError as error:
        raise ValueError(f"the arguments are not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"the arguments are a {type(found).__name__}, not an object")
    return found


async def _ask_an_engine(router: RouterClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """An engine that answers: all know the same parsers. Whom a text is sent to first depends on it, so each gets its share."""
    failure: EngineError | None = None
    workers = await router.workers()
    first = len(body["text"]) % max(len(workers), 1)
    for worker in [*workers[first:], *workers[:first]]:
        try:
            return await post(f"{worker['url']}{path}", body, max_retries=2)
        except EngineError as error:
            if error.status is not None and error.status < 500:
                raise
            failure = error
    raise failure or EngineError("the router knows no engine that could read an answer")
