"""What a response is to a grader: without the model's end tokens, the part after the thought, the content of the last box.

Everything here takes time linear in the length of the text.
"""

from __future__ import annotations

import re

# Written by the model, kept by the engine (no_stop_trim): they end the text and are no part of the answer.
_END_TOKENS = (
    "</s>", "<eos>", "<end_of_turn>", "<turn|>", "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>", "[EOS]", "[EOT]", "[e~[",
    "<pad>", "<end_of_sentence>", "</assistant>", "<extra_id_1>", "[/INST]", "<end_of_utterance>", "<seed:eos>", "<eot>",
    "<eod>", "<sop>", "[gMASK]",
)  # fmt: skip
# <|im_end|>, <|endoftext|>, <|user|>, <|observation|>, <|eot_id|>, <|end_of_text|>, DeepSeek's <｜User｜>, EXAONE's
# [|endofturn|] and their like.
_CONTROL = re.compile(r"(?:<[|｜][^<>|｜\s]{1,40}[|｜]>|\[\|[a-z_]{1,40}\|\])\Z")
_LONGEST_TOKEN = 48

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")


def without_end_tokens(text: str) -> str:
    """The text up to the end tokens and white space that close it."""
    end = len(text)
    while True:
        while end and text[end - 1].isspace():
            end -= 1
        tail = text[max(0, end - _LONGEST_TOKEN) : end]
        token = next((token for token in _END_TOKENS if tail.endswith(token)), None)
        control = _CONTROL.search(tail) if token is None else None
        if token is None and control is None:
            return text[:end]
        end -= len(token) if token is not None else len(control[0])


def answer_part(text: str) -> str:
    """What follows the last thought; nothing, when the text is a thought that never ended."""
    after = text.rpartition("</think>")[2]
    return "" if after.lstrip().startswith("<think>") else after


def last_boxed(text: str) -> str | None:
    """Content of the last \\boxed or \\fbox: what its braces hold, or the one word that follows it.

    None if there is no box, or if the last one does not close: the answer was being revised, and an earlier one does not count.
    """
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    while start >= 0:
        command = _BOX.match(text, start)
        if command is not None:
            return _content(text, command.end())
        start = max(text.rfind("\\boxed", 0, start), text.rfind("\\fbox", 0, start))
    return None


def _content(text: str, start: int) -> str | None:
    while start < len(text) and text[start].isspace():
        start += 1
    if text[start : start + 1] != "{":
        word = re.match(r"[^\s$]{1,200}", text[start : start + 200])
        return word[0] if word else None
    depth, position = 0, start
    while position < len(text):
        char = text[position]
        if char == "\\":
            position += 1  # an escaped brace is content
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : position].strip()
        position += 1
    return None
