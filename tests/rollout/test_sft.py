"""Supervised masks: exactly what the assistant would have generated, the token that ends its turn included."""

from __future__ import annotations

import json
from typing import get_args, get_type_hints

import pytest
from rollout_helpers import make_config

from slime.config.rollout import DataConfig
from slime.rollout.data_source import RolloutDataSource
from slime.rollout.sft_masks import MASK_TYPES, mask_conversation
from slime.rollout.sft_rollout import generate_rollout
from slime.rollout.to_batch import make_rollout_batch
from slime.rollout.tokenizer import load_tokenizer
from slime.types.sample import Status

USER, ASSISTANT = "user", "assistant"


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def trained_text(tokenizer, masked):
    return tokenizer.decode([token for token, kept in zip(masked.token_ids, masked.loss_mask, strict=True) if kept])


def test_glm_turns_end_with_the_next_role_and_the_last_with_the_end_token(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    messages = chat((USER, "1+1"), (ASSISTANT, "2"), (USER, "2+2"), (ASSISTANT, "4"))
    masked = mask_conversation(tokenizer, messages, loss_mask_type="glm5")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(masked.token_ids) == text + "<|endoftext|>"
    assert trained_text(tokenizer, masked) == "2<|user|>4<|endoftext|>"
    assert masked.response_length == len(tokenizer.encode("2<|user|>2+2<|assistant|>4<|endoftext|>", add_special_tokens=False))


def test_glm_observations_end_a_turn_and_are_not_trained(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    messages = chat((USER, "x"), (ASSISTANT, "ask"), ("tool", "7"), ("tool", "8"), (ASSISTANT, "7"))
    masked = mask_conversation(tokenizer, messages, loss_mask_type="glm5")
    assert trained_text(tokenizer, masked) == "ask<|observation|>7<|endoftext|>"
    assert "<tool_response>7</tool_response><tool_response>8</tool_response>" in tokenizer.decode(masked.token_ids)


@pytest.mark.parametrize("kind", ["qwen", "qwen3"])
def test_qwen_turns_end_with_their_own_marker_and_ids_are_the_templates(qwen_folder, kind):
    tokenizer = load_tokenizer(qwen_folder)
    messages = chat((USER, "1+1"), (ASSISTANT, "2"), ("tool", "a"), ("tool", "b"), (ASSISTANT, "4"))
    masked = mask_conversation(tokenizer, messages, loss_mask_type=kind)
    whole = tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)
    assert masked.token_ids == whole
    assert trained_text(tokenizer, masked) == "2<|im_end|>4<|im_end|>"


def test_a_turn_can_be_left_out_and_the_last_turn_taken_alone(qwen_folder):
    tokenizer = load_tokenizer(qwen_folder)
    messages = chat((USER, "1+1"), (ASSISTANT, "2"), (USER, "2+2"), (ASSISTANT, "4"))
    messages[1]["step_loss_mask"] = 0
    assert trained_text(tokenizer, mask_conversation(tokenizer, messages, loss_mask_type="qwen")) == "4<|im_end|>"
    messages[1]["step_loss_mask"] = 1
    assert trained_text(tokenizer, mask_conversation(tokenizer, messages, loss_mask_type="distill_qwen")) == "4<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_rendered_once(qwen_folder):
    tokenizer = type(load_tokenizer(qwen_folder)).from_pretrained(qwen_folder)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message.content }}<|im_end|>", "{{ message.content if loop.last }}<|im_end|>"
    )
    masked = mask_conversation(tokenizer, chat((USER, "1+1"), (ASSISTANT, "2")), loss_mask_type="qwen")
    assert tokenizer.decode(masked.token_ids) == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    assert trained_text(tokenizer, masked) == "2<|im_end|>"
    with pytest.raises(ValueError, match="ends with the assistant"):
        mask_conversation(tokenizer, chat((USER, "1+1")), loss_mask_type="qwen")


