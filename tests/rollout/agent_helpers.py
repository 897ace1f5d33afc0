"""A policy that the tests write, which calls tools as GLM does, and the engine's reading of such calls."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

_CALL = re.compile(r"<tool_call>(\w+)(.*?)</tool_call>", re.S)
_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key><arg_value>(.*?)</arg_value>", re.S)

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}


GENERATE_PATH = f"{__name__}.generate_of_this_test"
_generate = None


def use(function: Callable) -> None:
    """What GENERATE_PATH runs from now on: a function inside a test has no dotted path."""
    global _generate
    _generate = function


async def generate_of_this_test(args, sample, sampling_params):
    return await _generate(args, sample, sampling_params)


def policy(write: Callable[[str], tuple[str, str]]) -> Callable:
    """FakeRouter's `answer`: write(text of the request) -> (what is generated, finish type); calls are read as engines do."""

    def answer(path_or_text: str, payload: dict):
        return read_calls(payload["text"]) if path_or_text == "/parse_function_call" else write(path_or_text)

    return answer


def read_calls(text: str) -> dict:
    """The answer of /parse_function_call: a value is JSON where it can be."""
    calls = [
        {"name": name, "parameters": json.dumps({key: _value(word) for key, word in _ARGUMENT.findall(arguments)})}
        for name, arguments in _CALL.findall(text)
    ]
    return {"normal_text": _CALL.sub("", text), "calls": calls}


def _value(word: str) -> object:
    try:
        return json.loads(word)
    except ValueError:
        return word


def glm_call(name: str, **arguments: object) -> str:
    inner = "".join(f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>" for key, value in arguments.items())
    return f"<tool_call>{name}{inner}</tool_call>"
