"""What a constructor refuses about a flag, the rule book refuses before anything is started.

A `raise ValueError` of a room above the config that names a flag is either about a flag with a rule (its name stands in
slime/config), with a declared range or choices, or about what only the machine, a file or a plugin can show.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from slime.config.command_line import flag_table

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("training", "ray", "weights", "engine", "model", "rollout", "parallel", "batch")
FLAG = re.compile(r"--[a-z][a-z0-9-]+[a-z0-9]")

SEEN_LATER = {
    "--no-load-optim": "whether the checkpoint holds an optimizer",
    "--no-save-optim": "the same",
    "--rehearsed": "the report's content, and the weights that are really sent",
    "--rollout-sample-hook-path": "what the hook returned",
    "--log-reward-category": "what the rewards hold",
    "--data-source-path": "what the named class is",
    "--custom-convert-samples-to-train-data-path": "what the function returned",
    "--custom-reward-post-process-path": "what the function returned",
}
"""Flag -> what cannot be known before."""


def texts(node: ast.AST) -> Iterator[str]:
    for one in ast.walk(node):
        if isinstance(one, ast.Constant) and isinstance(one.value, str):
            yield one.value


def refusals() -> Iterator[tuple[str, set[str]]]:
    """(place, flags that the message names) of every `raise ValueError(...)` that names one."""
    for file in sorted(file for room in ROOMS for file in (ROOT / "slime" / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) == "ValueError":
                if flags := set(FLAG.findall(" ".join(texts(node.exc)))) & flag_table().keys():
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", flags


def test_what_a_constructor_says_of_a_flag_has_been_said_before() -> None:
    told: set[str] = set()
    for file in (ROOT / "slime" / "config").rglob("*.py"):
        told |= {flag for text in texts(ast.parse(file.read_text())) for flag in FLAG.findall(text)}
    declared = {
        row.name
        for row in flag_table().values()
        if row.later or hasattr(row.convert, "choices") or str(getattr(row.convert, "bounds", ""))
    }
    found = list(refusals())
    assert len(found) > 60
    first = [(place, sorted(flags)) for place, flags in found if not flags & (told | declared | SEEN_LATER.keys())]
    assert first == [], "write a rule (slime/config/rules), declare a range, or say in SEEN_LATER what only the run can know"
