"""A conversation -> token ids and which of them an assistant wrote, for supervised training.

The conversation is rendered once, by the tokenizer's template. Trained of an assistant's turn is what the model itself would
generate there: what the template writes for the message after its generation prompt, with the token that ends the turn, and
without the white space behind it. A template that marks the assistant's text itself (`{% generation %}`) is taken at its word.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from slime.rollout.chat_template import Rendering, render_conversation
from slime.rollout.messages import STEP_LOSS_MASK, Message, check_messages, thoughts_of

logger = logging.getLogger(__name__)

EVERY_TURN, LAST_TURN = "every turn", "last turn"
# Values of --loss-mask-type -> which of the assistant's turns are trained. How a turn begins and ends is the template's affair.
MASK_TYPES = {
    "qwen": EVERY_TURN, "qwen3": EVERY_TURN, "qwen3_5": EVERY_TURN, "glm": EVERY_TURN, "glm5": EVERY_TURN,
    "deepseek": EVERY_TURN, "llama3": EVERY_TURN, "distill_qwen": LAST_TURN,
}  # fmt: skip
_DEEPSEEK = "<｜Assistant｜>"
_OTHER_ENDS = ("<|eom_id|>",)
"""Ends of a turn that a template writes in some turns only: Llama-3.1 after a call of a built-in tool."""
_SPAN_TAG = re.compile(r"\{%-?\+?\s*generation\s*\+?-?%\}")
_PROBE = "PROBE"


@dataclass(frozen=True)
class MaskedConversation:
    """The ids of the whole conversation and, per id, whether it is trained."""

    token_ids: list[int]
    loss_mask: list[int]

    @property
    def response_length(self) -> int:
        """From the first trained token to the end; 0 when nothing is trained."""
        return len(self.loss_mask) - self.loss_mask.index(1) if 1 in self.loss_mask else 0


@dataclass(frozen=True)
class Turn:
    """The characters of one assistant message that the model would have generated."""

    message: int
    start: int
    end: int
    closed: bool
    """The template wrote the token that ends it."""


def mask_conversation(
    tokenizer: Any, messages: list[Message], *, loss_mask_type: str, tools: list | None = None, **template_kwargs: Any
) -> MaskedConversation:
    """Ids and mask of one conversation. A message with `step_loss_mask` 0 is not trained.

    Raises ValueError for a conversation without an assistant, for a message of an unusable kind, and where the template leaves
    out what is to be trained.
    """
    if loss_mask_type not in MASK_TYPES:
        raise ValueError(f"--loss-mask-type {loss_mask_type!r} is not one of {', '.join(sorted(MASK_TYPES))}")
    check_messages(messages)
    answers = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError(
            f"a conversation to train on ends with the assistant; this one has no turn of the assistant and ends with "
            f"{str(messages[-1:])[:80]}"
        )
    wanted = {position for position in answers if messages[position].get(STEP_LOSS_MASK) in (None, 1)}
    if _only_last_turn(tokenizer, loss_mask_type):
        wanted &= {answers[-1]}
    whole = render_conversation(tokenizer, messages, tools, **template_kwargs)
    if _SPAN_TAG.search(tokenizer.get_chat_template(tools=tools)):
        return _marked_by_template(tokenizer, whole, wanted, tools, template_kwargs)
    for position in sorted(wanted):
        if not whole.of(position):
            raise ValueError(f"the chat template writes nothing for message {position}; leave it out, or give it a content")
    answers = [position for position in answers if whole.of(position)]
    family = _Family(tokenizer, tools, template_kwargs)
    turns = [family.turn(whole, position) for position in answers]
    if turns:
        whole, turns = family.with_last_thoughts(whole, turns)
    trained = [turn for turn in turns if turn.message in wanted]
    for turn in trained:
        _refuse_emptied(whole, turn, (family.end, tokenizer.eos_token, *_OTHER_ENDS))
    _say_what_is_lost(tokenizer.get_chat_template(tools=tools), whole, turns)
    return _mask(tokenizer, whole, trained, family.end)


def _only_last_turn(tokenizer: Any, loss_mask_type: str) -> bool:
    if loss_mask_type == "qwen" and _DEEPSEEK in tokenizer.get_added_vocab():
        # slime's rule for `qwen`: a distilled Qwen has Qwen's name and DeepSeek's template.
        _say_once("--loss-mask-type qwen trains the last turn alone with DeepSeek's tokens; deepseek trains every turn")
        return True
    return MASK_TYPES[loss_mask_type] == LAST_TURN


class _Family:
    """How one template begins and ends an assistant's turn, found by rendering with it."""

    def __init__(self, tokenizer: Any, tools: list | None, kwargs: dict[str, Any]):
        self._tokenizer, self._tools, self._kwargs = tokenizer, tools, kwargs
        self._prompts: dict[str, str] = {}
        self.end = self._end_of_turn()

    def _render(self, messages: list[Message], *, prompt: bool) -> Rendering:
        return render_conversation(self._tokenizer, messages, self._tools, add_generation_prompt=prompt, **self._kwargs)

    def _end_of_turn(self) -> str:
        """What closes a plain turn (Qwen's <|im_end|>); empty where the marker of the next role does (GLM)."""
        user = {"role": "user", "content": _PROBE}
        try:
            probe = self._render([user, {"role": "assistant", "content": _PROBE}, user], prompt=False)
        except Exception:  # a template that refuses this small conversation closes turns as the tokenizer says
            return self._tokenizer.eos_token or ""
        return probe.of(1).rpartition(_PROBE)[2].strip()

    def turn(self, whole: Rendering, position: int) -> Turn:
        start, end = whole.spans[position]
        text = whole.of(position)
        prompt = self.generation_prompt(whole.messages[:position])
        if position == 0 and prompt:
            # What a template begins with may be written inside the loop, as a part of the first message (Llama-3's <bos>).
            start += max(text.find(prompt), 0)
        begin = start + self._header(whole.text[start:end], prompt)
        bare = text.rstrip()
        closed = bare.endswith(tuple(mark for mark in (self.end, self._tokenizer.eos_token, *_OTHER_ENDS) if mark))
        return Turn(position, begin, whole.spans[position][0] + len(bare) if closed else end, closed=closed)

    def generation_prompt(self, before: list[Message]) -> str:
        """What the template writes after these messages for the model to go on. It depends on who spoke last (DeepSeek)."""
        last = before[-1]["role"] if before else ""
        if last not in self._prompts:
            self._prompts[last] = self._ask_generation_prompt(before)
        return self._prompts[last]

    def _ask_generation_prompt(self, before: list[Message]) -> str:
        for messages in (before, [{"role": "user", "content": _PROBE}]):
            try:
                asked = self._render(messages, prompt=True)
                if asked.epilogue:
                    return asked.epilogue
                # Written inside the loop, as a part of the last message.
                return asked.text.removeprefix(self._render(messages, prompt=False).text)
            except Exception:  # no message yet, or one that a template does not begin with: ask with a user's
                continue
        return ""

    def _header(self, text: str, prompt: str) -> int:
        """Characters of the turn that the generation prompt gave: the longest run of its whole tokens that the turn begins
        with. R1's prompt ends with <think>, its earlier turns have none, and `<table>` begins like one."""
        borders = [len(prompt), *(end for _, end in reversed(_encode(self._tokenizer, prompt)[1]))] if prompt else []
        return next((border for border in borders if text.startswith(prompt[:border])), 0)

    def with_last_thoughts(self, whole: Rendering, turns: list[Turn]) -> tuple[Rendering, list[Turn]]:
        """R1's template cuts the thoughts out of every turn, also of the one that is being taught: they are put back, as the
        model would generate them after its prompt."""
        last = turns[-1]
        message, text = whole.messages[last.message], whole.of(last.message)
        thoughts, prompt = thoughts_of(message), self.generation_prompt(whole.messages[: last.message])
        knows = "</think>" in self._tokenizer.get_chat_template(tools=self._tools)
        ends_here = last.message == len(whole.messages) - 1
        if not thoughts or thoughts in text or not knows or not ends_here or "</think>" in prompt:
            return whole, turns
        start, end = whole.spans[last.message]
        written = _with_thoughts(prompt, message, whole.text[last.start : end])
        text = whole.text[:start] + prompt + written + whole.text[end:]
        moved = len(text) - len(whole.text)
        return (
            replace(whole, text=text, spans=(*whole.spans[:-1], (start, end + moved))),
            [*turns[:-1], replace(last, start=start + len(prompt), end=last.end + moved)],
        )


