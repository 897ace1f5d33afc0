"""docs/en/developer_guide/compat.md lists the corrections that the code makes, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from slime.compat.megatron import NEWEST, OLDEST
from slime.compat.megatron.guards import GUARDS, Version

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "en" / "developer_guide" / "compat.md").read_text()


def section(title: str) -> list[list[str]]:
    """The cells of the table rows below a heading, without code marks."""
    text = re.split(r"^## ", PAGE.split(f"## {title}\n")[1], flags=re.MULTILINE)[0]
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in rows]


def short(version: Version) -> str:
    return ".".join(map(str, version[:2]))


def test_the_corrections_of_megatron_core_are_those_of_the_code():
    wanted = [
        [
            f"`{guard.name}`",
            "CPU" if guard.host_only else "all",
            f"{short(guard.first)} to {short(guard.last)}",
            f"`{guard.place}`",
            guard.reason,
            f"`{guard.test}`",
        ]
        for guard in GUARDS
    ]
    assert section("megatron-core") == wanted, "\n".join(f"| {' | '.join(row)} |" for row in wanted)
    assert f"{'.'.join(map(str, OLDEST))} is the oldest, {short(NEWEST)} the newest" in PAGE


def test_the_corrections_of_sglang_are_those_of_the_code():
    source = (ROOT / "slime" / "compat" / "sglang" / "shims" / "sitecustomize.py").read_text()
    table = [line for line in ast.get_docstring(ast.parse(source)).splitlines() if line.startswith("| ")][1:]
    wanted = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
    assert [[row[0].strip("`"), *row[1:]] for row in section("SGLang, on a CPU only")] == wanted, "\n".join(table)
    names = {row[0] for row in wanted}
    switched = set(re.findall(r'"(\w+)" not in _OFF', source)) | set(
        re.findall(r'^    "[\w.]+": \("(\w+)", _', source, flags=re.M)
    )
    stand_ins = set(re.findall(r'"(\w+)"', re.search(r"_STAND_INS = \{(.*)\}", source).group(1)))
    assert names == switched | stand_ins
