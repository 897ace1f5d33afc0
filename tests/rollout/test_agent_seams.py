"""What follows a recorded answer, with the templates that people use: the template's own text, from where the answer ends."""

from __future__ import annotations

import pytest
from chat_families import FAMILIES, tokenizer_of
from test_sft_templates import TAKES_TOOLS, TOOLS, answer, call, result, user, whole

from slime.rollout.agents.seam import text_after_answer

CALLS = answer("", tool_calls=[call(city="Oslo")])
CONVERSATIONS = {
    "a question": [user("ask"), answer("said"), user("then?")],
    "a second question": [user("ask"), answer("before"), user("and"), answer("said"), user("then?")],
    "blanks at the end": [user("ask"), answer("said  \n\n"), user("then?")],
    "a result": [user("ask"), CALLS, result("12 C")],
    "two results": [user("ask"), answer("", tool_calls=[call(city="Rome"), call(city="Oslo")]), result("12 C"), result("9 C")],
    "a result after words": [user("ask"), answer("Let me look.", tool_calls=[call(city="Oslo")]), result("12 C")],
    "a question after tools": [user("ask"), CALLS, result("7 C"), answer("said"), user("then?")],
}


def cases():
    for name in FAMILIES:
        for title, messages in CONVERSATIONS.items():
            uses_tools = any(message.get("tool_calls") for message in messages)
            if not uses_tools or name in TAKES_TOOLS:
                yield pytest.param(name, messages, TOOLS if uses_tools else None, id=f"{name}: {title}")


@pytest.mark.parametrize(("name", "messages", "tools"), cases())
def test_the_seam_is_the_templates_text_from_where_the_answer_ends(name, messages, tools):
    tokenizer = tokenizer_of(name)
    answered = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    text = whole(tokenizer, messages, tools, add_generation_prompt=True)
    # A token of the turn's own ends it, or the marker of who speaks next.
    end = {"qwen3-base": "<|im_end|>"}.get(name, FAMILIES[name].eos)
    if name.startswith("glm"):
        end = "<|observation|>" if messages[-1]["role"] == "tool" else "<|user|>"
    last = "Oslo" if messages[answered].get("tool_calls") else "said"

    head = text.removesuffix(end + text_after_answer(tokenizer, messages, answered, ended_with=end, tools=tools))
    assert head != text and last in head and end not in head[head.index(last) :]
    assert not any(message["content"] in head[head.index(last) :] for message in messages[answered + 1 :])
    cut_off = text_after_answer(tokenizer, messages, answered, ended_with="", tools=tools)
    assert text.removesuffix(cut_off).rstrip() == head.rstrip(), "the end that the model did not come to is written for it"


@pytest.mark.parametrize(
    ("name", "ended_with", "seam"),
    [
        ("qwen2.5", "<|im_end|>", "\n<|im_start|>user\nthen?<|im_end|>\n<|im_start|>assistant\n"),
        ("qwen2.5", "", "<|im_end|>\n<|im_start|>user\nthen?<|im_end|>\n<|im_start|>assistant\n"),
        ("glm4.6", "<|user|>", "\nthen?<|assistant|>"),
        ("glm4.6", "", "<|user|>\nthen?<|assistant|>"),
        ("glm4.6", "<|endoftext|>", "<|user|>\nthen?<|assistant|>"),
        ("deepseek-v3", "<｜end▁of▁sentence｜>", "<｜User｜>then?<｜Assistant｜>"),
        ("llama3", "<|eot_id|>", "<|start_header_id|>user<|end_header_id|>\n\nthen?<|eot_id|>"
                                 "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ],
)  # fmt: skip
def test_seams_by_hand(name, ended_with, seam):
    messages = [user("ask"), answer("said"), user("then?")]
    assert text_after_answer(tokenizer_of(name), messages, 1, ended_with=ended_with) == seam
