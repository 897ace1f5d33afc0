"""A flag that is accepted is read somewhere: an ignored setting is a wrong run that looks right."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

from readers import FOR_PLUGINS, SPENT, accepted, read_by_attribute, read_by_rules

from slime.config.command_line import SECTIONS
from slime.config.config import SECTION_NAMES

ROOT = Path(__file__).resolve().parents[2]


def test_every_accepted_flag_is_read_by_attribute_in_a_run_or_spent_before():
    """What two whole runs read is recorded in tests/e2e/test_what_is_read.py."""
    fields = set(accepted())
    assert {"data.rollout_batch_size", "cluster.offload_train"} <= read_by_attribute()
    ignored = fields - read_by_attribute() - SPENT - FOR_PLUGINS
    assert ignored == set(), "implement these flags or refuse them with flag(..., later='what is missing')"
    assert (SPENT | FOR_PLUGINS) - fields == set()
    assert {name.partition(".")[2] for name in SPENT} - read_by_rules() == set(), "no rule takes their value"


def test_no_room_reads_a_setting_that_does_not_exist():
    fields = {section: {item.name for item in dataclasses.fields(cls)} for section, cls in SECTIONS.items()}
    pattern = re.compile(rf"\bconfig\.({'|'.join(SECTION_NAMES)})\.(\w+)")
    wrong = [
        f"{file.relative_to(ROOT)}: config.{section}.{name}"
        for folder in ("slime", "slime_plugins", "tools")
        for file in (ROOT / folder).rglob("*.py")
        for section, name in pattern.findall(file.read_text())
        if name not in fields[section]
    ]
    assert wrong == []


def test_no_room_reads_a_missing_setting_through_a_short_name():
    """`rules = config.optimizer` ... `rules.lrr`: the attribute behind a local name is checked too."""
    properties = {section: {name for name in dir(cls) if not name.startswith("_")} for section, cls in SECTIONS.items()}
    fields = {
        section: {item.name for item in dataclasses.fields(cls)} | properties[section] for section, cls in SECTIONS.items()
    }
    wrong = []
    for folder in ("slime", "slime_plugins", "tools"):
        for file in (ROOT / folder).rglob("*.py"):
            for function in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)):
                wrong += [f"{file.relative_to(ROOT)}: {found}" for found in _missing_attributes(function, fields)]
    assert wrong == []


def _missing_attributes(function: ast.FunctionDef, fields: dict[str, set[str]]) -> list[str]:
    short: dict[str, str] = {}
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign) or len(node.targets) != 1:
            continue
        target = node.targets[0]
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        values = node.value.elts if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple) else [node.value]
        if len(names) == len(values):
            for name, value in zip(names, values, strict=True):
                match = re.fullmatch(r"(?:self\.)?_?config\.(\w+)", ast.unparse(value))
                if isinstance(name, ast.Name) and match and match.group(1) in fields:
                    short[name.id] = match.group(1)
    stored = [node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    short = {name: section for name, section in short.items() if stored.count(name) == 1}  # else it may be something else there
    return [
        f"{node.value.id}.{node.attr} (config.{short[node.value.id]})"
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in short
        if node.attr not in fields[short[node.value.id]]
    ]
