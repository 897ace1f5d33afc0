"""The import path that users' scripts know: `from slime.utils.arguments import parse_args`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from slime.config import FlatArgs, load

__all__ = ["parse_args"]


def parse_args(argv: Sequence[str] | None = None) -> FlatArgs:
    """The flat read-only view of `argv` (of this program's command line); a mistake ends the program with status 2."""
    return load(sys.argv[1:] if argv is None else argv).args
