"""Prompt files -> Samples without a response, in file order.

A file is .jsonl or .parquet, with an optional slice: `prompts.jsonl@[100:]`, `prompts.parquet@[-50:]`. A row that cannot be
used is refused with file and line number, or skipped and counted when `--on-broken-prompt-line skip` says so; never passed
over silently.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime.types.sample import Sample

logger = logging.getLogger(__name__)

_SLICED = re.compile(r"^(?P<path>.*)@\[(?P<start>-?\d*):(?P<end>-?\d*)\]$")
_TOKENIZE_AT_ONCE = 1024


class BrokenRow(ValueError):
    """A row that cannot become a prompt."""


@dataclass(frozen=True)
class PromptFormat:
    """Which columns to read and how to turn them into a prompt."""

    input_key: str = "input"
    label_key: str | None = None
    metadata_key: str = "metadata"
    tool_key: str | None = "tools"
    apply_chat_template: bool = False
    apply_chat_template_kwargs: Mapping[str, object] | None = None


@dataclass(frozen=True)
class Row:
    where: str
    """File and line, for messages."""
    values: dict[str, Any]


def split_slice(path: str) -> tuple[str, slice]:
    """`file@[a:b]` -> (file, slice(a, b)); a file without a slice gives all rows."""
    match = _SLICED.match(path)
    if match is None:
        return path, slice(None)
    start, end = (int(match[name]) if match[name] else None for name in ("start", "end"))
    return match["path"], slice(start, end)


def read_rows(path: str, *, on_broken: str = "refuse") -> list[Row]:
    """All rows of the file (or of its slice). Raises ValueError for a missing file, an unknown kind or a broken line."""
    file, rows_wanted = split_slice(path)
    if not Path(file).is_file():
        raise ValueError(f"prompt file {file} does not exist")
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    suffix = Path(file).suffix
    if suffix not in readers:
        raise ValueError(f"prompt file {file}: {suffix or 'no'} suffix; .jsonl and .parquet can be read")
    rows: list[Row] = []
    broken: list[str] = []
    for item in readers[suffix](file):
        if isinstance(item, Row):
            rows.append(item)
        elif on_broken == "refuse":
            raise ValueError(f"{item}; correct the line, or pass --on-broken-prompt-line skip to leave such lines out")
        else:
            broken.append(item)
    _report_skipped(file, broken)
    return rows[rows_wanted]


def _report_skipped(file: str, reasons: list[str]) -> None:
    if reasons:
        logger.warning("%s: %d broken lines skipped; the first: %s", file, len(reasons), reasons[0])


def _jsonl_rows(file: str) -> Iterator[Row | str]:
    with open(file, encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                yield f"{where}: not JSON ({error.msg} at column {error.colno}): {line.strip()[:60]!r}"
                continue
            yield Row(where, values) if isinstance(values, dict) else f"{where}: a {type(values).__name__}, not a JSON object"


def _parquet_rows(file: str) -> Iterator[Row]:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
        for values in batch.to_pylist():
            number += 1
            yield Row(f"{file}: row {number}", values)


def read_prompts(
    path: str,
    form: PromptFormat,
    *,
    tokenizer: Any = None,
    max_prompt_len: int | None = None,
    on_broken: str = "refuse",
) -> list[Sample]:
    """The file's prompts in order, those longer than `max_prompt_len` tokens left out.

    tokenizer: anything with transformers' `apply_chat_template` and `__call__`; needed for templates and the length filter.
    Raises ValueError when nothing is left.
    """
    samples: list[Sample] = []
    broken: list[str] = []
    for row in read_rows(path, on_broken=on_broken):
        try:
            samples.append(_to_sample(row, form, tokenizer))
        except BrokenRow as error:
            if on_broken == "refuse":
                raise
            broken.append(str(error))
    _report_skipped(path, broken)
    kept = samples if max_prompt_len is None else _short_enough(samples, tokenizer, max_prompt_len, path)
    if not kept:
        raise ValueError(f"{path} yields no prompt: {len(samples)} were read, {len(samples)} are over {max_prompt_len} tokens")
    logger.info("%s: %d prompts", path, len(kept))
    return kept


def _column(row: Row, key: str, flag: str) -> Any:
    if key not in row.values:
        present = ", ".join(sorted(row.values)) or "none"
        raise BrokenRow(f"{row.where}: no column {key!r} ({flag}); the columns are: {present}")
    return row.values[key]


def _to_sample(row: Row, form: PromptFormat, tokenizer: Any) -> Sample:
    prompt = _column(row, form.input_key, "--input-key")
    if not isinstance(prompt, str | list) or not prompt:
        raise BrokenRow(f"{row.where}: {form.input_key!r} must be a text or a list of messages, found {str(prompt)[:60]!r}")
    label = _column(row, form.label_key, "--label-key") if form.label_key else None
    metadata = _as_object(row, form.metadata_key, dict) or {}
    tools = _as_object(row, form.tool_key, list) if form.tool_key else None
    if tools:
        metadata = {**metadata, "tools": tools}
    if form.apply_chat_template:
        prompt = _render(row, prompt, tools, form, tokenizer)
    kwargs = dict(form.apply_chat_template_kwargs or {})
    return Sample(prompt=prompt, label=label, metadata=metadata, apply_chat_template_kwargs=kwargs)


def _as_object(row: Row, key: str, kind: type) -> Any:
    """An optional column that holds a mapping or a list, or its JSON text."""
    value = row.values.get(key)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BrokenRow(f"{row.where}: {key!r} is text that is not JSON ({error.msg})") from None
    if value is not None and not isinstance(value, kind):
        raise BrokenRow(f"{row.where}: {key!r} must be a {kind.__name__} or its JSON text, found {type(value).__name__}")
    return value


def _render(row: Row, prompt: str | list, tools: list | None, form: PromptFormat, tokenizer: Any) -> str:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            raise BrokenRow(f"{row.where}: {form.input_key!r} holds {str(message)[:60]!r}; a message has a role and a content")
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True, **(form.apply_chat_template_kwargs or {})
        )
    except Exception as error:
        raise BrokenRow(f"{row.where}: the chat template refuses these messages: {type(error).__name__}: {error}") from error


def _short_enough(samples: list[Sample], tokenizer: Any, limit: int, path: str) -> list[Sample]:
    if any(not isinstance(sample.prompt, str) for sample in samples):
        logger.warning("%s: prompts are lists of messages (no --apply-chat-template), so their length is not limited", path)
        return samples
    kept: list[Sample] = []
    for start in range(0, len(samples), _TOKENIZE_AT_ONCE):
        chunk = samples[start : start + _TOKENIZE_AT_ONCE]
        ids = tokenizer([sample.prompt for sample in chunk], add_special_tokens=False)["input_ids"]
        kept.extend(sample for sample, tokens in zip(chunk, ids, strict=True) if len(tokens) <= limit)
    if len(kept) < len(samples):
        logger.warning(
            "%s: %d of %d prompts are over %d tokens and left out", path, len(samples) - len(kept), len(samples), limit
        )
    return kept
