"""The stored table of megatron-core's config fields, so that flags can be parsed where megatron-core is not installed.

    python -m slime.config.megatron_table            # compare the table with the installed package
    python -m slime.config.megatron_table --write    # write it anew (after an upgrade)

The installed sources are read as text (ast): neither torch nor megatron is imported.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import re
import sys
from pathlib import Path

from slime.config.expressions import evaluate

TABLE = Path(__file__).with_name("megatron_fields.json")
SOURCES = {
    "ModelParallelConfig": "model_parallel_config.py",
    "TransformerConfig": "transformer/transformer_config.py",
    "MLATransformerConfig": "transformer/transformer_config.py",
    "OptimizerConfig": "optimizer/optimizer_config.py",
    "DistributedDataParallelConfig": "distributed/distributed_data_parallel_config.py",
}

Table = dict[str, dict[str, dict[str, object]]]


@functools.lru_cache(maxsize=1)
def read_table() -> Table:
    """Class -> field -> {"type": annotation, "default": value, or the source text in <> where it is no literal}."""
    return json.loads(TABLE.read_text())["classes"]


def installed_table() -> tuple[str, Table]:
    """(version, table) of the installed megatron-core. Raises ModuleNotFoundError where there is none."""
    found = importlib.util.find_spec("megatron")
    folders = [Path(place) / "core" for place in (found.submodule_search_locations or [])] if found else []
    root = next((folder for folder in folders if (folder / "model_parallel_config.py").exists()), None)
    if root is None:
        raise ModuleNotFoundError("megatron-core is not installed")
    version = _version(root / "package_info.py")
    trees = {file: ast.parse((root / file).read_text()) for file in set(SOURCES.values())}
    return version, {name: _fields_of(trees[file], name) for name, file in SOURCES.items()}


def _version(file: Path) -> str:
    numbers = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Constant)
    }
    return f"{numbers['MAJOR']}.{numbers['MINOR']}.{numbers['PATCH']}"


def _fields_of(tree: ast.Module, name: str) -> dict[str, dict[str, object]]:
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    rows: dict[str, dict[str, object]] = {}
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_"):
            rows[node.target.id] = {
                "type": re.sub(r"\s+", " ", ast.unparse(node.annotation)),
                "default": _default_of(node.value),
            }
    return rows


def _default_of(node: ast.expr | None) -> object:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "field":
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        return _default_of(keywords["default"]) if "default" in keywords else "<factory>"
    if node is None:
        return "<required>"
    for read in (ast.literal_eval, lambda value: evaluate(ast.unparse(value))):
        try:
            return read(node)
        except ValueError:
            continue
    return f"<{ast.unparse(node)}>"


def differences(old: Table, new: Table) -> list[str]:
    """One line per field that came, went or changed its type or default."""
    lines = []
    for cls in sorted(old.keys() | new.keys()):
        before, after = old.get(cls, {}), new.get(cls, {})
        for name in sorted(before.keys() | after.keys()):
            if name not in after:
                lines.append(f"{cls}.{name}: in the table, not in the package")
            elif name not in before:
                lines.append(f"{cls}.{name}: in the package, not in the table")
            elif (before[name]["type"], before[name]["default"]) != (after[name]["type"], after[name]["default"]):
                lines.append(f"{cls}.{name}: table {before[name]['type']} = {before[name]['default']!r}, "
                             f"package {after[name]['type']} = {after[name]['default']!r}")  # fmt: skip
    return lines


def _compact(version: str, table: Table) -> str:
    rows = [
        f"  {json.dumps(cls)}: {{\n"
        + ",\n".join(f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in fields.items())
        + "\n  }"
        for cls, fields in table.items()
    ]
    return f'{{\n "megatron_core": {json.dumps(version)},\n "classes": {{\n' + ",\n".join(rows) + "\n }\n}\n"


def main(argv: list[str]) -> int:
    version, table = installed_table()
    if argv == ["--write"]:
        TABLE.write_text(_compact(version, table))
        sys.stdout.write(f"{TABLE.name}: megatron-core {version}, {sum(map(len, table.values()))} fields\n")
        return 0
    if argv:
        sys.stderr.write("usage: python -m slime.config.megatron_table [--write]\n")
        return 2
    lines = differences(read_table(), table)
    sys.stdout.write("\n".join(lines or [f"the table agrees with megatron-core {version}"]) + "\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
