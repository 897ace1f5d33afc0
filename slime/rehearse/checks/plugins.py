"""Functions that flags name by a dotted path: looked up in the sources, because importing them may need torch or a GPU."""

from __future__ import annotations

import ast
import sys
from dataclasses import fields
from inspect import Parameter, Signature
from pathlib import Path

from slime.config.config import Config
from slime.config.dotted import Call, does_not_take
from slime.rehearse.findings import Findings
from slime.rollout import plugins
from slime.training import hooks

FILES = ("megatron_config_path",)
"""Flags of this ending that name a file."""
CALLS: dict[str, Call] = {**plugins.CALLS, **hooks.CALLS, "--custom-model-provider-path": hooks.PROVIDER}


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
    named += [
        (f"evaluation {one.name}: {name}", path)
        for one in config.evaluation.datasets
        for name in ("custom_rm_path", "custom_generate_function_path")
        if (path := getattr(one, name)) is not None and path != getattr(config.rollout, name, None)
    ]
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
        elif problem := _call_problem(source, name, CALLS.get(_as_flag(flag))):
            findings.violation(
                "files", f"{flag} {path}: {problem}", str(source), "give it the arguments that it is called with"
            )
        else:
            seen += 1
    if seen:
        findings.ok("files", "functions that flags name are in their modules", f"{seen} flags")
    for words in unseen:
        findings.unchecked("files", f"{words}: the module is not on this machine's PYTHONPATH")


def _as_flag(where: str) -> str:
    """`evaluation a: custom_rm_path` is called as --custom-rm-path is."""
    return "--" + where.rpartition(": ")[2].removeprefix("--").replace("_", "-")


def _call_problem(source: Path, name: str, call: Call | None) -> str:
    """Why the function cannot be called as its flag does; empty where it can, or where its source does not say (a class, a
    decorated function, an imported name)."""
    found = [node for node in ast.parse(source.read_text()).body if getattr(node, "name", None) == name]
    if (
        call is None
        or not found
        or not isinstance(found[-1], ast.FunctionDef | ast.AsyncFunctionDef)
        or found[-1].decorator_list
    ):
        return ""
    signature, is_async = _signature(found[-1].args), isinstance(found[-1], ast.AsyncFunctionDef)
    if problem := does_not_take(signature, call):
        return f"found {name}{signature} ({problem}); expected {call.shown}"
    if call.is_async is not None and call.is_async != is_async:
        return f"found {'an async' if is_async else 'a plain'} function; expected {call.shown}"
    return ""


def _signature(args: ast.arguments) -> Signature:
    """Names, kinds and which have a default; what the default is does not matter."""
    placed = [(one, Parameter.POSITIONAL_ONLY) for one in args.posonlyargs]
    placed += [(one, Parameter.POSITIONAL_OR_KEYWORD) for one in args.args]
    defaults = [Parameter.empty] * (len(placed) - len(args.defaults)) + [...] * len(args.defaults)
    made = [Parameter(one.arg, kind, default=default) for (one, kind), default in zip(placed, defaults, strict=True)]
    made += [Parameter(args.vararg.arg, Parameter.VAR_POSITIONAL)] if args.vararg else []
    made += [
        Parameter(one.arg, Parameter.KEYWORD_ONLY, default=Parameter.empty if default is None else ...)
        for one, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    return Signature(made + ([Parameter(args.kwarg.arg, Parameter.VAR_KEYWORD)] if args.kwarg else []))


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