_EMPTY_THOUGHTS = re.compile(r"\s*(<think>\s*)?</think>")


def _with_thoughts(prompt: str, message: Message, written: str) -> str:
    """The turn behind its generation prompt: the thoughts, as the data set wrote them or in the prompt's manner, then what the
    template wrote without them."""
    content = message.get("content") or ""
    if "</think>" in content:
        thoughts = content.rpartition("</think>")[0] + "</think>"
    elif prompt.endswith("<think>"):
        thoughts = f"{thoughts_of(message)}</think>"
    else:
        thoughts = f"<think>\n{thoughts_of(message)}\n</think>\n\n"
    if empty := _EMPTY_THOUGHTS.match(written):
        written = written[empty.end() :]
    return thoughts[_overlap(prompt, thoughts) :] + written


def _overlap(before: str, after: str) -> int:
    """Length of the longest end of `before` that `after` begins with."""
    return next(size for size in range(min(len(before), len(after)), -1, -1) if before.endswith(after[:size]))


def _mask(tokenizer: Any, whole: Rendering, turns: list[Turn], end_of_turn: str) -> MaskedConversation:
    ids, covers = _encode(tokenizer, whole.text)
    mask = [0] * len(ids)
    for turn in turns:
        beyond = _paint(mask, covers, turn)
        following = whole.messages[turn.message + 1]["role"] if turn.message + 1 < len(whole.messages) else None
        if turn.closed:
            continue
        if following is None and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
            mask.append(1)
        elif following not in (None, "assistant") and end_of_turn == "":
            # GLM stops at the next role's marker, so that marker is the turn's last token.
            mask[beyond] = 1
    return MaskedConversation(ids, mask)


