"""Messages as data sets write them -> messages as chat templates read them.

Data sets follow the chat API: contents in parts, arguments of tool calls as JSON text, null for what is absent. Templates are
each written for one spelling of that, and fail on another or leave it out in silence. So a conversation has several spellings,
the usual one first, and whoever renders takes the first that the template writes out whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Message = dict[str, Any]

STEP_LOSS_MASK = "step_loss_mask"
"""Key of a message: 0 leaves the turn out of the loss, 1 or nothing trains it."""


def without_nulls(value: Any) -> Any:
    """The value without null fields, at any depth: a parquet file gives every message the fields of all messages."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def check_messages(messages: Any) -> None:
    """Raises ValueError naming the message unless each has a role, and contents and calls of a usable kind."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"a conversation is a list of messages, found {str(messages)[:60]!r}")
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {position} is {str(message)[:60]!r}; a message has a role and a content")
        where = f"message {position} ({message['role']})"
        calls = calls_of(message)
        if message.get("content") is None and not calls and not message.get("reasoning_content"):
            raise ValueError(f"{where} has no content" + (" and calls no tool" if message["role"] == "assistant" else ""))
        _check_content(message.get("content"), where)
        if not isinstance(calls, list) or not all(isinstance(call, dict) and call_name(call) for call in calls):
            raise ValueError(f"{where}: tool_calls is {str(calls)[:60]!r}; each call has a function with a name and arguments")
        if message.get(STEP_LOSS_MASK) not in (None, 0, 1):
            raise ValueError(f"{where}: {STEP_LOSS_MASK} is 0 or 1, found {message[STEP_LOSS_MASK]!r}")


def _check_content(content: Any, where: str) -> None:
    if content is not None and not isinstance(content, str | list):
        raise ValueError(f"{where}: the content is a text or a list of parts, found {str(content)[:60]!r}")
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and any(medium in kind for medium in ("image", "video", "audio")):
            raise ValueError(f"{where}: the content has a part of type {kind!r}; this version reads text only")


def spellings(messages: list[Message]) -> Iterator[list[Message]]:
    """The conversation as templates may want it, the usual spelling first; one only where no tool is called.

    Arguments of calls as a mapping (Qwen, GLM, Llama) or as JSON text (DeepSeek-V3); the content of a turn that only calls
    tools as an empty text (GLM would write "None") or as none (DeepSeek-V3 would leave the calls out).
    """
    plain = [_plain(message) for message in messages]
    if not any(message.get("tool_calls") for message in plain):
        yield plain
        return
    for as_text, empty in ((False, ""), (False, None), (True, None), (True, "")):
        yield [_spelled(message, as_text=as_text, empty=empty) for message in plain]


def _plain(message: Message) -> Message:
    """Without fields that say nothing and our own key, the content one text where its parts are texts.

    Templates ask whether a message has tool_calls (Llama) or reasoning_content (Qwen3), not whether anything is in them.
    """
    own = (STEP_LOSS_MASK, "tool_calls", "function_call")
    kept = {key: value for key, value in message.items() if value is not None and key not in own}
    if calls := calls_of(message):
        kept["tool_calls"] = calls
    if not kept.get("reasoning_content"):
        kept.pop("reasoning_content", None)
    if kept["role"] == "function":  # who answers a function_call
        kept["role"] = "tool"
    content = kept.get("content", "")
    if isinstance(content, list) and all(_part_text(part) is not None for part in content):
        content = "".join(_part_text(part) for part in content)
    return {**kept, "content": content}


def _part_text(part: Any) -> str | None:
    text = part.get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else None


def _spelled(message: Message, *, as_text: bool, empty: str | None) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [_with_arguments(call, as_text=as_text) for call in message["tool_calls"]]
    return {**message, "tool_calls": calls, "content": message["content"] or empty}


def _with_arguments(call: Message, *, as_text: bool) -> Message:
    """The call with its arguments as JSON text, or as the mapping that such a text stands for."""
    inner = call.get("function") if isinstance(call.get("function"), dict) else call
    arguments = inner.get("arguments", {})
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        try:
            read = json.loads(arguments or "{}")
        except ValueError:
            read = None
        arguments = read if isinstance(read, dict) else arguments
    changed = {**inner, "arguments": arguments}
    return changed if inner is call else {**call, "function": changed}


def calls_of(message: Message) -> Any:
    """Its tool calls. Older data sets have a single `function_call`, which today's templates do not look for."""
    older = message.get("function_call")
    return message.get("tool_calls") or ([{"type": "function", "function": older}] if older else [])


def call_name(call: Message) -> str | None:
    """The called function, whether the call nests it under `function` or not."""
    inner = call.get("function") if isinstance(call.get("function"), dict) else call
    return inner.get("name")


def thoughts_of(message: Message) -> str:
    """What the assistant thought, given as `reasoning_content` or inside the content before `</think>`; may be empty."""
    if isinstance(message.get("reasoning_content"), str) and message["reasoning_content"].strip():
        return message["reasoning_content"].strip()
    content = message.get("content")
    if not isinstance(content, str) or "</think>" not in content:
        return ""
    return content.rpartition("</think>")[0].rpartition("<think>")[2].strip()
