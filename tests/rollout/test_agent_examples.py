"""The generate functions of docs/en/examples, with a policy that is written here, and the data that they train on."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from agent_helpers import glm_call, policy

from slime.rollout.base_types import flatten
from slime.rollout.sft_masks import mask_conversation
from slime.types.sample import Status

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "en" / "examples"


def example(name: str, module: str):
    """A module of an example, under a name that is no other module's."""
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / name / f"{module}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_calculator_computes_and_a_wrong_expression_is_told(agent_rollout, router, tmp_path):
    calculator = example("calculator", "calculator")
    calculator.main(tmp_path, num_sft=4)

    def write(text):
        if found := re.search(r"<tool_response>(.*?)</tool_response>", text):
            return f"\\boxed{{{found[1]}}}<|endoftext|>", "stop"
        a, b = re.search(r"(\d) times (\d)", text).groups()
        return glm_call("py", code=f"{a}*{b}" if int(a) % 2 else f"{a}/0") + "<|observation|>", "stop"

    router.answer = policy(write)
    output, batch = agent_rollout(calculator.generate, prompt_data=str(tmp_path / "train.jsonl"))
    for sample in flatten(output.samples):
        a, b = re.search(r"(\d) times (\d)", str(sample.prompt)).groups()
        result = str(int(a) * int(b)) if int(a) % 2 else "ZeroDivisionError: division by zero"
        assert f"<tool_response>{result}</tool_response>" in sample.response
        assert (sample.reward == 1) == bool(int(a) % 2) and sample.metadata["num_turns"] == 2


def test_the_search_reads_what_was_found_and_trains_none_of_it(agent_rollout, router, tmp_path):
    search = example("search", "search")
    search.main(tmp_path, num_sft=4)

    def write(text):
        box = re.search(r"in (\d+)\?", text)[1]
        if found := re.search(r"<found>In \d+ is (\d)</found>", text):
            return f"\\boxed{{{found[1]}}}<|endoftext|>", "stop"
        return f"<search>{'never' if '<found>' not in text and int(box) % 2 else box}</search>", "stop"

    router.answer = policy(write)
    output, batch = agent_rollout(
        search.generate, prompt_data=str(tmp_path / "train.jsonl"), apply_chat_template=True,
        args_of_the_run={"search_corpus": str(tmp_path / "corpus.jsonl")},
    )  # fmt: skip
    assert batch.raw_rewards.tolist() == [1.0] * 8
    for sample, mask in zip(flatten(output.samples), batch.loss_masks, strict=True):
        own = [token for token, kept in zip(sample.tokens[-len(mask) :], mask, strict=True) if kept]
        assert "<found>" not in router.tokenizer.decode(own) and "<found>" in sample.response
        assert sample.status is Status.COMPLETED


def test_the_team_is_rewarded_by_its_choice(agent_rollout, router, tmp_path):
    """The one who chooses takes the second proposal, which is right: all three samples of the execution get 1."""
    team = example("multi_agent", "agents")
    team.main(tmp_path, num_sft=4)
    asked = []

    def write(text):
        if chosen := re.search(r"\? (\S+) or (\S+)\?", text):
            return f"\\boxed{{{chosen[2]}}}<|endoftext|>", "stop"
        a, b = map(int, re.search(r"(\d) plus (\d)", text).groups())
        asked.append(text)
        return f"\\boxed{{{a + b}}}<|endoftext|>", "stop"

    router.answer = policy(write)
    output, batch = agent_rollout(team.generate, prompt_data=str(tmp_path / "train.jsonl"), apply_chat_template=True)
    assert [[len(execution) for execution in group] for group in output.samples] == [[3, 3]] * 4
    assert batch.raw_rewards.tolist() == [1.0] * 24 and len(asked) == 16


@pytest.mark.parametrize(("name", "module"), [("calculator", "calculator"), ("search", "search"),
                                              ("multi_agent", "agents"), ("sft_then_rl", "data")])  # fmt: skip
def test_held_out_prompts_are_in_no_conversation_and_every_one_can_be_trained(name, module, tmp_path, router):
    example(name, module).main(tmp_path, num_sft=64)
    question = lambda messages: messages[0]["content"]  # noqa: E731
    held_out = {question(row["prompt"]) for row in rows(tmp_path / "eval.jsonl")}
    trained = {question(row["prompt"]) for row in rows(tmp_path / "train.jsonl")}
    assert held_out and not held_out & trained
    for row in rows(tmp_path / "sft.jsonl"):
        assert question(row["messages"]) not in held_out
        masked = mask_conversation(router.tokenizer, row["messages"], loss_mask_type="qwen", tools=row.get("tools"))
        assert 0 < sum(masked.loss_mask) < 64
