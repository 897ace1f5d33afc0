"""The text between a recorded answer and the next one.

A template rendered anew does not give back what the model wrote: spaces, JSON and thoughts of earlier turns come out
otherwise, and an encoding of the same text may be other tokens. So recorded ids stay as they are, and only what follows them is
rendered: the rest of the turn's end, the new messages, and the generation prompt.
"""

from __future__ import annotations

from typing import Any

from slime.rollout.chat_template import Rendering, render_conversation
from slime.rollout.messages import Message

_PROBE = "slime-probe-of-a-turn"


def text_after_answer(
    tokenizer: Any, messages: list[Message], answered: int, *, ended_with: str, tools: list | None = None, **kwargs: Any
) -> str:
    """What follows the answer `messages[answered]` in the model's eyes, up to where it is to speak again.

    ended_with: the token by which the model ended that answer, as text; "" where a limit or a stop text ended it. It is not
    said twice: templates write it at the end of the turn (Qwen's <|im_end|>), or as the next role's marker (GLM's
    <|observation|>). Raises ValueError for messages that the template does not take.
    """
    found = render_conversation(tokenizer, messages, tools, add_generation_prompt=True, **kwargs)
    following = found.text[found.spans[answered][1] :]
    if ended_with and found.of(answered).rstrip().endswith(ended_with):
        turn = found.of(answered)
        return turn[turn.rindex(ended_with) + len(ended_with) :] + following
    if ended_with and following.startswith(ended_with):
        return following.removeprefix(ended_with)
    return _closing(tokenizer, found, answered, **kwargs) + following


def _closing(tokenizer: Any, found: Rendering, answered: int, **kwargs: Any) -> str:
    """How the template ends a turn that says something; "" where the next role's marker does."""
    messages = [*found.messages[:answered], {"role": "assistant", "content": _PROBE}]
    probed = render_conversation(tokenizer, messages, None, **kwargs).of(answered)
    return probed.rpartition(_PROBE)[2]
