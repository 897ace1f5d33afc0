"""Prompt files -> Samples without a response, in file order.

A file is .jsonl or .parquet, with an optional slice: `prompts.jsonl@[100:]`, `prompts.parquet@[-50:]`. A row that cannot be
used is refused with file and line number, or skipped and counted when `--on-broken-prompt-line skip` says so; never passed
over silently. How a file is read is in rows.py, what a list of messages must look like in messages.py.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slime.rollout.chat_template import render_conversation
from slime.rollout.rows import SKIP_HINT, BrokenRow, Row, read_rows, report_skipped
from slime.types.sample import Sample

logger = logging.getLogger(__name__)

_TOKENIZE_AT_ONCE = 1024
_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class PromptFormat:
    """Which columns to read and how to turn them into a prompt."""

    input_key: str = "input"
    label_key: str | None = None
    metadata_key: str = "metadata"
    tool_key: str | None = "tools"
    apply_chat_template: bool = False
    apply_chat_template_kwargs: Mapping[str, object] | None = None


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
    rows = read_rows(path, on_broken=on_broken)
    samples: list[Sample] = []
    broken: list[str] = []
    for row in rows:
        try:
            samples.append(_to_sample(row, form, tokenizer))
        except BrokenRow as error:
            if on_broken == "refuse":
                raise BrokenRow(f"{error}; {SKIP_HINT}") from error
            broken.append(str(error))
    report_skipped(path, broken)
    kept = samples if max_prompt_len is None else _short_enough(samples, tokenizer, max_prompt_len, path)
    if not kept:
        raise ValueError(_why_none(path, len(rows), len(broken), max_prompt_len))
    logger.info("%s: %d prompts", path, len(kept))
    return kept


def _why_none(path: str, num_rows: int, num_broken: int, max_prompt_len: int | None) -> str:
    if num_rows == 0:
        return f"{path} yields no prompt: no row of it could be read; name a file, or a slice of it, that has rows"
    if num_broken == num_rows:
        return f"{path} yields no prompt: all {num_rows} rows are broken, the first reason is in the log above"
    return (
        f"{path} yields no prompt: {num_rows - num_broken} were read and are over {max_prompt_len} tokens; "
        "raise --rollout-max-prompt-len"
    )


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
    tools = _tools(row, form.tool_key) if form.tool_key else None
    for key, value in (
        (form.input_key, prompt),
        (form.label_key, label),
        (form.metadata_key, metadata),
        (form.tool_key, tools),
    ):
        _refuse_half_characters(row, key, value)
    if tools:
        metadata = {**metadata, "tools": tools}
    if form.apply_chat_template:
        prompt = _render(row, prompt, tools, form, tokenizer)
    kwargs = dict(form.apply_chat_template_kwargs or {})
    return Sample(prompt=prompt, label=label, metadata=metadata, apply_chat_template_kwargs=kwargs, prompt_source=row.where)


def _refuse_half_characters(row: Row, key: str | None, value: Any) -> None:
    """JSON can write half of a surrogate pair; no tokenizer takes it, and its error names no line."""
    if isinstance(value, str):
        if not value.isascii() and (half := _HALF.search(value)):
            raise BrokenRow(
                f"{row.where}: {key!r} holds the lone surrogate \\u{ord(half[0]):04x} (character {half.start() + 1}), "
                f"which is no text"
            )
    elif isinstance(value, dict):
        for name, inner in value.items():
            _refuse_half_characters(row, key, name)
            _refuse_half_characters(row, key, inner)
    elif isinstance(value, list):
        for inner in value:
            _refuse_half_characters(row, key, inner)


def _tools(row: Row, key: str) -> list[dict] | None:
    """The definitions as mappings; the column, and each element of it, may be JSON text."""
    tools = _as_object(row, key, list)
    found = [_from_json(row, key, tool) for tool in tools or []]
    for tool in found:
        if not isinstance(tool, dict):
            raise BrokenRow(f"{row.where}: {key!r} holds {str(tool)[:60]!r}; a tool is a mapping, or its JSON text")
    return found or None


def _as_object(row: Row, key: str, kind: type) -> Any:
    """An optional column that holds a mapping or a list, or its JSON text."""
    value = row.values.get(key)
    value = _from_json(row, key, value) if value != "" else None
    if value is not None and not isinstance(value, kind):
        raise BrokenRow(f"{row.where}: {key!r} must be a {kind.__name__} or its JSON text, found {type(value).__name__}")
    return value


def _from_json(row: Row, key: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BrokenRow(f"{row.where}: {key!r} is text that is not JSON ({error})") from None


def _render(row: Row, prompt: str | list, tools: list | None, form: PromptFormat, tokenizer: Any) -> str:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        kwargs = form.apply_chat_template_kwargs or {}
        return render_conversation(tokenizer, messages, tools, add_generation_prompt=True, **kwargs).text
    except Exception as error:
        raise BrokenRow(f"{row.where}: the chat template refuses these messages: {type(error).__name__}: {error}") from error


def _short_enough(samples: list[Sample], tokenizer: Any, limit: int, path: str) -> list[Sample]:
    if any(not isinstance(sample.prompt, str) for sample in samples):
        logger.warning(
            "%s: prompts are lists of messages (no --apply-chat-template): --rollout-max-prompt-len leaves none of them out",
            path,
        )
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