def _paint(mask: list[int], covers: list[tuple[int, int]], turn: Turn) -> int:
    """Set the tokens that hold a character of the turn, also one that reaches over its border. Gives the next token."""
    first = bisect_right(covers, turn.start, key=lambda cover: cover[1])
    beyond = bisect_left(covers, turn.end, key=lambda cover: cover[0])
    mask[first:beyond] = [1] * (beyond - first)
    return beyond


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """(ids, the characters that each token covers). Raises ValueError for a tokenizer that cannot tell the latter."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"supervised training needs a fast tokenizer (tokenizer.json); {type(tokenizer).__name__} is a slow one"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    covers, end = [], 0
    for a, b in encoded["offset_mapping"]:
        # Some tokenizers tell offsets without the blanks before a word; the token has eaten them all the same.
        covers.append((min(a, end), b))
        end = max(end, b)
    return list(encoded["input_ids"]), covers


def _marked_by_template(
    tokenizer: Any, whole: Rendering, wanted: set[int], tools: list | None, kwargs: dict[str, Any]
) -> MaskedConversation:
    """The tokenizer's own assistant mask, without the turns that are not wanted."""
    made = tokenizer.apply_chat_template(
        whole.messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **kwargs
    )
    ids, covers = _encode(tokenizer, whole.text)
    assert list(made["input_ids"]) == ids, "the template's tokens are those of its text"
    left_out = [whole.spans[position] for position in range(len(whole.messages)) if position not in wanted]
    mask = [
        int(bool(own) and not any(start < end and a < end and b > start for start, end in left_out))
        for own, (a, b) in zip(made["assistant_masks"], covers, strict=True)
    ]
    return MaskedConversation(ids, mask)


def _refuse_emptied(whole: Rendering, turn: Turn, ends: tuple[str | None, ...]) -> None:
    """A turn of thoughts alone, which the template leaves out, would teach the model to say nothing."""
    nothing = whole.text[turn.start : turn.end].strip() in ("", *ends)
    if nothing and thoughts_of(whole.messages[turn.message]):
        raise ValueError(
            f"the chat template leaves out the thoughts of message {turn.message}, which holds nothing else; "
            f"give it a content, or step_loss_mask 0"
        )


def _say_what_is_lost(template: str, whole: Rendering, turns: list[Turn]) -> None:
    """Messages, thoughts and contents that the template does not write; said once per kind."""
    for message, span in zip(whole.messages, whole.spans, strict=True):
        content = message["content"]
        if span == (0, 0) and isinstance(content, str) and content.strip() not in whole.text:
            _say_once(f"the chat template leaves out messages of role {message['role']!r}")
    for turn in turns:
        message, text = whole.messages[turn.message], whole.text[turn.start : turn.end]
        if (thoughts := thoughts_of(message)) and thoughts not in text:
            _say_once(
                f"the chat template leaves thoughts out of turns, which are trained without them{_keeps_thoughts(template)}"
            )
        content = message.get("content")
        answer = content.rpartition("</think>")[2].strip() if isinstance(content, str) else ""
        if answer not in text:
            _say_once("the chat template leaves the content out of turns (Llama's, where tools are called)")


def _keeps_thoughts(template: str) -> str:
    """How to tell this template to keep them, where it can be told."""
    for word, value in (("preserve_thinking", "true"), ("clear_thinking", "false")):
        if word in template:
            return f"; --apply-chat-template-kwargs '{{\"{word}\": {value}}}' keeps them"
    return ""


@lru_cache(maxsize=64)
def _say_once(sentence: str) -> None:
    logger.warning(sentence)
