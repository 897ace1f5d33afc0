"""Flags from dataclass fields: one declaration gives name, type, default and (as the field's docstring) the help text.

In a section dataclass every field is a flag `--field-name` unless it is made with `derived()`. `flag()` is for what the
annotation cannot say: another flag name, a switch that turns something off, JSON text, or "not in this version".
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from slime.config.ranges import Range, within

Converter = Callable[[str], object]


class FrozenMap(dict):
    """A mapping that cannot be changed after construction; unlike MappingProxyType it can be pickled."""

    def _refuse(self, *args: object, **kwargs: object) -> None:
        raise TypeError("this mapping belongs to a config, and a config does not change after load()")

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = __ior__ = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type, tuple[dict]]:
        return FrozenMap, (dict(self),)

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True, default=repr))


@dataclass(frozen=True)
class Flag:
    """One flag of the command line and the attribute that it fills."""

    name: str
    """With its dashes, `--rollout-batch-size`."""
    dest: str
    section: str
    convert: Converter
    num_values: int | Literal["one or more"] = 1
    """0 is a switch: giving it stores `switch_value`."""
    switch_value: object = True
    append: bool = False
    later: str = ""
    """Not empty: this version does not do it, and says this when it is asked for."""
    later_values: tuple[object, ...] = ()
    optional: bool = False
    """A YAML file may say null."""


def flag(
    default: Any,
    *names: str,
    off: str = "",
    values: int | Literal["one or more"] | None = None,
    convert: Converter | None = None,
    append: bool = False,
    later: str = "",
    later_values: tuple[object, ...] = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    also: tuple[float, ...] = (),
) -> Any:
    """A field with flag names, an off-switch, a converter, a range or a "not in this version" mark of its own.

    `off="--disable-x"` declares a switch that stores False (and no on-switch). `later` names what is missing: a value other
    than the default is refused with it; `later_values` refuses single values only. low to also: the numbers that it takes
    (slime.config.ranges.Range).
    """
    meta = {
        "names": names, "off": off, "values": values, "convert": convert, "append": append, "later": later,
        "later_values": later_values, "range": Range(low, high, above, below, also),
    }  # fmt: skip
    if isinstance(default, dict):
        return field(default_factory=lambda: FrozenMap(default), metadata={"flag": meta})
    return field(default=default, metadata={"flag": meta})


def derived(default: Any) -> Any:
    """A field that `resolve()` or a file fills; it has no flag."""
    if isinstance(default, dict):
        return field(default_factory=lambda: FrozenMap(default), metadata={"derived": True})
    return field(default=default, metadata={"derived": True})


def field_default(item: dataclasses.Field) -> object:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return None if item.default is dataclasses.MISSING else item.default


def to_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"wants a whole number, got {text!r}") from None


def to_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"wants a number, got {text!r}") from None


def to_bool(text: str) -> bool:
    words = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
    if text.lower() not in words:
        raise ValueError(f"wants true or false, got {text!r}")
    return words[text.lower()]


def to_json_object(text: str) -> FrozenMap:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"wants a JSON object, got {text!r} ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"wants a JSON object like '{{\"key\": 1}}', got {text!r}")
    return FrozenMap(value)


def one_of(choices: tuple[object, ...]) -> Converter:
    """A converter that accepts exactly the given words (or whole numbers)."""
    by_text = {str(choice): choice for choice in choices}

    def convert(text: str) -> object:
        if text not in by_text:
            raise ValueError(f"wants one of {', '.join(by_text)}, got {text!r}")
        return by_text[text]

    convert.choices = choices  # type: ignore[attr-defined]
    return convert


SCALARS: Mapping[object, Converter] = {int: to_int, float: to_float, str: str, bool: to_bool}


def _bare(hint: object) -> object:
    """The annotation without `| None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return inner[0] if len(inner) == 1 else str
    return hint


def _converter_for(hint: object) -> tuple[Converter, int | str]:
    bare = _bare(hint)
    origin = typing.get_origin(bare)
    if origin is Literal:
        return one_of(typing.get_args(bare)), 1
    if origin is tuple:
        args = typing.get_args(bare)
        return SCALARS[args[0]], "one or more" if args[-1] is Ellipsis else len(args)
    if origin in (Mapping, dict) or bare in (Mapping, dict):
        return to_json_object, 1
    if bare in SCALARS:
        return SCALARS[bare], 1
    raise AssertionError(f"no flag type for annotation {hint!r}")


def flags_of(section: str, cls: type) -> Iterator[Flag]:
    """The flags that a section's fields declare."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if item.metadata.get("derived"):
            continue
        meta = item.metadata.get("flag", {})
        names = meta.get("names") or ("--" + item.name.replace("_", "-"),)
        later = meta.get("later", "")
        if meta.get("off"):
            yield Flag(meta["off"], item.name, section, to_bool, 0, switch_value=False, later=later)
            continue
        hint = hints[item.name]
        if _bare(hint) is bool and meta.get("convert") is None:
            for name in names:
                yield Flag(name, item.name, section, to_bool, 0, later=later, optional=hint is not bool)
            if hint is not bool:  # bool | None: absence means "derive it", so both answers need a flag
                yield Flag("--no-" + names[0][2:], item.name, section, to_bool, 0, switch_value=False, later=later)
            continue
        convert, count = _converter_for(hint) if meta.get("convert") is None else (meta["convert"], 1)
        convert = within(convert, meta.get("range", Range()))
        count = meta.get("values") or count
        for name in names:
            yield Flag(
                name, item.name, section, convert, 1 if meta.get("append") else count, append=meta.get("append", False),
                later=later, later_values=meta.get("later_values", ()), optional=hint != _bare(hint),
            )  # fmt: skip


def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the string literal written under it. Reads the source: only the help listing pays for that."""
    tree = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for before, node in zip(tree.body, tree.body[1:], strict=False):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if is_text and isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name):
            docs[before.target.id] = " ".join(node.value.value.split())
    return docs
