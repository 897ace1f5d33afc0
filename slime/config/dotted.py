"""Dotted paths in flags: what `package.module.name` names, checked against how the flag calls it.

An error names the flag, the path, what was found and what was expected. The tables of calls are with those who make them
(slime.rollout.plugins, slime.training.hooks).
"""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """How a flag's function is called."""

    shown: str
    """As a user reads it."""
    positional: int
    """Arguments by position."""
    keywords: tuple[str, ...] = ()
    """Arguments by name, always given."""
    offered: tuple[str, ...] = ()
    """Arguments by name, given to functions that take them."""
    is_async: bool | None = False
    """Whether it is awaited; None takes both kinds."""


def find(path: str, *, who: str = "", expected: str = "something") -> Any:
    """What `path` names. Raises ValueError, which begins with `who`, where nothing does."""
    who = who or path
    module_name, _, name = path.rpartition(".")
    if not module_name or not name:
        raise ValueError(f"{who}: expected a dotted path package.module.name to {expected}, got {path!r}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        missing = f"module {module_name} cannot be imported ({error}); is it on PYTHONPATH?"
        raise ValueError(f"{who}: {missing} expected {expected}") from error
    except Exception as error:  # whatever a user's module does while it is imported
        raise ValueError(f"{who}: importing {module_name} raises {type(error).__name__}: {error}{_line_of(error)}") from error
    if not hasattr(module, name):
        offered = ", ".join(sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_")))
        raise ValueError(f"{who}: module {module_name} has no {name!r}; it has: {offered or 'nothing to call'}")
    return getattr(module, name)


def _line_of(error: Exception) -> str:
    """Where the innermost frame is, for a reader who sees one line."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames and not isinstance(error, SyntaxError) else ""


def find_callable(flag: str, path: str, call: Call) -> Callable[..., Any]:
    """The function (or class) at `path`, which can be called as the flag does. Raises ValueError otherwise."""
    who = f"{flag} {path}"
    found = find(path, who=who, expected=call.shown)
    if not callable(found):
        raise ValueError(f"{who}: found a {type(found).__name__}, which cannot be called; expected {call.shown}")
    _check_arguments(who, found, call)
    if call.is_async is True and not _is_async(found):
        raise ValueError(f"{who}: found a plain function; expected {call.shown} (write `async def`)")
    if call.is_async is False and _is_async(found):
        # Nobody would await it, and a coroutine is true: a filter would keep everything.
        raise ValueError(f"{who}: found an async function; expected {call.shown} (write `def`)")
    return found


def _check_arguments(who: str, found: Callable[..., Any], call: Call) -> None:
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return  # a builtin without a signature: Python will say what is wrong when it is called
    if problem := does_not_take(signature, call):
        name = getattr(found, "__name__", type(found).__name__)
        raise ValueError(f"{who}: found {name}{signature} ({problem}); expected {call.shown}")


def does_not_take(signature: inspect.Signature, call: Call) -> str:
    """Why a function of this signature cannot be called so; empty when it can."""
    try:
        offered = _taken(signature, dict.fromkeys(call.offered))
        signature.bind(*range(call.positional), **dict.fromkeys(call.keywords), **offered)
    except TypeError as error:
        return str(error)
    return ""


def _is_async(found: Callable[..., Any]) -> bool:
    # A decorator may hide an async function behind a plain one that gives its coroutine.
    return any(inspect.iscoroutinefunction(one) for one in (found, type(found).__call__, inspect.unwrap(found)))


def accepted_keywords(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Those of `offered` that the function takes."""
    return _taken(inspect.signature(function), offered)


def _taken(signature: inspect.Signature, offered: dict[str, Any]) -> dict[str, Any]:
    parameters = signature.parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return offered
    return {name: value for name, value in offered.items() if name in parameters}
