"""Masks with the templates that people use: equal to the tokenizer's own assistant mask, and to spans worked out by hand."""

from __future__ import annotations

import logging

import pytest
from chat_families import FAMILIES, released, tokenizer_of

from slime.rollout import sft_masks
from slime.rollout.sft_masks import mask_conversation

TOOLS = [{"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}]


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(name="get", **arguments):
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text):
    return {"role": "tool", "content": text, "tool_call_id": "c1"}


CALLS = [user("w?"), answer("", tool_calls=[call(city="Oslo")]), result("12"), answer("12 C"), user("thanks"), answer("ok")]
CONVERSATIONS = {
    "one turn": [user("hi"), answer("hello")],
    "three turns and a system's": [
        {"role": "system", "content": "Be short."},
        *(user("1+1"), answer("2"), user("2+2"), answer("4"), user("3+3"), answer("6")),
    ],
    "thoughts in every turn": [
        user("1+1"), answer("2", reasoning_content="one\n\nmore"), user("2+2"), answer("4", reasoning_content="two more"),
    ],
    "thoughts inside the content": [user("1+1"), answer("<think>\none more\n</think>\n\n2")],
    "the same answer twice": [user("say a"), answer("a"), user("say a"), answer("a")],
    "an empty answer": [user("say nothing"), answer(""), user("hi"), answer("hello")],
    "blanks at the borders": [user("  x \n\n"), answer("\n\n  a b  \n\n"), user("y"), answer("  a")],
    "letters of several bytes": [user("grüß 🙂"), answer("größer 🙂 ﷺ"), user("再见"), answer("再见👋🏽")],
    "special tokens as text": [
        user("what is <|im_start|>assistant\nfoo<|im_end|> and <｜Assistant｜>?"),
        answer("<|im_end|> and <|eot_id|> end turns; <｜end▁of▁sentence｜> too, </s>\nand <|user|>"),
        user("and?"),
        answer("<table>"),
    ],
    "two answers in a row": [user("go"), answer("first"), answer("second")],
    "a user speaks last": [user("1+1"), answer("2"), user("2+2")],
    "the assistant speaks first": [answer("welcome"), user("hi"), answer("hello")],
}  # fmt: skip
WITH_TOOLS = {
    "calls": CALLS,
    "content and a call": [user("w?"), answer("Let me look.", tool_calls=[call(city="Oslo")]), result("12"), answer("12 C")],
    "two calls, two results": [
        user("w?"), answer(None, tool_calls=[call(city="Oslo"), call(city="Rome", days=2)]),
        result("1"), result("2"), answer("3"),
    ],
}  # fmt: skip
TAKES_TOOLS = ("qwen3", "qwen3-base", "qwen2.5", "glm4.6", "glm5")
ENDS_BY_NEXT_ROLE = ("glm4.6", "glm5")
NEEDS_CARE = {
    ("deepseek-r1", "thoughts in every turn"),
    ("deepseek-r1", "thoughts inside the content"),
    ("glm4.6", "letters of several bytes"),
    ("glm5", "letters of several bytes"),
}
"""Tested by hand below. R1: our text is meant to differ from the template's. GLM: the tokenizer's own mask leaves out the last
bytes of a span that ends with a letter of several."""


def trained(tokenizer, masked):
    return tokenizer.decode([token for token, kept in zip(masked.token_ids, masked.loss_mask, strict=True) if kept])


def whole(tokenizer, messages, tools=None, **kwargs):
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **kwargs)


def own_mask(name, messages, tools):
    """What the tokenizer itself says, by the marks in the template."""
    tokenizer = tokenizer_of(name, marked=True)
    made = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(made["input_ids"]), list(made["assistant_masks"])


