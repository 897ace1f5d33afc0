"""Functions that flags name by a dotted path: looked up in the sources, because importing them may need torch or a GPU."""

from __future__ import annotations

import ast
import sys
from dataclasses import fields
from pathlib import Path

from slime.config.config import Config
from slime.rehearse.findings import Findings

FILES = ("megatron_config_path",)
"""Flags of this ending that name a file."""


def check_plugins(config: Config, findings: Findings) -> None:
    """--spec and every *_path flag that names a function or class: module and name must exist where the package can be seen."""
    named = [
        (f"--{field.name.replace('_', '-')}", path)
        for section in (config.model, config.data, config.rollout, config.algorithm, config.evaluation, config.tracking)
        for field in fields(section)
        if field.name.endswith("_path") and field.name not in FILES
        for path in _said(getattr(section, field.name))
    ]
    named += [("--spec", ".".join(config.model.spec))] if config.model.spec else []
    seen, unseen = 0, []
    for flag, path in named:
        if "." not in path:
            findings.violation("files", f"{flag} {path} is no dotted path of a function", "", "write package.module.function")
            continue
        module, _, name = path.rpartition(".")
        source = _source_of(module)
        if source is None and _source_of(module.partition(".")[0]) is not None:
            findings.violation("files", f"{flag} {path}: there is no module {module}", "", "correct the path")
        elif source is None:
            unseen.append(f"{flag} {path}")
        elif not _defines(source, name):
            findings.violation("files", f"{flag} {path}: {source} defines no {name}", "", "correct the name, or the module")
        else:
            seen += 1
    if seen:
        findings.ok("files", "functions that flags name are in their modules", f"{seen} flags")
    for words in unseen:
        findings.unchecked("files", f"{words}: the module is not on this machine's PYTHONPATH")


def _said(value: object) -> tuple[str, ...]:
    """Of a flag that is given once or several times."""
    return value if isinstance(value, tuple) else (value,) if isinstance(value, str) else ()


def _source_of(module: str) -> Path | None:
    """The file of a module, found without importing anything."""
    parts = module.split(".")
    for folder in (Path(entry or ".") for entry in sys.path):
        for file in (folder.joinpath(*parts).with_suffix(".py"), folder.joinpath(*parts, "__init__.py")):
            if file.is_file():
                return file
    return None


def _defines(source: Path, name: str) -> bool:
    """Does the module bind `name` anywhere? A star import leaves that open, so it counts."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == name:
            return True
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if any((alias.asname or alias.name.partition(".")[0]) == name or alias.name == "*" for alias in node.names):
                return True
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == name:
            return True
    return False
