"""Files of rows: .jsonl and .parquet, whole or in slices, each row with its place for messages.

`rows.jsonl@[100:]`, `rows.parquet@[-50:]`. A line that is no row is refused with file and number, or left out and counted; what
a row must hold is for dataset.py to say. Must never know: templates, tokenizers.
"""

from __future__ import annotations

import codecs
import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime.config.prompt_files import file_problem, split_slice
from slime.rollout.messages import without_nulls

logger = logging.getLogger(__name__)

SKIP_HINT = "correct the line, or pass --on-broken-prompt-line skip to leave such lines out"


class BrokenRow(ValueError):
    """A row that cannot become a prompt."""


@dataclass(frozen=True)
class Row:
    where: str
    """File and line, for messages."""
    values: dict[str, Any]


def read_rows(path: str, *, on_broken: str = "refuse") -> list[Row]:
    """Rows of the file, or of its slice: `@[a:b]` counts the lines that are not blank, and no other line is looked into.

    Raises ValueError for a missing file, an unknown kind, or a broken line of the slice (left out and counted with "skip").
    """
    if problem := file_problem(path):
        raise ValueError(f"prompt file {problem}")
    file, wanted = split_slice(path)
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    rows: list[Row] = []
    broken: list[str] = []
    for item in readers[Path(file).suffix](file, wanted):
        if isinstance(item, Row):
            rows.append(item)
        elif on_broken == "refuse":
            raise ValueError(f"{item}; {SKIP_HINT}")
        else:
            broken.append(item)
    report_skipped(file, broken)
    return rows


def report_skipped(file: str, reasons: list[str]) -> None:
    """One warning with their number and the first."""
    if reasons:
        logger.warning("%s: %d broken lines skipped; the first: %s", file, len(reasons), reasons[0])


def _filled_lines(file: str) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of the lines that are not blank. Bytes: a text mode would end lines at other characters too."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield number, line


def _jsonl_rows(file: str, wanted: slice) -> Iterator[Row | str]:
    start, stop = wanted.start or 0, wanted.stop
    if start < 0 or (stop or 0) < 0:
        start, stop, _ = wanted.indices(sum(1 for _ in _filled_lines(file)))
    for number, line in itertools.islice(_filled_lines(file), start, stop):
        yield _row_of_line(f"{file}:{number}", line)


def _row_of_line(where: str, line: bytes) -> Row | str:
    """The row, or why there is none."""
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        return f"{where}: not UTF-8 (byte 0x{line[error.start]:02x} in column {error.start + 1}): {line[:60]!r}"
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        return f"{where}: not JSON ({error.msg} at column {error.colno}): {text[:60]!r}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
        return f"{where}: JSON that cannot be read ({error}): {text[:60]!r}"
    return Row(where, values) if isinstance(values, dict) else f"{where}: a {type(values).__name__}, not a JSON object"


def _parquet_rows(file: str, wanted: slice) -> Iterator[Row | str]:
    """Only the row groups that hold a wanted row are read."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(file) as table:
            start, stop, _ = wanted.indices(table.metadata.num_rows)
            number = 0
            for group in range(table.num_row_groups):
                size = table.metadata.row_group(group).num_rows
                if number + size > start and number < stop:
                    rows = table.read_row_group(group).slice(max(start - number, 0), stop - max(start, number))
                    for position, values in enumerate(_plain_values(rows), start=max(start, number) + 1):
                        where = f"{file}: row {position}"
                        yield f"{where}: {values}" if isinstance(values, str) else Row(where, values)
                number += size
    except (ArrowException, OSError) as error:
        raise ValueError(f"prompt file {file} is no sound parquet file ({error}); download or convert it again") from None


def _plain_values(table: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of an Arrow table as mappings; for one whose text is none, why."""
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError as error:
        if table.num_rows > 1:
            half = table.num_rows // 2
            yield from _plain_values(table.slice(0, half))
            yield from _plain_values(table.slice(half))
        else:
            yield f"not UTF-8 (byte 0x{error.object[error.start]:02x}): {error.object[:60]!r}"
        return
    for values in rows:
        yield {key: _as_written(value) for key, value in values.items()}


def _as_written(column: Any) -> Any:
    """A list of messages or tools without the fields that are null only because another element of the file has them."""
    return without_nulls(column) if isinstance(column, list) else column