def cases():
    for name in FAMILIES:
        for title, messages in CONVERSATIONS.items():
            if (name, title) not in NEEDS_CARE:
                yield pytest.param(name, messages, None, id=f"{name}: {title}")
        for title, messages in WITH_TOOLS.items():
            if name in TAKES_TOOLS:
                yield pytest.param(name, messages, TOOLS, id=f"{name}: {title}")


@pytest.mark.parametrize("name, messages, tools", cases())
def test_the_mask_is_the_tokenizers_own_where_a_template_has_one(name, messages, tools):
    """Each template twice: with the marks the tokenizer judges, without them the mask is found."""
    spelled = [{**message, "content": message["content"] or ""} for message in messages]
    ids, mask = own_mask(name, spelled, tools)
    tokenizer = tokenizer_of(name)
    masked = mask_conversation(tokenizer, messages, loss_mask_type="qwen3", tools=tools)
    if name in ENDS_BY_NEXT_ROLE:
        mask = with_ends_of_turns(tokenizer, ids, mask)
        ids, mask = (ids, mask) if messages[-1]["role"] == "user" else ([*ids, tokenizer.eos_token_id], [*mask, 1])
    if name == "glm5":
        mask = without_opened_thoughts(tokenizer, ids, mask)
    assert masked.token_ids == ids
    assert masked.loss_mask == mask
    marked = mask_conversation(tokenizer_of(name, marked=True), messages, loss_mask_type="qwen3", tools=tools)
    assert (marked.token_ids, marked.loss_mask) == own_mask(name, spelled, tools)


def with_ends_of_turns(tokenizer, ids, mask):
    """GLM: the marker of the role that follows the assistant ends its turn."""
    ends = tokenizer.convert_tokens_to_ids(["<|user|>", "<|observation|>"])
    return [
        1 if token in ends and position and mask[position - 1] else kept
        for position, (token, kept) in enumerate(zip(ids, mask, strict=True))
    ]


def without_opened_thoughts(tokenizer, ids, mask):
    """GLM-5's prompt ends with <think>, so a turn that begins with it goes on from there."""
    assistant, think = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<think>"])
    return [
        0 if token == think and ids[position - 1] == assistant else kept
        for position, (token, kept) in enumerate(zip(ids, mask, strict=True))
    ]


