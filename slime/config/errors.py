"""What a user did wrong, said once and completely."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A wrong flag, file or combination; the message says what to change."""


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean --x?`, or nothing when no word is close."""
    close = difflib.get_close_matches(word, list(words), 1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def one_edit_apart(left: str, right: str) -> bool:
    """One letter came, went or changed, or two neighbours were swapped."""
    if len(left) == len(right):
        wrong = [i for i in range(len(left)) if left[i] != right[i]]
        swapped = (
            len(wrong) == 2
            and wrong[1] == wrong[0] + 1
            and left[wrong[0]] == right[wrong[1]]
            and left[wrong[1]] == right[wrong[0]]
        )
        return len(wrong) == 1 or swapped
    short, long = sorted((left, right), key=len)
    return len(long) - len(short) == 1 and any(long[:i] + long[i + 1 :] == short for i in range(len(long)))


def refuse_unknown_keys(mapping: dict, legal: Iterable[str], *, file: str, path: str) -> None:
    """One error for all keys of `mapping` (found at `path` of `file`) that are not `legal`."""
    legal = list(legal)
    wrong = [key for key in mapping if key not in legal]
    if wrong:
        said = ", ".join(f"{key!r}{nearest(str(key), legal)}" for key in wrong)
        raise ConfigError(f"{file}: unknown key at {path or 'the top'}: {said} (legal keys: {', '.join(legal)})")


def load_yaml(file: str, *, flag: str) -> object:
    """The content of a YAML (or JSON) file; a missing or malformed one is a ConfigError naming flag, file and line."""
    import yaml

    try:
        with open(file, encoding="utf-8") as stream:
            root = yaml.compose(stream, Loader=yaml.SafeLoader)
        if twice := _key_twice(root):
            raise ConfigError(f"{flag}: {file!r} has {twice}; keep one, the earlier would be ignored")
        return None if root is None else yaml.SafeLoader("").construct_document(root)
    except FileNotFoundError:
        raise ConfigError(f"{flag}: no file {file!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag}: cannot read {file!r}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{flag}: {file!r} is not YAML{where}: {getattr(error, 'problem', None) or error}") from None


def _key_twice(root: object) -> str:
    """`dp_size twice, at lines 9 and 12`, or nothing: YAML forbids a key to be there twice, and PyYAML takes the last one."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        children = getattr(node, "value", None)
        if id(node) in seen or not isinstance(children, list):
            continue
        seen.add(id(node))  # an anchor that holds itself
        lines: dict[tuple[str, str], int] = {}
        for child in children:
            if not isinstance(child, tuple):
                waiting.append(child)
                continue
            key, value = child
            waiting.append(value)
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines:
                return f"{key.value} twice, at lines {lines[name]} and {line}"
            lines[name] = line
    return ""
