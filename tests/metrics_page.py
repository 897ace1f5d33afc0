"""The metrics that docs/en/get_started/metrics.md lists."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "en" / "get_started" / "metrics.md"


def pattern(name: str) -> str:
    """A metric's name with {} for every part that a run fills in."""
    return re.sub(r"\{\w*\}", "{}", name)


def listed() -> list[str]:
    """Metrics of the tables, those of {mean,median,max,min} one by one."""
    names = re.findall(r"^\| `([\w{},@/-]+)` \| [^|]+ \| [^|]+ \|", PAGE.read_text(), flags=re.MULTILINE)
    found = []
    for name in names:
        choices = re.search(r"\{(\w+(?:,\w+)+)\}", name)
        options = choices.group(1).split(",") if choices else [""]
        found += [pattern(name.replace(choices.group(0), option) if choices else name) for option in options]
    return found


def not_listed(names: Iterable[str]) -> list[str]:
    """Those of the metrics of a run that no row of the page covers."""
    rows = [re.compile(re.escape(row).replace(re.escape("{}"), "[^/]+")) for row in listed()]
    return sorted(name for name in names if not any(row.fullmatch(name) for row in rows))