BY_HAND = [
    # Qwen3 drops the thoughts of turns before the last question, and writes an empty pair into the last turn.
    ("qwen3", CALLS, TOOLS, {}, '<tool_call>\n{"name": "get", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
                                "12 C<|im_end|><think>\n\n</think>\n\nok<|im_end|>"),
    ("qwen3", [user("a"), answer("b", reasoning_content="c")], None, {}, "<think>\nc\n</think>\n\nb<|im_end|>"),
    ("qwen3", [user("a"), answer("b")], None, {"enable_thinking": False}, "b<|im_end|>"),
    # Its base model's tokenizer has another end token; the template's is what ends a turn.
    ("qwen3-base", [user("a"), answer("b", reasoning_content="c")], None, {}, "<think>\nc\n</think>\n\nb<|im_end|>"),
    ("qwen3.5", CONVERSATIONS["thoughts in every turn"], None, {}, "2<|im_end|>two more\n</think>\n\n4<|im_end|>"),
    ("qwen3.5", CONVERSATIONS["thoughts in every turn"], None, {"preserve_thinking": True},
     "one\n\nmore\n</think>\n\n2<|im_end|>two more\n</think>\n\n4<|im_end|>"),
    ("qwen3.5", CONVERSATIONS["a user speaks last"], None, {}, "2<|im_end|>"),
    ("glm4.6", CONVERSATIONS["letters of several bytes"], None, {},
     "\n<think></think>\ngrößer 🙂 ﷺ<|user|>\n<think></think>\n再见👋🏽<|endoftext|>"),
    ("glm5", CONVERSATIONS["letters of several bytes"], None, {}, "</think>größer 🙂 ﷺ<|user|></think>再见👋🏽<|endoftext|>"),
    ("glm4.6", CALLS, TOOLS, {}, "\n<think></think>\n<tool_call>get\n<arg_key>city</arg_key>\n<arg_value>Oslo"
                                 "</arg_value>\n</tool_call><|observation|>\n<think></think>\n12 C<|user|>"
                                 "\n<think></think>\nok<|endoftext|>"),
    ("glm4.6", CONVERSATIONS["thoughts in every turn"], None, {},
     "\n<think></think>\n2<|user|>\n<think>two more</think>\n4<|endoftext|>"),
    ("glm4.6", [user("a"), answer("b")], None, {"enable_thinking": False}, "\nb<|endoftext|>"),
    ("glm5", CONVERSATIONS["thoughts in every turn"], None, {}, "</think>2<|user|>two more</think>4<|endoftext|>"),
    ("glm5", CONVERSATIONS["thoughts in every turn"], None, {"clear_thinking": False},
     "one\n\nmore</think>2<|user|>two more</think>4<|endoftext|>"),
    ("glm5", [user("a"), answer("b")], None, {"enable_thinking": False}, "b<|endoftext|>"),
    ("glm5", [user("a"), answer("b<|endoftext|>")], None, {"enable_thinking": False}, "b<|endoftext|>"),
    # One call alone is not closed by V3's template; behind a tool's output there is no marker of the assistant.
    ("deepseek-v3", CALLS, None, {}, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n"
     '{"city": "Oslo"}\n```<｜tool▁call▁end｜>12 C<｜end▁of▁sentence｜>ok<｜end▁of▁sentence｜>'),
    # R1's prompt opens the thoughts, its template cuts them out; they are put back into the last turn.
    ("deepseek-r1", CONVERSATIONS["thoughts in every turn"], None, {},
     "2<｜end▁of▁sentence｜>two more\n</think>\n\n4<｜end▁of▁sentence｜>"),
    ("deepseek-r1", CONVERSATIONS["thoughts inside the content"], None, {}, "one more\n</think>\n\n2<｜end▁of▁sentence｜>"),
    ("deepseek-r1", [user("a"), answer("because</think>b")], None, {}, "because</think>b<｜end▁of▁sentence｜>"),
    ("deepseek-r1", [user("a"), answer("<table>")], None, {}, "<table><｜end▁of▁sentence｜>"),
    ("deepseek-v3.1", CALLS, None, {}, '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get<｜tool▁sep｜>{"city": "Oslo"}'
     "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>12 C<｜end▁of▁sentence｜>ok<｜end▁of▁sentence｜>"),
    ("deepseek-v3.1", CONVERSATIONS["thoughts in every turn"], None, {}, "2<｜end▁of▁sentence｜>4<｜end▁of▁sentence｜>"),
    # Asked to think, it is taught to: the closing mark of the template gives way to the thoughts.
    ("deepseek-v3.1", CONVERSATIONS["thoughts in every turn"], None, {"thinking": True},
     "</think>2<｜end▁of▁sentence｜>two more</think>4<｜end▁of▁sentence｜>"),
    ("qwen3", [{"role": "system", "content": "S"}, answer("hi"), user("a"), answer("b")], None, {},
     "hi<|im_end|><think>\n\n</think>\n\nb<|im_end|>"),
    ("qwen3", [user("a"), answer("<think>\nc\n</think>\n\nb", reasoning_content="", tool_calls=[])], None, {},
     "<think>\nc\n</think>\n\nb<|im_end|>"),
    ("llama3", [user("a"), answer("b", tool_calls=[])], None, {}, "b<|eot_id|>"),
    ("llama3", CALLS, None, {}, '{"name": "get", "parameters": {"city": "Oslo"}}<|eot_id|>12 C<|eot_id|>ok<|eot_id|>'),
    ("llama3", CALLS[:2], None, {"builtin_tools": ["x"]}, '{"name": "get", "parameters": {"city": "Oslo"}}<|eom_id|>'),
    ("in-loop", [user("a"), answer("b"), user("c"), answer("d")], None, {}, "b</s>d</s>"),
]  # fmt: skip


