"""Flags of a command that stands before a run's own: told apart, read, and checked before any work."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def split_own(
    argv: Sequence[str], known: Mapping[str, tuple[str, str]], *, repeated: Sequence[str] = ()
) -> tuple[dict[str, list[str]], list[str]]:
    """(the command's own flags, the run's). known: flag -> (what its value is, meaning).

    Raises ValueError for an own flag without its value.
    """
    own: dict[str, list[str]] = {}
    rest: list[str] = []
    position = 0
    while position < len(argv):
        name, equals, inline = argv[position].partition("=")
        position += 1
        if name not in known:
            rest.append(argv[position - 1])
            continue
        value = ""
        if known[name][0]:
            if not equals:
                if position == len(argv):
                    raise ValueError(f"{name} wants a value: {known[name][0]}")
                inline = argv[position]
                position += 1
            value = inline
        if name in own and name not in repeated and known[name][0]:
            raise ValueError(f"{name} is given twice")
        own.setdefault(name, []).append(value)
    return own, rest


def one(own: dict[str, list[str]], name: str) -> str | None:
    return own[name][0] if name in own else None


def job_environment(own: dict[str, list[str]]) -> dict[str, str] | None:
    """The variables of --runtime-env, with or without Ray's `env_vars` around them."""
    text = one(own, "--runtime-env")
    if text is None:
        return None
    try:
        raw = json.loads(text)
        return {str(key): str(value) for key, value in raw.get("env_vars", raw).items()}
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"--runtime-env wants a JSON object of variables ({error})") from None


def number(own: dict[str, list[str]], name: str, kind: type, *, most: float = 1e15) -> float | int | None:
    text = one(own, name)
    try:
        value = None if text is None else kind(text)
    except ValueError:
        raise ValueError(f"{name} wants a number, got {text!r}") from None
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0 and finite, got {text}")
    if value is not None and value > most:
        raise ValueError(f"{name} may be {most:,.0f} at most, got {text}")
    return value


def check_outputs(own: dict[str, list[str]], names: Sequence[str]) -> None:
    """A report that cannot be written is said before the work, not after it."""
    for name in names:
        file = one(own, name)
        if file is None:
            continue
        if not file or Path(file).is_dir() or not os.access(Path(file).absolute().parent, os.W_OK):
            raise ValueError(f"{name} {file or repr(file)} cannot be written; name a file in an existing folder")


def say(text: str) -> None:
    """To standard output, whatever it can spell. A reader that has seen enough is no error.

    Raises ValueError where it cannot be written.
    """
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would be tried again at exit
    except OSError as error:
        raise ValueError(f"the report cannot be written ({error.strerror}); it goes to standard output") from None


def save(own: dict[str, list[str]], name: str, text: str) -> None:
    """To the file of the flag, in UTF-8 whatever the locale. Raises ValueError where it cannot be written."""
    try:
        # Words that the locale could not spell came as escaped bytes, and go out as these.
        Path(own[name][0]).write_text(text, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise ValueError(f"{name} {own[name][0]} cannot be written ({error.strerror})") from None


def usage(doc: str | None, known: Mapping[str, tuple[str, str]]) -> str:
    return (doc or "") + "\n" + "".join(f"  {name} {value}".ljust(30) + f"{text}\n" for name, (value, text) in known.items())
