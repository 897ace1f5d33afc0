"""The arithmetic prompts: right answers, nothing of the evaluation in training, the same bytes every time."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from slime.rollout.dataset import PromptFormat, read_prompts
from slime.rollout.grading.mathematics import grade_math
from tools import make_arithmetic_data as tool


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def question(row):
    return (row.get("prompt") or row["messages"])[0]["content"]


@pytest.mark.parametrize("task, sign", [("add", "+"), ("sub", "-"), ("mul", "*"), ("add-mod", "+")])
def test_labels_are_the_answers_and_eval_is_disjoint(tmp_path, task, sign):
    tool.main(["--output", str(tmp_path), "--task", task, "--train", "300", "--eval", "20", "--sft", "100"])
    train, evaluation, sft = (rows(tmp_path / f"{name}.jsonl") for name in ("train", "eval", "sft"))
    assert (len(train), len(evaluation), len(sft)) == (300, 20, 100)
    for row in train + evaluation + sft:
        a, b = map(int, re.search(r"(\d) \w+ (\d)", question(row)).groups())
        value = {"+": a + b, "-": a - b, "*": a * b}[sign] % (10 if task == "add-mod" else 10**9)
        value = a - b if sign == "-" else value
        assert row["label"] == str(value)
    held_out = {question(row) for row in evaluation}
    assert len(held_out) == 20 and not held_out & {question(row) for row in train + sft}
    counts = Counter(question(row) for row in train)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_sft_answer_is_what_the_grader_wants_and_noise_is_the_share_asked_for(tmp_path):
    tool.main(["--output", str(tmp_path), "--sft", "500"])
    assert all(grade_math(row["messages"][-1]["content"], row["label"]) for row in rows(tmp_path / "sft.jsonl"))
    tool.main(["--output", str(tmp_path), "--sft", "500", "--label-noise", "0.5"])
    wrong = [not grade_math(row["messages"][-1]["content"], row["label"]) for row in rows(tmp_path / "sft.jsonl")]
    assert 0.38 < sum(wrong) / 500 < 0.52  # a noisy answer is right by chance once in eleven
    tool.main(["--output", str(tmp_path), "--sft", "500", "--plain-share", "0.5"])
    answers = [(row["messages"][-1]["content"], row["label"]) for row in rows(tmp_path / "sft.jsonl")]
    plain = [answer for answer, label in answers if answer == label]
    assert 0.42 < len(plain) / 500 < 0.58 and not any(grade_math(answer, answer) for answer in plain)
    assert sum(bool(grade_math(answer, label)) for answer, label in answers) == 500 - len(plain)


def test_a_restated_answer_repeats_the_problem_before_the_box(tmp_path):
    tool.main(["--output", str(tmp_path), "--sft", "50", "--restate"])
    for row in rows(tmp_path / "sft.jsonl"):
        a, b = re.search(r"(\d) \w+ (\d)", question(row)).groups()
        assert row["messages"][-1]["content"] == f"{a} plus {b} = \\boxed{{{int(a) + int(b)}}}"
        assert grade_math(row["messages"][-1]["content"], row["label"])


def test_the_warm_start_sees_prompts_of_every_length_up_to_those_of_training(tmp_path):
    tool.main(["--output", str(tmp_path), "--train", "40", "--eval", "8", "--sft", "200", "--examples", "12"])
    solved = re.compile(r"(\d) plus (\d)\D+(\d+)\. ")  # the question itself has no answer behind it
    counts = {"train": Counter(), "sft": Counter()}
    for name, count in counts.items():
        for row in rows(tmp_path / f"{name}.jsonl"):
            shown = solved.findall(question(row))
            assert all(int(a) + int(b) == int(answer) for a, b, answer in shown)
            count[len(shown)] += 1
    assert set(counts["train"]) == {12} and set(counts["sft"]) == set(range(13)), "all equally often: none is rare"
    assert max(counts["sft"].values()) < 40


def test_the_prompt_file_reads_as_dapo_math_17k_does(tmp_path):
    tool.main(["--output", str(tmp_path), "--train", "4"])
    sample = read_prompts(str(tmp_path / "train.jsonl"), PromptFormat(input_key="prompt", label_key="label"))[0]
    assert sample.prompt[0]["role"] == "user" and sample.label.isdigit()


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        tool.main(["--output", str(tmp_path / name), "--train", "50", "--seed", seed])
    texts = [(tmp_path / name / "train.jsonl").read_bytes() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]


def test_holding_out_more_than_half_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at most half can be held out"):
        tool.main(["--output", str(tmp_path), "--eval", "60"])