@pytest.mark.parametrize("name, messages, tools, kwargs, wanted", BY_HAND)
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_5", "glm5", "deepseek"])
def test_what_is_trained_is_what_the_model_would_say(name, messages, tools, kwargs, wanted, kind):
    tokenizer = tokenizer_of(name)
    masked = mask_conversation(tokenizer, messages, loss_mask_type=kind, tools=tools, **kwargs)
    assert trained(tokenizer, masked) == wanted


def test_the_thoughts_of_the_last_turn_stand_behind_the_generation_prompt():
    """What R1 is taught is what it would read and write when asked: the prompt ends with <think> and is not trained."""
    tokenizer = tokenizer_of("deepseek-r1")
    messages = CONVERSATIONS["thoughts in every turn"]
    masked = mask_conversation(tokenizer, messages, loss_mask_type="qwen3")
    asked = whole(tokenizer, messages[:-1], add_generation_prompt=True)
    assert tokenizer.decode(masked.token_ids) == asked + "two more\n</think>\n\n4<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("name", FAMILIES)
def test_distill_qwen_trains_the_last_turn_with_its_thoughts(name):
    tokenizer = tokenizer_of(name)
    messages = CONVERSATIONS["thoughts in every turn"]
    last = mask_conversation(tokenizer, messages, loss_mask_type="distill_qwen")
    every = mask_conversation(tokenizer, messages, loss_mask_type="qwen3")
    assert last.token_ids == every.token_ids
    text = trained(tokenizer, last)
    assert "4" in text and "2" not in text
    assert trained(tokenizer, every).endswith(text)
    knows_thoughts = name not in ("qwen2.5", "deepseek-v3", "deepseek-v3.1", "llama3", "llama3.0", "in-loop")
    assert ("two more" in text) == knows_thoughts


@pytest.mark.parametrize("kind, wanted", [("qwen3", "{call}<|im_end|>ok<|im_end|>"), ("distill_qwen", "ok<|im_end|>")])
def test_tool_calls_are_kept_and_parquets_nulls_are_not_read(kind, wanted):
    tokenizer = tokenizer_of("qwen2.5")
    nulls = {"tool_calls": None, "reasoning_content": None, "step_loss_mask": None, "tool_call_id": None}
    messages = [{**nulls, **message} for message in (CALLS[0], CALLS[1], CALLS[2], answer("ok"))]
    masked = mask_conversation(tokenizer, messages, loss_mask_type=kind, tools=TOOLS)
    text = '<tool_call>\n{"name": "get", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert trained(tokenizer, masked) == wanted.replace("{call}", text)


@pytest.mark.parametrize("name", ["qwen3", "qwen2.5", "glm4.6", "deepseek-v3", "llama3"])
@pytest.mark.parametrize("content", ["", None, "absent"])
def test_a_turn_that_only_calls_a_tool_is_written_whole_however_the_data_set_spells_it(name, content):
    """Arguments as JSON text or as a mapping, the content empty, none, or not there: one rendering."""
    tokenizer = tokenizer_of(name)
    inner = {"name": "get", "arguments": '{"city": "Oslo"}'}
    turn = {"role": "assistant", "content": content, "tool_calls": [{"id": "c", "type": "function", "function": inner}]}
    if content == "absent":
        del turn["content"]
    masked = mask_conversation(tokenizer, [CALLS[0], turn, *CALLS[2:]], loss_mask_type="qwen3", tools=None)
    wanted = mask_conversation(tokenizer, CALLS, loss_mask_type="qwen3", tools=None)
    assert masked == wanted
    text = tokenizer.decode(masked.token_ids)
    assert "get" in text and "Oslo" in text and "None" not in text and '\\"' not in text


