"""Attributes as YAML files name them: flags with underscores, with the types and ranges of the flags."""

from __future__ import annotations

import json
from collections.abc import Mapping

from slime.config.command_line import SECTIONS, convert_word, flag_table
from slime.config.flags import Flag, FrozenMap
from slime.config.resolve import MAPPINGS


def attribute_rows() -> dict[str, Flag]:
    """Every attribute that a file can set -> its flag."""
    rows: dict[str, Flag] = {row.dest: row for row in flag_table().values() if row.section in (*SECTIONS, *MAPPINGS)}
    rows.update(
        {name[2:].replace("-", "_"): row for name, row in flag_table().items() if "." in row.section and row.num_values != 0}
    )
    return rows


def from_yaml(row: Flag, value: object) -> object:
    """A YAML value as the flag's type; text is read as the command line would read it (YAML takes 1e-5 for text).

    Raises ValueError for a value that the flag would refuse, or a flag that this version does not have.
    """
    if row.later:
        raise ValueError(f"this version does not have {row.later}; remove the key")
    if value is None:
        if not row.optional:
            raise ValueError("wants a value, got null")
        return None
    if row.num_values == 0:
        if not isinstance(value, bool):
            raise ValueError(f"wants true or false, got {value!r}")
        return value
    if isinstance(value, Mapping):
        made = convert_word(row, json.dumps(value, default=str))
        if not isinstance(made, FrozenMap):
            raise ValueError(f"wants one value, got the mapping {value!r}")
        return made
    if isinstance(value, list) and row.num_values == 1 and not row.append:
        return convert_word(row, str(value).replace("'", ""))
    if isinstance(value, list):
        return tuple(convert_word(row, str(one)) for one in value)
    one = convert_word(row, str(value))
    return (one,) if row.num_values != 1 or row.append else one
