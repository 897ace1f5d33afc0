"""From the words of a command line to a Config."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from slime.config.attributes import attribute_rows, from_yaml
from slime.config.command_line import SECTIONS, CommandLine, parse_words
from slime.config.config import Config
from slime.config.errors import ConfigError, load_yaml, nearest
from slime.config.facts import Facts, facts_of
from slime.config.flags import Flag, FrozenMap, field_default
from slime.config.resolve import MAPPINGS, resolve
from slime.config.roles import apply_roles
from slime.config.rules import Values

Door = Literal["train", "convert", "rehearse"]


def parse(
    argv: Sequence[str], *, door: Door = "train", facts: Facts | None = None, env: Mapping[str, str] | None = None
) -> Config:
    """The configuration that `argv` means, or a ConfigError (a ValueError) that lists what is wrong.

    "train" takes every flag, "convert" those of model, parallel and checkpoint, "rehearse" is "train" on a machine where the
    run's files need not exist. `facts` replaces what would be read from the disk; env: the job's environment, or None.
    """
    words = parse_words(argv, door=door)
    start = starting_values(words)
    notes = apply_yaml(start, words) + apply_roles(start)
    facts = facts or facts_of(start)
    final = resolve(start, given=words.given, door=door, facts=facts, env=env)
    return build(final, notes=(*notes, *final.notes), door=door)


def load(argv: Sequence[str], *, door: Door = "train", env: Mapping[str, str] | None = None) -> Config:
    """`parse()` for programs: a mistake goes to stderr, one line each, and the program ends with status 2."""
    if "--help" in argv or "-h" in argv:
        from slime.config.help import listing

        sys.stdout.write(listing(door=door))
        raise SystemExit(0)
    try:
        return parse(argv, door=door, env=env)
    except ConfigError as error:
        sys.stderr.write(
            "".join(f"slime: {line}\n" if not line.startswith(" ") else f"{line}\n" for line in str(error).split("\n"))
        )
        raise SystemExit(2) from None


def starting_values(words: CommandLine) -> dict[str, Any]:
    """Each attribute's word, or its default."""
    values: dict[str, Any] = {}
    for section, cls in SECTIONS.items():
        for item in dataclasses.fields(cls):
            values[f"{section}.{item.name}" if item.name in ("megatron", "ddp") else item.name] = field_default(item)
    values.update(words.given)
    values.update({name: dict(words.megatron[name]) for name in MAPPINGS})
    values.update(sglang=FrozenMap(words.sglang), router=FrozenMap(words.router))
    return values


def apply_yaml(start: dict[str, Any], words: CommandLine) -> list[str]:
    """--custom-config-path wins over flags, and before anything is derived from them. Unknown keys are refused."""
    file = words.given.get("custom_config_path")
    if file is None:
        return []
    content = load_yaml(str(file), flag="--custom-config-path")
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: the top must be a mapping of attributes, found {type(content).__name__}")
    rows = attribute_rows()
    notes, mistakes, unknown = [], [], []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name == "custom":
            start["custom"] = _own_settings(value, rows, file=str(file))
        elif name not in rows:
            unknown.append(key)
        else:
            row = rows[name]
            try:
                converted = from_yaml(row, value)
            except ValueError as error:
                mistakes.append(f"{file}: {key}: {error}")
                continue
            target = start[row.section] if "." in row.section else start
            notes.append(f"{row.dest} = {converted!r}, because {file} says so")
            target[row.dest] = converted
    if unknown:
        said = ", ".join(f"{key!r}{nearest(str(key).replace('-', '_'), rows)}" for key in unknown)
        mistakes.append(
            f"{file}: unknown {'keys' if len(unknown) > 1 else 'key'} {said}; the top holds flags: move what a plugin alone "
            f"reads under 'custom:' (custom: {{{unknown[0]}: ...}}), it is args.{unknown[0]} all the same"
        )
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return notes


def _own_settings(value: object, rows: Mapping[str, Flag], *, file: str) -> FrozenMap:
    """What `custom:` holds. Raises ConfigError where a key is a flag's: plugins would see the flag instead."""
    if not isinstance(value := {} if value is None else value, dict):
        raise ConfigError(f"{file}: 'custom' must be a mapping of a plugin's own settings, found {value!r}")
    own = {str(key).replace("-", "_"): one for key, one in value.items()}
    flags = [name for name in own if name in rows]
    if flags:
        raise ConfigError(f"{file}: custom: {', '.join(flags)}: a flag of this name exists; move it to the top of the file")
    return FrozenMap(own)


def build(values: Values, *, notes: tuple[str, ...], door: str) -> Config:
    """The frozen configuration of final values."""
    sections = {}
    for section, cls in SECTIONS.items():
        kept = {}
        for item in dataclasses.fields(cls):
            key = f"{section}.{item.name}" if item.name in ("megatron", "ddp") else item.name
            value = values[key]
            kept[item.name] = FrozenMap(value) if isinstance(value, dict) and not isinstance(value, FrozenMap) else value
        sections[section] = cls(**kept)
    return Config(**sections, notes=notes, door=door)
