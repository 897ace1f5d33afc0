"""One execution of an agent: every request is a list of messages, every answer is kept with its token ids and log-probs.

A request whose messages go on from an earlier answer continues that answer's tokens as they are; only what is new is rendered
and encoded (seam.py). Any other request starts a sample of its own: another prompt, a history that was rewritten, a second
answer to the same question. So the turns are a tree, each of its leaves is one sample, and what two leaves share is trained in
the first of them alone.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

from slime.rollout.agents.calls import Parsers, read_answer
from slime.rollout.agents.seam import text_after_answer
from slime.rollout.chat_template import render_conversation
from slime.rollout.generation import GenerateState, generate_once
from slime.rollout.messages import Message, check_messages
from slime.types.sample import Sample, Status


class SessionEnded(RuntimeError):
    """No further answer: the rollout is over, or the session has used up its turns or tokens."""


@dataclass(frozen=True)
class Turn:
    """One answer, and the way to it."""

    asked: list[Message]
    tools: list[dict] | None
    answer: Message
    sample: Sample
    """Everything from the first prompt to the end of this answer."""
    own: range
    """Positions of the response that this answer is."""
    ended_with: str
    """The token that ended it, as text; "" where a limit or a stop text did."""
    parent: Turn | None

    def is_continued_by(self, messages: list[Message], tools: list[dict] | None) -> bool:
        """Whether these are its messages, its answer and more."""
        known = [*self.asked, self.answer]
        return len(messages) > len(known) and tools == self.tools and all(map(same_message, known, messages))


def same_message(one: Message, other: Message) -> bool:
    """Whether two spellings say the same: agents send an answer back without its thoughts, ids and nulls."""
    return _said(one) == _said(other)


def _said(message: Message) -> tuple:
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part if isinstance(part, str) else part.get("text", "") for part in content)
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    # A text of arguments is compared as it stands, without the spaces that JSON may have or lack.
    named = [(call.get("name"), "".join(str(call.get("arguments")).split())) for call in calls]
    return message["role"], content.strip(), named


class Session:
    """The turns of one sample's execution. Its calls belong to the rollout's event loop."""

    def __init__(
        self, args: Any, sample: Sample, sampling_params: dict[str, Any], state: GenerateState, *, max_turns: int | None
    ):
        self._args, self._state, self._max_turns = args, state, max_turns
        self._sampling_params = dict(sampling_params)
        self._parsers = Parsers.of(args)
        # What an earlier, aborted execution left is not continued: whoever asked for it is gone.
        self._blank = copy.deepcopy(sample)
        self._blank.reset_for_retry()
        self._blank.tokens = []
        self._num_asked = 0
        self.sample = sample
        self.turns: list[Turn] = []
        self.aborted = False
        """The rollout ended before the agent did."""
        self.has_ended = False
        """A request was refused because a limit is reached or the rollout is over."""
        self.seconds = 0.0
        """Spent in the engines."""

    @property
    def messages(self) -> list[Message]:
        """The prompt, as messages. Raises ValueError where it has been rendered to text already."""
        if isinstance(self.sample.prompt, list):
            return copy.deepcopy(self.sample.prompt)
        if self._args.apply_chat_template:
            raise ValueError(
                "the prompt has been rendered to text, and an agent's messages are rendered here; remove --apply-chat-template"
            )
        return [{"role": "user", "content": self.sample.prompt}]

    async def ask(
        self,
        messages: list[Message],
        *,
        tools: list[dict] | None = None,
        max_tokens: int | None = None,
        stop: list[str] | None = None,
    ) -> Turn:
        """The policy's next answer.

        max_tokens bounds this answer, the response budget of the sampling parameters all that follows a prompt. Raises
        SessionEnded when there is no room, no turn or no rollout left, ValueError for messages that cannot be rendered.
        """
        check_messages(messages)
        tools = tools or None
        parent = self._continued(messages, tools)
        self._num_asked += 1
        if self.aborted:
            raise self._over()
        if self._max_turns is not None and self._num_asked > self._max_turns:
            raise self._cut(parent, f"the session has had its {self._max_turns} turns")
        sample = self._to_be_answered(messages, tools, parent)
        params = self._parameters(sample, max_tokens, stop)
        if params["max_new_tokens"] <= sample.response_length or self._context_is_full(sample):
            raise self._cut(parent, f"no room for an answer after {len(sample.tokens)} tokens")
        before, started = sample.response_length, time.monotonic()
        meta_info = await generate_once(self._args, sample, params, state=self._state)
        self.seconds += time.monotonic() - started
        if sample.status is Status.ABORTED or meta_info is None:
            raise self._over()
        written, ended_with = self._read_end(sample.tokens[len(sample.tokens) - sample.response_length + before :], meta_info)
        answer = await read_answer(written, tools, self._parsers, self._state.client)
        own = range(before, sample.response_length)
        turn = Turn(copy.deepcopy(messages), tools, answer, sample, own, ended_with, parent)
        self.turns.append(turn)
        return turn

    def samples(self) -> list[Sample]:
        """One per leaf, in the order of their ends; they share their trajectory, and each answer is trained in one of them."""
        parents = {id(turn.parent) for turn in self.turns}
        trained: set[int] = set()
        found = []
        for leaf in (turn for turn in self.turns if id(turn) not in parents):
            sample = _copy(leaf.sample)
            sample.rollout_id = self.sample.index
            sample.metadata["num_turns"] = 0
            turn: Turn | None = leaf
            while turn is not None:
                sample.metadata["num_turns"] += 1
                if id(turn) in trained:
                    sample.loss_mask[turn.own.start : turn.own.stop] = [0] * len(turn.own)
                trained.add(id(turn))
                turn = turn.parent
            found.append(sample)
        return found

    # ---------------------------------------------------------------------------------------------------- one request

    def _continued(self, messages: list[Message], tools: list[dict] | None) -> Turn | None:
        """The longest turn that these messages go on from, the latest of several."""
        fitting = [turn for turn in self.turns if turn.is_continued_by(messages, tools)]
        return max(reversed(fitting), key=lambda turn: len(turn.asked), default=None)

    def _to_be_answered(self, messages: list[Message], tools: list[dict] | None, parent: Turn | None) -> Sample:
        tokenizer, kwargs = self._state.tokenizer, self._blank.apply_chat_template_kwargs
        if parent is None:
            sample = _copy(self._blank)
            text = render_conversation(tokenizer, messages, tools, add_generation_prompt=True, **kwargs).text
            sample.tokens = tokenizer.encode(text, add_special_tokens=False)
            return sample
        sample = _copy(parent.sample)
        sample.status = Status.PENDING
        text = text_after_answer(tokenizer, messages, len(parent.asked), ended_with=parent.ended_with, tools=tools, **kwargs)
        sample.append_response_tokens(tokens=tokenizer.encode(text, add_special_tokens=False), trainable=False, text=text)
        return sample

    def _parameters(self, sample: Sample, max_tokens: int | None, stop: list[str] | None) -> dict[str, Any]:
        params = dict(self._sampling_params)
        if max_tokens is not None:
            params["max_new_tokens"] = min(params["max_new_tokens"], sample.response_length + max_tokens)
        if stop:
            params["stop"] = [*(params.get("stop") or ()), *stop]
        return params

    def _context_is_full(self, sample: Sample) -> bool:
        limit = self._state.max_context_len
        return limit is not None and len(sample.tokens) >= limit

    def _over(self) -> SessionEnded:
        self.aborted = self.has_ended = True
        return SessionEnded("the rollout has ended")

    def _cut(self, parent: Turn | None, why: str) -> SessionEnded:
        """The agent wanted to go on from there and may not: that answer is the end of a truncated sample."""
        if parent is not None:
            parent.sample.status = Status.TRUNCATED
        self.has_ended = True
        return SessionEnded(why)

    def _read_end(self, ids: list[int], meta_info: dict[str, Any]) -> tuple[str, str]:
        """(the answer's text without what ended it, the token that ended it as text)."""
        decode = self._state.tokenizer.decode
        matched = meta_info["finish_reason"].get("matched")
        if isinstance(matched, int) and ids and ids[-1] == matched:
            return decode(ids[:-1]), decode([matched])
        text = decode(ids)
        return (text.rpartition(matched)[0] if isinstance(matched, str) and matched in text else text), ""


def _copy(sample: Sample) -> Sample:
    """A sample that can grow by itself: append_response_tokens makes masks and log-probs longer in place, and nothing else."""
    grown = copy.copy(sample)
    grown.loss_mask = None if sample.loss_mask is None else list(sample.loss_mask)
    grown.rollout_log_probs = None if sample.rollout_log_probs is None else list(sample.rollout_log_probs)
    grown.metadata = dict(sample.metadata)
    grown.spec_info, grown.prefix_cache_info = copy.copy(sample.spec_info), copy.copy(sample.prefix_cache_info)
    return grown
