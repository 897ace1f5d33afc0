"""Files and lengths that cannot work are said when the flags are read, before anything starts."""

from __future__ import annotations

import pytest
from flags import config_of

from slime.config.facts import Facts, gather_facts
from slime.config.prompt_files import file_problem


@pytest.fixture
def disk(tmp_path):
    """(facts that ask the real disk, the folder with one good file)."""
    (tmp_path / "p.jsonl").write_text('{"input": "q"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    return gather_facts(load=None, ref_load=None, hf_checkpoint=None), tmp_path


def refusal(*flags, facts):
    with pytest.raises(ValueError) as caught:
        config_of(*flags, facts=facts)
    return str(caught.value)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("gone.jsonl", "gone.jsonl does not exist"),
        ("gone.jsonl@[0:2]", "gone.jsonl does not exist"),
        ("p.jsonl@[1]", "is not two whole numbers"),
        ("p.csv", ".csv suffix; .jsonl and .parquet can be read"),
        ("", "is a folder"),
        ("empty.jsonl", "empty.jsonl is empty"),
    ],
)
def test_prompts_that_are_not_there_are_said_before_anything_starts(disk, name, reason):
    facts, folder = disk
    path = f"{folder}/{name}" if name else str(folder)
    text = refusal("--prompt-data", path, facts=facts)
    assert text.startswith("--prompt-data ") and reason in text


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of git-lfs; fetch"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of git-lfs; fetch"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", "a gzip archive; unpack it"),
        ("a.jsonl", '{"input": "q"}\n'.encode("utf-16"), "UTF-16 text; write it as UTF-8"),
        ("a.jsonl", b"PAR1\x15\x04", "a parquet file; name it .parquet"),
        ("a.jsonl", b'[{"input": "q"},\n {"input": "r"}]', "one JSON array; write one object per line"),
        ("a.jsonl", b'[\n {"input": "q"}\n]', "one JSON array; write one object per line"),
        ("a.jsonl", b"<!DOCTYPE html>", "a page of HTML"),
        ("a.parquet", b'{"input": "q"}\n', "JSON text; name it .jsonl"),
        ("a.jsonl", b'\xef\xbb\xbf{"input": "q"}\r\n', ""),
        ("a.jsonl", b'[1]\n{"input": "q"}\n', ""),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    said = file_problem(str(tmp_path / name))
    assert (reason in said and said.startswith(f"{tmp_path / name} is ")) if reason else said == ""


@pytest.mark.parametrize("when", [[], ["--skip-eval-before-train"], ["--num-rollout", "0"]])
def test_evaluation_files_are_looked_for_however_far_the_evaluation_is(disk, when):
    facts, folder = disk
    prompts = ["--prompt-data", f"{folder}/p.jsonl"]
    text = refusal(*prompts, *when, "--eval-interval", "9", "--eval-prompt-data", "aime", f"{folder}/gone.jsonl", facts=facts)
    assert text == f"evaluation aime: {folder}/gone.jsonl does not exist; correct the path, or write the file first"
    config = folder / "eval.yaml"
    config.write_text(f"datasets: [{{name: a, path: {folder}/p.jsonl}}, {{name: b, path: {folder}/gone.parquet}}]\n")
    text = refusal(*prompts, *when, "--eval-interval", "9", "--eval-config", str(config), facts=facts)
    assert "evaluation b: " in text and "gone.parquet does not exist" in text and "evaluation a" not in text


def test_files_that_nobody_reads_need_not_exist(disk):
    facts, folder = disk
    gone = ["--prompt-data", f"{folder}/gone.jsonl"]
    config_of("--prompt-data", f"{folder}/p.jsonl@[0:1]", facts=facts)
    config_of(*gone, "--load-debug-rollout-data", "d/{rollout_id}.pt", facts=facts)
    config_of(*gone, "--disable-rollout-global-dataset", "--rollout-function-path", "mine.rollout", facts=facts)
    config_of(*gone, "--data-source-path", "mine.Source", facts=facts)
    config_of(*gone, facts=facts, door="rehearse")
    own = ["--eval-function-path", "mine.evaluate", "--eval-interval", "1", "--eval-prompt-data", "a", "s3://x"]
    config_of("--prompt-data", f"{folder}/p.jsonl", *own, facts=facts)


