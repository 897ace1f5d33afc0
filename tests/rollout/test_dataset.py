"""Prompt files: rows in order, slices, templates, and a broken row named by its line."""

from __future__ import annotations

import json
import logging

import pytest
from chat_families import tokenizer_of

from slime.config.prompt_files import split_slice
from slime.rollout import rows as row_files
from slime.rollout.dataset import PromptFormat, read_prompts, read_rows
from slime.rollout.tokenizer import load_tokenizer


def write(path, rows):
    """A row is bytes as they are, a text, or a mapping."""
    lines = [row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
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


@pytest.mark.parametrize(
    "suffix, wanted", [("@[0:2]", "ab"), ("@[3:]", "de"), ("@[-2:]", "de"), ("@[:-3]", "ab"), ("@[9:]", "")]
)
@pytest.mark.parametrize("on_broken", ["refuse", "skip"])
def test_a_slice_counts_lines_and_looks_into_no_other(tmp_path, suffix, wanted, on_broken):
    """The third line is neither UTF-8 nor JSON; blank lines count for nothing."""
    rows = [{"input": "a"}, "", {"input": "b"}, b"\xff{", {"input": "d"}, "  ", {"input": "e"}]
    path = write(tmp_path / "p.jsonl", rows)
    assert "".join(row.values["input"] for row in read_rows(path + suffix, on_broken=on_broken)) == wanted


def test_a_slice_ends_the_reading_before_the_rest_of_the_file(tmp_path, monkeypatch):
    path = write(tmp_path / "p.jsonl", [{"input": f"q{i}"} for i in range(10)])
    seen = []
    lines = row_files._filled_lines
    monkeypatch.setattr(
        row_files, "_filled_lines", lambda file: (seen.append(number) or (number, line) for number, line in lines(file))
    )
    assert [row.where for row in read_rows(path + "@[1:3]")] == [f"{path}:2", f"{path}:3"]
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("suffix", ["@[0:4:2]", "@[a:b]", "@[3]"])
def test_what_is_meant_as_a_slice_and_is_none_is_said(tmp_path, suffix):
    path = write(tmp_path / "p.jsonl", [{"input": "q"}])
    with pytest.raises(ValueError, match=r"is not two whole numbers; write @\[start:end\]"):
        read_rows(path + suffix)


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_row(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"input": "a"}\r\n\r\n{"input": "b\xe2\x80\xa8c"}\r\n')
    assert [(row.where, row.values["input"]) for row in read_rows(str(path))] == [
        (f"{path}:1", "a"),
        (f"{path}:3", "b\u2028c"),
    ]


def test_a_path_with_brackets_elsewhere_is_no_slice():
    assert split_slice("a[1:2]/b.jsonl") == ("a[1:2]/b.jsonl", slice(None))


def test_parquet_rows_read_like_jsonl_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    rows = [{"prompt": [{"role": "user", "content": f"q{i}"}], "label": str(i)} for i in range(5)]
    path = str(tmp_path / "p.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [row.values for row in read_rows(path + "@[1:3]")] == rows[1:3]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    for suffix, wanted in (("", rows), ("@[1:3]", rows[1:3]), ("@[-2:]", rows[-2:]), ("@[4:9]", rows[4:]), ("@[7:]", [])):
        assert [row.values for row in read_rows(path + suffix)] == wanted
    assert [row.where for row in read_rows(path + "@[3:]")] == [f"{path}: row 4", f"{path}: row 5"]


def test_a_parquet_slice_reads_its_row_groups_alone_and_a_torn_file_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    path = tmp_path / "p.parquet"
    rows = [{"prompt": f"q{i}" * 1000} for i in range(6)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    at = content.index(b"q4q4")  # the last row group: its pages become noise
    content[at - 40 : at + 40] = b"\xff" * 80
    path.write_bytes(content)
    assert [row.values for row in read_rows(f"{path}@[1:3]")] == rows[1:3]
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"p.parquet is no sound parquet file .*download or convert it again"):
        read_rows(str(path))


def test_a_text_of_a_parquet_file_that_is_none_is_named_by_row_or_skipped(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    texts = pyarrow.array([b"a", b"b", b"caf\xe9", b"d", b"e"], type=pyarrow.binary()).view(pyarrow.string())
    path = str(tmp_path / "p.parquet")
    parquet.write_table(pyarrow.table({"input": texts}), path)
    with pytest.raises(ValueError, match=r"p.parquet: row 3: not UTF-8 \(byte 0xe9\): b'caf\\xe9'; .*skip"):
        read_rows(path)
    assert [row.values["input"] for row in read_rows(path, on_broken="skip")] == ["a", "b", "d", "e"]
    assert [row.where for row in read_rows(path + "@[3:]")] == [f"{path}: row 4", f"{path}: row 5"]


def test_fields_that_only_another_row_of_a_parquet_file_has_are_absent(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo"}}}
    turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "hi", "step_loss_mask": 1}]
    path = str(tmp_path / "p.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns, "label": None, "metadata": {"a": None, "b": 1}}]), path)
    assert read_rows(path)[0].values == {"messages": turns, "label": None, "metadata": {"a": None, "b": 1}}


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"input": "q"', "not JSON"),
        ("[1, 2]", "a list, not a JSON object"),
        ('{"question": "q"}', "no column 'input' (--input-key); the columns are: question"),
        ('{"input": 3}', "must be a text or a list of messages"),
        ('{"input": "q", "metadata": "{"}', "'metadata' is text that is not JSON"),
        ('{"input": "q", "tools": ["{"]}', "'tools' is text that is not JSON"),
        ('{"input": "q", "tools": [3]}', "'tools' holds '3'; a tool is a mapping"),
        (b'{"input": "caf\xe9"}', "not UTF-8 (byte 0xe9 in column 15)"),
        ('{"input": "half \\ud83d"}', "'input' holds the lone surrogate \\ud83d (character 6)"),
        ('{"input": [{"role": "user", "content": "\\udc00"}]}', "'input' holds the lone surrogate \\udc00"),
        ('{"input": "q", "metadata": {"\\ud800": 1}}', "'metadata' holds the lone surrogate \\ud800"),
        ("[" * 100_000, "JSON that cannot be read"),
        ('{"input": "q", "n": ' + "9" * 5000 + "}", "JSON that cannot be read"),
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


@pytest.mark.parametrize(
    "name, message",
    [
        ("gone.jsonl", "does not exist"),
        ("gone.jsonl@[0:2]", "gone.jsonl does not exist"),
        ("p.csv", ".jsonl and .parquet can be read"),
        ("folder.jsonl", "is a folder"),
        ("empty.jsonl", "is empty"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path, name, message):
    (tmp_path / "p.csv").write_text("a,b")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "empty.jsonl").touch()
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


@pytest.mark.parametrize(
    "rows, suffix, reason",
    [
        (["", " "], "", "no row of it could be read"),
        ([{"input": "q"}], "@[1:]", "no row of it"),
        (["{"], "", "no row of it"),
        ([{}], "", "all 1 rows"),
    ],
)
def test_a_file_that_gives_nothing_says_why(tmp_path, rows, suffix, reason):
    path = write(tmp_path / "p.jsonl", rows)
    with pytest.raises(ValueError, match=f"yields no prompt: {reason}"):
        read_prompts(path + suffix, PromptFormat(), on_broken="skip")


def test_every_spelling_of_tools_is_one_list(tmp_path, tokenizer_folder):
    tool = {"type": "function", "function": {"name": "f"}}
    spelled = [[tool], json.dumps([tool]), [json.dumps(tool)], None, "", [], "null"]
    path = write(tmp_path / "p.jsonl", [{"input": "hi", "tools": tools} for tools in spelled])
    samples = read_prompts(path, PromptFormat(apply_chat_template=True), tokenizer=load_tokenizer(tokenizer_folder))
    assert [sample.metadata.get("tools") for sample in samples] == [[tool]] * 3 + [None] * 4
    assert len({sample.prompt for sample in samples[:3]}) == 1 and '"name": "f"' in samples[0].prompt


def test_a_sample_knows_its_line(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"input": "a"}, "", {"input": "b"}])
    assert [sample.prompt_source for sample in read_prompts(path, PromptFormat())] == [f"{path}:1", f"{path}:3"]


def test_prompts_in_parts_reach_a_template_that_knows_texts_alone(tmp_path):
    """Qwen's template writes nothing for a content that is a list."""
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1"}]
    pictures = [{"type": "image_url", "image_url": {"url": "x"}}]
    rows = [{"input": [{"role": "user", "content": content}]} for content in ("1+1", parts, pictures)]
    path = write(tmp_path / "p.jsonl", rows)
    form = PromptFormat(apply_chat_template=True)
    plain, joined = read_prompts(path, form, tokenizer=tokenizer_of("qwen3"), on_broken="skip")
    assert plain.prompt == joined.prompt == "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ValueError, match=r"p.jsonl:3: the chat template refuses these messages: .*part of type 'image_url'"):
        read_prompts(path, form, tokenizer=tokenizer_of("qwen3"))