def test_content_in_parts_is_one_text_and_pictures_are_refused():
    tokenizer = tokenizer_of("qwen3")
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1"}]
    masked = mask_conversation(tokenizer, [user(parts), answer([{"type": "text", "text": "2"}])], loss_mask_type="qwen3")
    assert masked == mask_conversation(tokenizer, [user("1+1"), answer("2")], loss_mask_type="qwen3")
    picture = [{"type": "image_url", "image_url": {"url": "x.png"}}]
    with pytest.raises(ValueError, match=r"message 0 \(user\): the content has a part of type 'image_url'"):
        mask_conversation(tokenizer, [user(picture), answer("a cat")], loss_mask_type="qwen3")


def test_a_tokens_border_inside_a_new_line_is_found_from_the_characters():
    """`assistant\\n` + `\\n\\n  a`: the merged new lines hold the prompt's last character, and are the turn's first token."""
    tokenizer = tokenizer_of("qwen2.5")
    messages = CONVERSATIONS["blanks at the borders"]
    masked = mask_conversation(tokenizer, messages, loss_mask_type="qwen")
    assert masked.token_ids == tokenizer.encode(whole(tokenizer, messages), add_special_tokens=False)
    assert trained(tokenizer, masked) == "\n\n\n  a b  \n\n<|im_end|>  a<|im_end|>"


def test_deepseeks_tokens_with_qwen_mean_the_last_turn_as_in_slime(caplog):
    sft_masks._say_once.cache_clear()
    tokenizer = tokenizer_of("deepseek-v3")
    messages = [user("1+1"), answer("2"), user("2+2"), answer("4")]
    with caplog.at_level(logging.WARNING):
        assert trained(tokenizer, mask_conversation(tokenizer, messages, loss_mask_type="qwen")) == "4<｜end▁of▁sentence｜>"
    assert "deepseek trains every turn" in caplog.text


def test_thoughts_that_a_template_leaves_out_are_said_once_with_the_switch_that_keeps_them(caplog):
    sft_masks._say_once.cache_clear()
    messages = CONVERSATIONS["thoughts in every turn"]
    with caplog.at_level(logging.WARNING):
        for name in ("glm5", "glm5", "qwen3"):
            mask_conversation(tokenizer_of(name), messages, loss_mask_type="qwen3")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and '{"clear_thinking": false}' in said[0] and "kwargs" not in said[1]


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([{"role": "system", "content": "Be short."}], "no turn of the assistant"),
        ([user("hi")], "no turn of the assistant"),
        ([], "a conversation is a list of messages"),
        ("hi", "a conversation is a list of messages"),
        ([user("hi"), {"role": "assistant"}], r"message 1 \(assistant\) has no content and calls no tool"),
        ([user("hi"), {"content": "x"}], "message 1 is .*a message has a role"),
        ([user(3), answer("x")], r"message 0 \(user\): the content is a text"),
        ([user("hi"), answer("", tool_calls=[{"id": "c"}])], "each call has a function with a name"),
        ([user("hi"), answer("x", step_loss_mask=0.5)], "step_loss_mask is 0 or 1"),
        ([user("w?"), answer("Look:", tool_calls=[call()])], "leaves out the call of 'get' in message 1"),
    ],
)
def test_a_row_that_cannot_be_trained_says_which_message_and_why(messages, reason):
    with pytest.raises(ValueError, match=reason):
        mask_conversation(tokenizer_of("deepseek-v3"), messages, loss_mask_type="qwen3")