def test_a_file_without_permission_is_said(disk, monkeypatch):
    _, folder = disk
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root reads everything
    assert file_problem(f"{folder}/p.jsonl").endswith("cannot be read by this user; change its permissions")


REPLAY = ("--debug-train-only", "--load-debug-rollout-data", "/d/{rollout_id}.pt")
QWEN = {"max_position_embeddings": 4096}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
RESPONSE = ["--rollout-max-response-len"]


@pytest.mark.parametrize(
    "config, flags, wrong",
    [
        (QWEN, ["--rollout-max-response-len", "4095"], ""),
        (QWEN, ["--rollout-max-response-len", "4096"], "--rollout-max-response-len 4096 leaves no room for a prompt"),
        (QWEN, ["--rollout-max-response-len", "9000", "--rollout-max-context-len", "4096"], ""),
        (QWEN, ["--rollout-max-context-len", "4097"], "--rollout-max-context-len 4097 is more than an engine can hold"),
        (QWEN, ["--rollout-max-response-len", "3000", "--rollout-max-prompt-len", "1097"], "are 4097 tokens together"),
        (QWEN, ["--rollout-max-response-len", "3000", "--rollout-max-prompt-len", "1096"], ""),
        (QWEN | {"rope_scaling": YARN}, ["--rollout-max-response-len", "4096"], "leaves no room"),
        (QWEN | {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["--rollout-max-response-len", "8191"], ""),
        (QWEN | {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["--rollout-max-response-len", "8192"], "context is 8192"),
        ({"text_config": QWEN}, ["--rollout-max-response-len", "4096"], "leaves no room"),
        ({}, ["--rollout-max-response-len", "1000000"], ""),
        (QWEN, ["--sglang-context-length", "1Ki", "--rollout-max-response-len", "1024"], "1024 (--sglang-context-length)"),
        (QWEN, ["--sglang-context-length", "8192", "--rollout-max-response-len", "8191"], ""),
        (QWEN, [*REPLAY, "--rollout-max-response-len", "9000"], ""),
    ],
)
def test_what_is_asked_of_an_engine_fits_its_context(config, flags, wrong):
    facts = Facts(hf_config=config)
    if wrong:
        text = refusal(*flags, facts=facts)
        assert wrong in text and "the engines' context is" in text
    else:
        config_of(*flags, facts=facts)


def test_an_evaluations_lengths_fit_the_engines_context_too(tmp_path):
    config = tmp_path / "eval.yaml"
    config.write_text("datasets: [{name: a, path: a.jsonl, max_response_len: 5000}, {name: b, path: b.jsonl}]\n")
    flags = ["--rollout-max-response-len", "100", "--eval-interval", "1", "--eval-config", str(config)]
    text = refusal(*flags, facts=Facts(hf_config=QWEN))
    assert text.startswith("evaluation a: max_response_len 5000 leaves no room for a prompt")
    config_of(*flags, "--sglang-context-length", "5001", facts=Facts(hf_config=QWEN))


def test_groups_of_engines_have_contexts_of_their_own(tmp_path):
    """The smallest context of the groups counts."""
    config = tmp_path / "engines.yaml"
    config.write_text(
        "sglang:\n- name: policy\n  server_groups: [{num_gpus: 1}, {num_gpus: 1, overrides: {context-length: 2048}}]\n"
    )
    flags = ["--sglang-config", str(config), "--rollout-max-response-len"]
    assert "the engines' context is 2048" in refusal(*flags, "2048", facts=Facts(hf_config=QWEN))
    config_of(*flags, "2047", facts=Facts(hf_config=QWEN))
