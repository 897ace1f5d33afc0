"""What differs between versions of SGLang. Nothing else in the project knows.

Users write option names of any supported version (slime's launchers: 0.5.12 spellings); `translate` gives the names of
the version at hand, `typed_argv` checks names, types and choices against that version's own option table. Tables of
the supported versions are stored in `options/` (written by `python -m slime.engine.describe`), so a machine without
SGLang can check a launcher; another version's table is asked from its parser.
"""

from __future__ import annotations

import difflib
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from slime.config.engine_sizes import SUCCESSORS

TABLES = Path(__file__).resolve().parent / "options"

_DSA_VALUES = {("attention_backend", "nsa"): "dsa", ("speculative_draft_attention_backend", "nsa"): "dsa"}


@dataclass(frozen=True)
class Capabilities:
    """One column of the version table."""

    version: str
    renames: Mapping[str, str | None] = field(default_factory=dict)
    """old name -> name in this version; an option that disappeared without a successor maps to None"""
    value_renames: Mapping[tuple[str, str], str] = field(default_factory=dict)
    attention_dp_option: str | None = None
    """set: `dp_size N` with `enable_dp_attention` becomes this option (there, dp_size alone means replicas)"""
    broadcast_reaches_draft: bool = False
    """/update_weights_from_distributed loads the draft model too"""
    index_cache_where_computed: bool = False
    """the indexer's keys are cached in the layers that compute a selection of their own alone; before, in every layer"""
    fused_experts_on_load: bool = False
    """3-D expert tensors are accepted by weight updates"""
    cpu_engine: bool = False
    """slime.compat.sglang knows how to run it without CUDA"""


TABLE = (
    Capabilities(
        "0.5.15.post1",
        renames={**SUCCESSORS, "prefill_round_robin_balance": None},
        value_renames=_DSA_VALUES,
    ),
    Capabilities(
        "0.5.17",
        renames={**SUCCESSORS, "prefill_round_robin_balance": None},
        value_renames=_DSA_VALUES,
        fused_experts_on_load=True,
    ),
    Capabilities(
        "0.5.23",
        renames={
            **SUCCESSORS,
            "prefill_round_robin_balance": None,
            "stream_output": "incremental_streaming_output",
            "mamba_scheduler_strategy": "mamba_radix_cache_strategy",
            "speculative_dflash_draft_window_size": "speculative_draft_window_size",
        },
        value_renames=_DSA_VALUES,
        attention_dp_option="attn_dp_size",
        broadcast_reaches_draft=True,
        index_cache_where_computed=True,
        fused_experts_on_load=True,
        cpu_engine=True,
    ),
)
OLDEST = TABLE[0].version  # the first that gets GLM-5.2's index sharing right


def release_key(text: str) -> tuple[int, ...]:
    """'0.5.15.post1' -> (0, 5, 15, 1), for comparing."""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0]))


def capabilities(found: str) -> Capabilities:
    """The column for a version: its own, or that of the newest table entry below it.

    Raises ValueError for versions below the oldest, which compute indices on the wrong layers of GLM-5.2.
    """
    below = [column for column in TABLE if release_key(column.version) <= release_key(found)]
    if not below:
        raise ValueError(
            f"sglang {found} is installed; GLM-5.2's shared indices are right from {OLDEST} on: pip install 'sglang>={OLDEST}'"
        )
    return below[-1]


def installed_version() -> str:
    try:
        return version("sglang")
    except PackageNotFoundError:
        raise ValueError("sglang is not installed in this environment; run scripts/setup.sh (extras: cpu or gpu)") from None


CONSTRAINTS = Path(__file__).resolve().parents[2] / "scripts" / "constraints" / "gpu.txt"


def pinned_version(constraints: Path = CONSTRAINTS) -> str | None:
    """The SGLang that scripts/setup.sh installs on a GPU machine; None where the scripts are not there."""
    if not constraints.is_file():
        return None
    found = re.search(r"^sglang==(\S+)", constraints.read_text(), re.MULTILINE)
    return found.group(1) if found else None


@dataclass(frozen=True)
class Option:
    name: str
    flags: tuple[str, ...]
    kind: str
    """flag (present or absent), switch (--x / --no-x), value, list"""
    type: str
    choices: tuple[str, ...] | None


@dataclass(frozen=True)
class OptionTable:
    """All options of one SGLang version."""

    version: str
    options: tuple[Option, ...]

    def find(self, name: str) -> Option:
        """By field name or by any spelling of the flag. Raises ValueError with the nearest name."""
        wanted = name.replace("-", "_").lstrip("_")
        by_name = self._names()
        if wanted not in by_name:
            near = difflib.get_close_matches(wanted, by_name, n=2, cutoff=0.75)
            hint = f"; nearest: {', '.join('--sglang-' + n.replace('_', '-') for n in near)}" if near else ""
            raise ValueError(f"--sglang-{wanted.replace('_', '-')}: sglang {self.version} has no such option{hint}")
        return by_name[wanted]

    def _names(self) -> dict[str, Option]:
        # Retired spellings share their successor's field: a field's name means the option that is spelled like it.
        names: dict[str, Option] = {}
        for option in self.options:
            for flag in option.flags:
                names[flag.lstrip("-").replace("-", "_")] = option
        for option in self.options:
            names.setdefault(option.name, option)
        return names


