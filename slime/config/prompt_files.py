"""How a flag names a file of prompts: `FILE` or `FILE@[start:end]`, and what can be said of the file without reading it."""

from __future__ import annotations

import os
import re
from pathlib import Path

KINDS = (".jsonl", ".parquet")
_SLICED = re.compile(r"^(?P<path>.*)@\[(?P<start>-?\d*):(?P<end>-?\d*)\]$")
_MEANT_AS_SLICE = re.compile(r"^(?P<path>.*)@\[(?P<inside>.*)\]$")


def split_slice(path: str) -> tuple[str, slice]:
    """`file@[a:b]` -> (file, slice(a, b)); a file without a slice gives all rows."""
    match = _SLICED.match(path)
    if match is None:
        return path, slice(None)
    start, end = (_bound(match[name]) for name in ("start", "end"))
    return match["path"], slice(start, end)


def _bound(digits: str) -> int | None:
    return int(digits) if digits.strip("-") else None


def file_problem(path: str) -> str:
    """Why no prompts can be read from `path` on this machine, with the way out; empty when nothing speaks against it."""
    file, _ = split_slice(path)
    unread = _MEANT_AS_SLICE.match(file)
    if unread and not Path(file).exists():
        return (
            f"{path}: the slice [{unread['inside']}] is not two whole numbers; write @[start:end], where either may be left out"
        )
    if Path(file).is_dir():
        return f"{file} is a folder; name a file, {' or '.join(KINDS)}"
    if Path(file).suffix not in KINDS:
        return f"{file}: {Path(file).suffix or 'no'} suffix; {' and '.join(KINDS)} can be read"
    if not Path(file).is_file():
        return f"{file} does not exist; correct the path, or write the file first"
    if not os.access(file, os.R_OK):
        return f"{file} cannot be read by this user; change its permissions"
    if os.path.getsize(file) == 0:
        return f"{file} is empty; write the prompts first, one per row"
    return _another_kind(file)


_BEGINNINGS = (
    (b"version https://git-lfs", "a pointer of git-lfs; fetch what it stands for (git lfs pull)"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"\xff\xfe", "UTF-16 text; write it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text; write it as UTF-8"),
    (b"<!DOCTYPE", "a page of HTML, as a failed download leaves it; download it again"),
    (b"<html", "a page of HTML, as a failed download leaves it; download it again"),
)
"""First bytes -> what such a file is, and the way out."""


def _another_kind(file: str) -> str:
    """What a file is that has another kind's name."""
    with open(file, "rb") as stream:
        begin = stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    known = [*_BEGINNINGS]
    if file.endswith(".jsonl"):
        known += [(b"PAR1", "a parquet file; name it .parquet"), (b"[{", "one JSON array; write one object per line")]
        known += [(b"[\n", "one JSON array; write one object per line")]
    if file.endswith(".parquet"):
        known += [(b"{", "JSON text; name it .jsonl")]
    return next((f"{file} is {what}" for magic, what in known if begin.startswith(magic)), "")
