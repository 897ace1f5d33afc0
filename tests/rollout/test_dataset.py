"""Prompt files: rows in order, slices, templates, and a broken row named by its line."""

from __future__ import annotations

import json
import logging

import pytest

from slime.rollout.dataset import PromptFormat, read_prompts, read_rows, split_slice
from slime.rollout.tokenizer import load_tokenizer


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "suffix, wanted",
    [
        ("", range(10)),
        ("@[2:5]", [2, 3, 4]),
        ("@[7:]", [7, 8, 9]),
        ("@[:2]", [0, 1]),
        ("@[-3:]", [7, 8, 9]),
        ("@[-4:-2]", [6, 7]),
    ],
)
def test_slices_take_rows_as_python_does(tmp_path, suffix, wanted):
    path = write(tmp_path / "p.jsonl", [{"input": f"q{i}"} for i in range(10)])
    assert [row.values["input"] for row in read_rows(path + suffix)] == [f"q{i}" for i in wanted]


def test_a_path_with_brackets_elsewhere_is_no_slice():
    assert split_slice("a[1:2]/b.jsonl") == ("a[1:2]/b.jsonl", slice(None))


def test_parquet_rows_read_like_jsonl_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    rows = [{"prompt": [{"role": "user", "content": f"q{i}"}], "label": str(i)} for i in range(5)]
    path = str(tmp_path / "p.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [row.values for row in read_rows(path + "@[1:3]")] == rows[1:3]


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"input": "q"', "not JSON"),
        ("[1, 2]", "a list, not a JSON object"),
        ('{"question": "q"}', "no column 'input' (--input-key); the columns are: question"),
        ('{"input": 3}', "must be a text or a list of messages"),
        ('{"input": "q", "metadata": "{"}', "'metadata' is text that is not JSON"),
    ],
)
def test_a_broken_line_is_refused_with_its_number_or_skipped_with_a_count(tmp_path, caplog, line, reason):
    path = write(tmp_path / "p.jsonl", [{"input": "a"}, "", line, {"input": "b"}])
    with pytest.raises(ValueError) as caught:
        read_prompts(path, PromptFormat())
    assert f"{path}:3: " in str(caught.value) and reason in str(caught.value)
    with caplog.at_level(logging.WARNING):
        samples = read_prompts(path, PromptFormat(), on_broken="skip")
    assert [sample.prompt for sample in samples] == ["a", "b"]
    assert "1 broken lines skipped" in caplog.text and f"{path}:3" in caplog.text


def test_a_missing_label_column_is_named_with_the_columns_present(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"input": "a", "answer": 1}])
    with pytest.raises(ValueError, match=r"p.jsonl:1: no column 'label' \(--label-key\); the columns are: answer, input"):
        read_prompts(path, PromptFormat(label_key="label"))


@pytest.mark.parametrize("name, message", [("gone.jsonl", "does not exist"), ("p.csv", ".jsonl and .parquet can be read")])
def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path, name, message):
    (tmp_path / "p.csv").write_text("a,b")
    with pytest.raises(ValueError, match=message):
        read_rows(str(tmp_path / name))


def test_the_template_renders_messages_plain_text_and_tools(tmp_path, tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    tool = {"type": "function", "function": {"name": "f"}}
    path = write(
        tmp_path / "p.jsonl", [{"input": "hi"}, {"input": [{"role": "user", "content": "hi"}], "tools": json.dumps([tool])}]
    )
    plain, with_tool = read_prompts(path, PromptFormat(apply_chat_template=True), tokenizer=tokenizer)
    assert plain.prompt == "[gMASK]<sop><|user|>hi<|assistant|>"
    assert with_tool.metadata["tools"] == [tool]
    assert with_tool.prompt.startswith("[gMASK]<sop><|system|># Tools\n{") and with_tool.prompt.endswith(
        "<|user|>hi<|assistant|>"
    )
    thinking = PromptFormat(apply_chat_template=True, apply_chat_template_kwargs={"enable_thinking": True})
    assert read_prompts(path + "@[:1]", thinking, tokenizer=tokenizer)[0].prompt.endswith("<|assistant|><think>")


def test_long_prompts_are_left_out_in_order_and_counted(tmp_path, tokenizer_folder, caplog):
    texts = ["12345", "1", "123456", "12"]
    path = write(tmp_path / "p.jsonl", [{"input": text} for text in texts])
    tokenizer = load_tokenizer(tokenizer_folder)
    with caplog.at_level(logging.WARNING):
        kept = read_prompts(path, PromptFormat(), tokenizer=tokenizer, max_prompt_len=5)
    assert [sample.prompt for sample in kept] == ["12345", "1", "12"]
    assert "1 of 4 prompts are over 5 tokens" in caplog.text
    with pytest.raises(ValueError, match="yields no prompt"):
        read_prompts(path, PromptFormat(), tokenizer=tokenizer, max_prompt_len=0)