def read_table(text: str) -> OptionTable:
    raw = json.loads(text)
    rows = (
        Option(row["name"], tuple(row["flags"]), row["kind"], row["type"], tuple(row["choices"]) if row["choices"] else None)
        for row in raw["options"]
    )
    return OptionTable(raw["version"], tuple(rows))


@lru_cache(maxsize=8)
def option_table(found: str | None = None) -> OptionTable:
    """The stored table of a version (None: the installed one), or the installed parser's own answer."""
    wanted = found or installed_version()
    stored = TABLES / f"sglang-{wanted}.json"
    if stored.exists():
        return read_table(stored.read_text())
    if wanted != installed_version():
        raise ValueError(f"no option table of sglang {wanted} is stored, and {installed_version()} is installed")
    return installed_options()


def installed_options(env: Mapping[str, str] | None = None) -> OptionTable:
    """Ask the installed SGLang's parser, in a child process: importing SGLang here would take 5 s and patch torch."""
    answer = subprocess.run(
        [sys.executable, "-m", "slime.engine.describe"],
        env=None if env is None else dict(env),
        capture_output=True,
        text=True,
        timeout=120,
    )
    if answer.returncode != 0:
        raise ValueError(f"sglang {installed_version()} cannot be imported:\n{answer.stderr[-1500:]}")
    return read_table(answer.stdout)


@dataclass(frozen=True)
class Translation:
    settings: dict[str, object]
    notes: tuple[str, ...]
    """one line per renamed or dropped option"""


def translate(settings: Mapping[str, object], column: Capabilities) -> Translation:
    """Settings under any supported version's names -> this version's, with a note per change."""
    out: dict[str, object] = {}
    notes = []
    for raw_name, value in settings.items():
        name = raw_name.replace("-", "_")
        if name in column.renames:
            successor = column.renames[name]
            if successor is None:
                notes.append(f"sglang {column.version}: {name} is dropped, it does nothing there")
                continue
            if successor in settings:
                raise ValueError(f"{name} is {value!r} and its successor {successor} is {settings[successor]!r}; keep one")
            notes.append(f"sglang {column.version}: {name} is called {successor}")
            name = successor
        renamed = column.value_renames.get((name, value)) if isinstance(value, str) else None
        if renamed is not None:
            notes.append(f"sglang {column.version}: {name} {value} is called {renamed}")
        out[name] = value if renamed is None else renamed
    if column.attention_dp_option and out.get("enable_dp_attention") in (True, "true", "True"):
        ways = out.pop("dp_size", None) or out.pop("data_parallel_size", None)
        del out["enable_dp_attention"]
        if ways is not None:
            out[column.attention_dp_option] = ways
            name = column.attention_dp_option
            notes.append(f"sglang {column.version}: dp_size {ways} with enable_dp_attention is called {name} {ways}")
    return Translation(out, tuple(notes))


def typed_argv(settings: Mapping[str, object], table: OptionTable) -> list[str]:
    """Settings as a command line for that version's parser. None leaves an option at its default.

    Raises ValueError for an unknown name (with the nearest one), a value of the wrong type, or one outside the choices.
    """
    argv: list[str] = []
    for name, value in settings.items():
        option = table.find(name)
        if value is None:
            continue
        argv += _argument(option, value, table.version)
    return argv


def _argument(option: Option, value: object, found: str) -> list[str]:
    flag = option.flags[0]
    where = f"--sglang-{option.name.replace('_', '-')} (sglang {found})"
    if option.kind in ("flag", "switch"):
        on = _as_bool(value, where)
        if on:
            return [flag]
        return [f"--no-{flag[2:]}"] if option.kind == "switch" else []
    if option.kind == "list":
        parts = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else str(value).split()
        return [flag, *(_checked(option, part, where) for part in parts)]
    return [f"{flag}={_checked(option, value, where)}"]


def _as_bool(value: object, where: str) -> bool:
    words = {"true": True, "1": True, "": True, "false": False, "0": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() in words:
        return words[str(value).lower()]
    raise ValueError(f"{where} is on or off and takes no value, got {value!r}")


def _checked(option: Option, value: object, where: str) -> str:
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value)
    text = str(value)
    if isinstance(value, bool) and option.type != "str":
        raise ValueError(f"{where} takes a value of type {option.type}, got {text}")
    converters = {"int": int, "float": float}
    if option.type in converters:
        try:
            converters[option.type](text)
        except ValueError:
            raise ValueError(f"{where} takes a value of type {option.type}, got {text!r}") from None
    if option.choices is not None and text not in option.choices:
        near = difflib.get_close_matches(text, option.choices, n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise ValueError(f"{where} is one of {', '.join(option.choices)}, got {text!r}{hint}")
    return text
