"""Options of the router: every --router-* name, its type and its choices."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from slime.config.errors import nearest

if TYPE_CHECKING:
    from slime.config.rules.book import Values

TABLE = Path(__file__).parents[1] / "router_options.json"


@functools.lru_cache(maxsize=1)
def router_options() -> Mapping[str, Mapping[str, object]]:
    """Name -> kind, type and choices, as the pinned sglang-router's parser has them (and two policies that it hides)."""
    return json.loads(TABLE.read_text())["options"]


def joined(v: Values) -> None:
    """A router that somebody else runs."""
    if v["sglang_router_ip"] is None:
        return
    v.require(
        v["sglang_router_port"] is not None,
        f"--sglang-router-ip {v['sglang_router_ip']} is the address of a router that already runs, and its port is not said; "
        "add --sglang-router-port",
    )
    v.require(
        not v["router"],
        "--router-* options are for a router that the run starts, and --sglang-router-ip names one that already runs; leave "
        f"--router-{next(iter(v['router']), '').replace('_', '-')} out",
    )


def options(v: Values) -> None:
    for name, value in v["router"].items():
        flag, row = "--router-" + name.replace("_", "-"), router_options().get(name)
        if row is None:
            known = {"--router-" + one.replace("_", "-"): one for one in router_options()}
            v.mistakes.append(f"unknown flag {flag}{nearest(flag, known) or '; the router has no such option'}")
            continue
        if row["kind"] == "flag":
            v.require(value is True, f"{flag} is a switch and takes no value, got {value!r}; leave the value out")
            continue
        if not v.require(value is not True, f"{flag} wants a value; give one"):
            continue
        choices = row["choices"]
        if choices:
            hint = nearest(str(value), choices)
            v.require(value in choices, f"{flag} wants one of {', '.join(choices)}, got {value!r}{hint or '; choose one'}")
        elif row["type"] in ("int", "float"):
            v.require(
                _is_number(str(value), str(row["type"])), f"{flag} wants a number ({row['type']}), got {value!r}; give one"
            )


def _is_number(text: str, kind: str) -> bool:
    try:
        return all({"int": int, "float": float}[kind](word) is not None for word in text.split())
    except ValueError:
        return False
