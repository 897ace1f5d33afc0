"""A conversation -> token ids and which of them an assistant wrote, for supervised training.

The masked span of a turn is what the model itself would generate there: the content, and the token that ends the turn. It is
found by rendering prefixes of the conversation: the assistant's turn is the text that the template adds after its generation
prompt. So the template decides, and one function serves every family whose template renders a conversation as a prefix of its
continuation; where a template does not (it drops the thoughts of earlier turns), that is an error, never a wrong mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

# Values of --loss-mask-type -> how the end of a turn is taught. "marker": the template writes an end-of-turn token after the
# content (Qwen's <|im_end|>). "next_role": the turn ends where the next role's marker begins (GLM's <|user|>), so that marker
# is trained too.
_ALIASES = {"qwen": "prefix", "qwen3": "prefix", "glm": "prefix", "glm5": "prefix", "distill_qwen": "distill"}


@dataclass(frozen=True)
class MaskedConversation:
    """The ids of the whole conversation and, per id, whether it is trained."""

    token_ids: list[int]
    loss_mask: list[int]

    @property
    def response_length(self) -> int:
        """From the first trained token to the end; 0 when nothing is trained."""
        return len(self.loss_mask) - self.loss_mask.index(1) if 1 in self.loss_mask else 0


def mask_conversation(
    tokenizer: Any, messages: list[Message], *, loss_mask_type: str, tools: list | None = None, **template_kwargs: Any
) -> MaskedConversation:
    """Ids and mask of one conversation. A message with `step_loss_mask` other than 1 is not trained.

    Raises ValueError when the last message is not the assistant's, or the template is not prefix-stable.
    """
    if loss_mask_type not in _ALIASES:
        raise ValueError(f"--loss-mask-type {loss_mask_type!r} is not one of {', '.join(sorted(_ALIASES))}")
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError(f"a conversation to train on ends with the assistant; this one ends with {messages[-1:]}")
    if _ALIASES[loss_mask_type] == "distill" or "<｜Assistant｜>" in tokenizer.get_added_vocab():
        # Distilled Qwen templates cut the thoughts out of earlier turns: only the last turn is what the model would see.
        return _last_turn(tokenizer, messages, tools, template_kwargs)
    return _every_turn(tokenizer, messages, tools, template_kwargs)


def _render(tokenizer: Any, messages: list[Message], tools: list | None, kwargs: dict[str, Any], *, prompt: bool) -> str:
    plain = [{key: value for key, value in message.items() if key != "step_loss_mask"} for message in messages]
    return tokenizer.apply_chat_template(plain, tools=tools, tokenize=False, add_generation_prompt=prompt, **kwargs)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _wanted(message: Message) -> int:
    return int(message.get("step_loss_mask", 1) == 1)


def _every_turn(tokenizer: Any, messages: list[Message], tools: list | None, kwargs: dict[str, Any]) -> MaskedConversation:
    """Token ids are made piece by piece: prompt up to the turn, then the turn, so that the border is a token border."""
    ids: list[int] = []
    mask: list[int] = []
    done = ""
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:position], tools, kwargs, prompt=True)
        after = _render(tokenizer, messages[: position + 1], tools, kwargs, prompt=False)
        _check_prefix(done, before, position)
        _check_prefix(before, after, position)
        context = _encode(tokenizer, before[len(done) :])
        if context and mask and _ends_open(tokenizer, ids):
            # The turn before had no end token of its own: the next role's marker is what ends it, and is trained with it.
            mask_first = mask[-1]
        else:
            mask_first = 0
        ids += context
        mask += [mask_first, *[0] * (len(context) - 1)] if context else []
        turn, trailer = _split_trailer(tokenizer, _encode(tokenizer, after[len(before) :]))
        ids += turn + trailer
        mask += [_wanted(message)] * len(turn) + [0] * len(trailer)
        done = after
    if _ends_open(tokenizer, ids):
        ids.append(tokenizer.eos_token_id)
        mask.append(_wanted(messages[-1]))
    return MaskedConversation(ids, mask)


def _check_prefix(shorter: str, longer: str, position: int) -> None:
    if not longer.startswith(shorter):
        pairs = enumerate(zip(shorter, longer, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(shorter), len(longer)))
        raise ValueError(
            f"message {position}: the chat template changes what came before (character {same}: "
            f"{shorter[same : same + 30]!r} becomes {longer[same : same + 30]!r}); --loss-mask-type distill_qwen trains "
            f"the last turn only"
        )


def _split_trailer(tokenizer: Any, ids: list[int]) -> tuple[list[int], list[int]]:
    """What follows the end-of-turn token (Qwen's newline) belongs to the template, not to the model."""
    eos = tokenizer.eos_token_id
    if eos in ids:
        end = len(ids) - ids[::-1].index(eos)
        return ids[:end], ids[end:]
    return ids, []


def _ends_open(tokenizer: Any, ids: list[int]) -> bool:
    """Whether the last turn was not closed by an end token (a template's newline may follow one)."""
    return tokenizer.eos_token_id not in ids[-3:]


def _last_turn(tokenizer: Any, messages: list[Message], tools: list | None, kwargs: dict[str, Any]) -> MaskedConversation:
    prompt = _encode(tokenizer, _render(tokenizer, messages[:-1], tools, kwargs, prompt=True))
    turn = _encode(tokenizer, messages[-1]["content"])
    if tokenizer.eos_token_id not in turn[-1:]:
        turn.append(tokenizer.eos_token_id)
    return MaskedConversation(prompt + turn, [0] * len(prompt) + [_wanted(messages[-1])] * len(turn))
