"""Print the options of the installed SGLang as JSON: `python -m slime.engine.describe`.

It asks SGLang's own parser, so it does not matter whether ServerArgs is a dataclass (0.5.17) or a msgspec.Struct (0.5.23).
Needs the shims on a machine without CUDA; `slime.engine.versions.installed_options` runs it in a child process.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version


def kind_of(action: argparse.Action) -> str:
    if isinstance(action, argparse.BooleanOptionalAction):
        return "switch"
    if action.nargs == 0:
        return "flag"
    return "list" if action.nargs in ("+", "*") or isinstance(action.nargs, int) else "value"


def describe(parser: argparse.ArgumentParser) -> list[dict[str, object]]:
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or not action.option_strings:
            continue
        rows.append(
            {
                "name": action.dest,
                "flags": [flag for flag in action.option_strings if flag.startswith("--")],
                "kind": kind_of(action),
                "type": getattr(action.type, "__name__", "str") if action.type else "str",
                "choices": sorted(map(str, action.choices)) if action.choices else None,
            }
        )
    return sorted(rows, key=lambda row: str(row["name"]))


def main() -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    json.dump({"version": version("sglang"), "options": describe(parser)}, sys.stdout)


if __name__ == "__main__":
    main()