def test_the_sft_rollout_makes_a_trainable_batch(tmp_path, tokenizer_folder):
    path = tmp_path / "sft.jsonl"
    rows = [{"messages": chat((USER, f"1 plus {i}"), (ASSISTANT, f"\\boxed{{{i + 1}}}"))} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(
        prompt_data=str(path), input_key="messages", hf_checkpoint=tokenizer_folder, rollout_batch_size=3, loss_mask_type="qwen"
    )
    output = generate_rollout(config.args, 0, RolloutDataSource(config.args))
    batch = make_rollout_batch(output.samples, rollout_id=0, config=config)
    tokenizer = load_tokenizer(tokenizer_folder)
    responses = [tokenizer.decode(tokens[-n:]) for tokens, n in zip(batch.tokens, batch.response_lengths, strict=True)]
    assert responses == [f"\\boxed{{{i}}}<|endoftext|>" for i in (1, 2, 3)]
    assert batch.mask_sums.tolist() == [4, 4, 4] and batch.rollout_log_probs is None


def sft_config(path, tokenizer_folder, **values):
    defaults = {"input_key": "messages", "hf_checkpoint": tokenizer_folder, "rollout_batch_size": 3, "loss_mask_type": "qwen3"}
    return make_config(**(defaults | {"prompt_data": str(path)} | values))


def write_rows(path, conversations):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return path


BROKEN = [
    chat(("system", "Be short.")),
    chat((USER, "hi")),
    [{"role": USER, "content": "hi"}, {"role": ASSISTANT, "content": "ho", "step_loss_mask": 0}],
    [{"role": USER, "content": [{"type": "image", "image": "x"}]}, {"role": ASSISTANT, "content": "ho"}],
    ["hi"],
    "hi",
]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_row_that_cannot_be_trained_is_named_or_the_next_stands_in(tmp_path, tokenizer_folder, caplog, broken):
    good = [chat((USER, "x"), (ASSISTANT, f"answer {i}")) for i in range(3)]
    path = write_rows(tmp_path / "sft.jsonl", [good[0], broken, *good[1:]])
    config = sft_config(path, tokenizer_folder)
    with pytest.raises(ValueError, match=f"{path}:2: .*--on-broken-prompt-line skip"):
        generate_rollout(config.args, 0, RolloutDataSource(config.args))
    config = sft_config(path, tokenizer_folder, on_broken_prompt_line="skip")
    with caplog.at_level("WARNING"):
        output = generate_rollout(config.args, 0, RolloutDataSource(config.args))
    assert [group[0].response for group in output.samples] == [f"answer {i}<|endoftext|>" for i in range(3)]
    assert output.metrics == {"rollout/broken_lines": 1.0}
    assert f"1 broken lines skipped; the first: {path}:2: " in caplog.text


def test_a_file_of_broken_rows_ends_the_run_instead_of_going_round(tmp_path, tokenizer_folder):
    path = write_rows(tmp_path / "sft.jsonl", BROKEN)
    config = sft_config(path, tokenizer_folder, on_broken_prompt_line="skip")
    with pytest.raises(ValueError, match=rf"no conversation can be trained on: \d+ were tried. The first: {path}:1: "):
        generate_rollout(config.args, 0, RolloutDataSource(config.args))


def test_a_row_over_the_context_is_cut_and_counts_as_truncated(tmp_path, tokenizer_folder):
    """[gMASK] <sop> <|user|> x <|assistant|> are five tokens; every digit is one."""
    path = write_rows(tmp_path / "sft.jsonl", [chat((USER, "x"), (ASSISTANT, "1234")), chat((USER, "1234"), (ASSISTANT, "5"))])
    config = sft_config(path, tokenizer_folder, rollout_max_context_len=8, rollout_batch_size=1)
    source = RolloutDataSource(config.args)
    (sample,) = generate_rollout(config.args, 0, source).samples[0]
    assert (sample.response, sample.loss_mask, len(sample.tokens)) == ("123", [1, 1, 1], 8)
    assert sample.status is Status.TRUNCATED
    with pytest.raises(ValueError, match=r"sft.jsonl:2: the first trained token comes after 8 tokens"):
        generate_rollout(config.args, 1, source)


def test_every_loss_mask_type_of_the_command_line_has_a_meaning():
    assert set(get_args(get_type_hints(DataConfig)["loss_mask_type"])) == set(MASK_TYPES)


def test_a_conversation_may_be_json_text_and_no_other_text(tmp_path, tokenizer_folder):
    messages = chat((USER, "x"), (ASSISTANT, "y"))
    path = write_rows(tmp_path / "sft.jsonl", [json.dumps(messages), "just text"])
    config = sft_config(path, tokenizer_folder, rollout_batch_size=1)
    source = RolloutDataSource(config.args)
    assert generate_rollout(config.args, 0, source).samples[0][0].response == "y<|endoftext|>"
    with pytest.raises(ValueError, match=r"sft.jsonl:2: supervised training needs a list of messages .* found 'just text'"):
        generate_rollout(config.args, 1, source)


def test_a_source_that_runs_dry_ends_the_rollout(tokenizer_folder):
    class Dry:
        def get_samples(self, count):
            return []

    config = sft_config("none.jsonl", tokenizer_folder)
    with pytest.raises(ValueError, match="no more conversations: 0 of 3 were taken"):
        generate_rollout(config.args, 0, Dry())