@pytest.mark.parametrize("name", ["qwen3", "glm4.6", "deepseek-v3", "llama3"])
def test_the_older_form_of_a_call_is_the_same_conversation(name):
    """`function_call` and the role `function`, as data sets of 2023 have them; left out, an empty turn would be taught."""
    calling = {"role": "assistant", "content": None, "function_call": {"name": "get", "arguments": '{"city": "Oslo"}'}}
    older = [user("w?"), calling, {"role": "function", "name": "get", "content": "12"}, answer("12 C")]
    newer = [user("w?"), answer("", tool_calls=[call(city="Oslo")]), result("12"), answer("12 C")]
    tokenizer = tokenizer_of(name)
    masked = mask_conversation(tokenizer, older, loss_mask_type="qwen3")
    assert masked == mask_conversation(tokenizer, newer, loss_mask_type="qwen3")
    assert "get" in trained(tokenizer, masked) and "Oslo" in trained(tokenizer, masked)


@pytest.mark.parametrize(
    "name, messages",
    [
        ("llama3", [user("hi"), answer(None, reasoning_content="hm")]),
        ("deepseek-v3", [user("hi"), answer("", reasoning_content="hm")]),
        ("qwen3", [user("hi"), answer("", reasoning_content="hm"), user("so?"), answer("yes")]),
    ],
)
def test_a_turn_of_thoughts_that_the_template_leaves_out_is_refused_by_its_number(name, messages):
    with pytest.raises(ValueError, match="leaves out the thoughts of message 1, which holds nothing else"):
        mask_conversation(tokenizer_of(name), messages, loss_mask_type="qwen3")
    messages[1]["step_loss_mask"] = 0
    if len(messages) > 2:
        mask_conversation(tokenizer_of(name), messages, loss_mask_type="qwen3")


def test_messages_that_a_template_leaves_out_are_said_once(caplog):
    sft_masks._say_once.cache_clear()
    developer = [{"role": "developer", "content": "Be short."}, user("hi"), answer("yo")]
    with caplog.at_level(logging.WARNING):
        for messages in (developer, developer, [{"role": "system", "content": "Be short."}, *developer[1:]]):
            mask_conversation(tokenizer_of("qwen3"), messages, loss_mask_type="qwen3")
            mask_conversation(tokenizer_of("deepseek-v3"), messages[1:], loss_mask_type="qwen3")
    assert [record.getMessage() for record in caplog.records] == ["the chat template leaves out messages of role 'developer'"]


def test_templates_that_write_messages_twice_or_rewrite_their_text_are_refused():
    tokenizer = tokenizer_of("in-loop")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="writes message 0 in several places"):
        mask_conversation(tokenizer, [user("a"), answer("b")], loss_mask_type="qwen3")
    tokenizer.chat_template = (
        "{% set all %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ all | replace('<', '(') }}"
    )
    with pytest.raises(ValueError, match="rewrites what it has written"):
        mask_conversation(tokenizer, [user("a"), answer("b")], loss_mask_type="qwen3")


def test_a_turn_that_a_template_leaves_out_is_named_unless_nobody_trains_it():
    tokenizer = tokenizer_of("in-loop")
    tokenizer.chat_template = tokenizer.chat_template.replace("messages -%}", "messages if message.content -%}", 1)
    messages = [user("a"), answer(""), user("b"), answer("c")]
    with pytest.raises(ValueError, match="writes nothing for message 1"):
        mask_conversation(tokenizer, messages, loss_mask_type="qwen3")
    for masked in (
        mask_conversation(tokenizer, messages, loss_mask_type="distill_qwen"),
        mask_conversation(tokenizer, [user("a"), answer("", step_loss_mask=0), *messages[2:]], loss_mask_type="qwen3"),
    ):
        assert trained(tokenizer, masked) == "c</s>"
    silent = [user("a"), answer("", step_loss_mask=0)]
    assert mask_conversation(tokenizer, silent, loss_mask_type="qwen3").response_length == 0


def test_the_marks_of_the_fixtures_change_no_text():
    for name, family in FAMILIES.items():
        text = whole(tokenizer_of(name), CONVERSATIONS["three turns and a system's"])
        assert text == whole(tokenizer_of(name, marked=True), CONVERSATIONS["three turns and a system's"])
        assert "generation %" not in released(family.template)
