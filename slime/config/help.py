"""The listing of all flags, grouped by section: `python -m slime.config.help`, or `--help` at any door."""

from __future__ import annotations

import dataclasses
import sys

from slime.config.command_line import CONVERT_SECTIONS, SECTIONS, flag_table
from slime.config.flags import Flag, field_default, field_docs


def listing(*, door: str = "train") -> str:
    """Every flag with its values, default and meaning; flags of later versions are marked."""
    lines = [
        "Flags. --sglang-<argument> and --router-<argument> go to the SGLang server and router under their own names.",
        "",
    ]
    for section, cls in SECTIONS.items():
        if door == "convert" and section not in CONVERT_SECTIONS:
            continue
        docs = field_docs(cls)
        defaults = {item.name: field_default(item) for item in dataclasses.fields(cls)}
        lines.append(f"{section}: {(cls.__doc__ or '').splitlines()[0]}")
        for row in flag_table().values():
            if row.section == section:
                lines.append(
                    f"  {_usage(row):<52} {docs.get(row.dest, '')}{_default(row, defaults.get(row.dest))}{_later(row)}"
                )
        lines.append("")
    for title, section in (
        ("megatron-core's TransformerConfig", "model.megatron"),
        ("megatron-core's OptimizerConfig", "optimizer.megatron"),
        ("megatron-core's DistributedDataParallelConfig", "optimizer.ddp"),
    ):
        if door == "convert" and section != "model.megatron":
            continue
        lines.append(f"{title}: passed on under these field names")
        for row in flag_table().values():
            if row.section == section and not (row.num_values == 0 and row.name.startswith("--no-")):
                lines.append(f"  {_usage(row):<52} {row.dest}{_later(row)}")
        lines.append("")
    return "\n".join(lines)


def _usage(row: Flag) -> str:
    if row.num_values == 0:
        return row.name
    choices = getattr(row.convert, "choices", None)
    word = "{" + ",".join(map(str, choices)) + "}" if choices else row.dest.upper().rsplit("_", 1)[-1]
    return f"{row.name} {word} ..." if row.num_values == "one or more" else " ".join([row.name, *[word] * int(row.num_values)])


def _default(row: Flag, default: object) -> str:
    return "" if row.num_values == 0 or default in (None, (), {}) else f" [{default}]"


def _later(row: Flag) -> str:
    if row.later:
        return "  (not in this version)"
    return f"  (not in this version: {', '.join(map(str, row.later_values))})" if row.later_values else ""


if __name__ == "__main__":
    sys.stdout.write(listing())
