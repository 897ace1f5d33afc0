"""One rendering of a conversation, and which of its characters each message is.

A chat template walks over the messages in a loop. The template is compiled a second time with a mark at the start of every
pass and at the end of every loop, so the text between two marks is what the template wrote for one message, whatever the text
says. A rendering with its marks removed must be the tokenizer's own, or it is refused.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import Template, nodes
from jinja2.visitor import NodeTransformer

from slime.rollout.messages import Message, call_name, check_messages, spellings

_TAG = f"<{uuid.uuid4().hex}:"
_MARK = re.compile(re.escape(_TAG) + r"(\d+):(\d+|end)>")


@dataclass(frozen=True)
class Rendering:
    """A conversation as the model reads it."""

    text: str
    messages: list[Message]
    """As they were spelled for the template."""
    spans: tuple[tuple[int, int], ...]
    """Per message, (start, end) of its characters; (0, 0) for one that the template writes nothing for."""
    epilogue: str
    """What follows the last message that wrote anything: the generation prompt, when one was asked for."""

    def of(self, position: int) -> str:
        """The text of one message."""
        start, end = self.spans[position]
        return self.text[start:end]

    def lost_call(self, position: int) -> str | None:
        """A tool that the message calls and its text does not name."""
        names = [call_name(call) for call in self.messages[position].get("tool_calls") or ()]
        return next((name for name in names if name not in self.of(position)), None)


def render_conversation(
    tokenizer: Any, messages: list[Message], tools: list | None, *, add_generation_prompt: bool = False, **kwargs: Any
) -> Rendering:
    """The first spelling of the messages that the tokenizer's template takes, with all tool calls in it.

    Raises ValueError naming the message that is no message, or whose calls the template leaves out; and what the template
    itself raises.
    """
    check_messages(messages)
    failure: Exception | None = None
    lost = ""
    for spelled in spellings(messages):
        try:
            found = _render(tokenizer, spelled, tools, add_generation_prompt, kwargs)
        except Exception as error:  # a template may fail in any way at a spelling that it was not written for
            failure = failure or error
            continue
        losing = [(position, name) for position in range(len(spelled)) if (name := found.lost_call(position)) is not None]
        if not losing:
            return found
        lost = lost or "the chat template leaves out the call of {1!r} in message {0}".format(*losing[0])
    raise ValueError(f"{lost}; train on turns that it can write") if lost or failure is None else failure


def _render(tokenizer: Any, messages: list[Message], tools: list | None, prompt: bool, kwargs: dict[str, Any]) -> Rendering:
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **kwargs)
    marks = _Marks()
    known = [_Known(message, position) for position, message in enumerate(messages)]
    marked = _marked_template(tokenizer.get_chat_template(tools=tools)).render(
        messages=known, tools=tools, documents=None, add_generation_prompt=prompt,
        **{**tokenizer.special_tokens_map, **kwargs}, **{_PASS: marks.pass_begins, _END: marks.loop_ends},
    )  # fmt: skip
    found = _read_marks(marked, messages)
    if found.text != text:
        raise ValueError("the chat template rewrites what it has written, so its messages cannot be told apart")
    return found


class _Known(dict):
    """A message that knows its position, wherever the template takes it from."""

    def __init__(self, message: Message, position: int):
        super().__init__(message)
        self._position = position


class _Marks:
    """What a marked template calls while it renders."""

    def __init__(self) -> None:
        self._walking: set[int] = set()

    def pass_begins(self, loop: int, item: Any) -> str:
        if not isinstance(item, _Known):
            return ""
        self._walking.add(loop)
        return f"{_TAG}{loop}:{item._position}>"

    def loop_ends(self, loop: int) -> str:
        if loop not in self._walking:
            return ""
        self._walking.remove(loop)
        return f"{_TAG}{loop}:end>"


_PASS, _END = "slime_pass_begins", "slime_loop_ends"


class _AddMarks(NodeTransformer):
    """`{% for m in x %}...{% endfor %}` -> `{% for m in x %}{{ pass(n, m) }}...{% endfor %}{{ end(n) }}`, for every loop."""

    def __init__(self) -> None:
        self.num_loops = 0

    def visit_For(self, loop: nodes.For) -> list[nodes.Node]:
        number, self.num_loops = self.num_loops, self.num_loops + 1
        self.generic_visit(loop)
        targets = loop.target.items if isinstance(loop.target, nodes.Tuple) else [loop.target]
        names = [target.name for target in targets if isinstance(target, nodes.Name)]
        begins = [_call(_PASS, nodes.Const(number), nodes.Name(name, "load")) for name in names]
        loop.body = [*(nodes.Output([call]) for call in begins), *loop.body]
        return [loop, nodes.Output([_call(_END, nodes.Const(number))])]


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load"), list(arguments), [], None, None)


@lru_cache(maxsize=16)
def _marked_template(source: str) -> Template:
    # transformers' own environment: its filters, its {% generation %} tag, its white space.
    # Imported here, as the tokenizers are: it takes a second, which whoever only names a rollout module should not pay.
    from transformers.utils import chat_template_utils

    environment = chat_template_utils._compile_jinja_template(source).environment
    tree = _AddMarks().visit(environment.parse(source))
    tree.set_environment(environment)
    for node in tree.find_all(nodes.Node):
        node.lineno = node.lineno or 1
    return environment.from_string(tree)


def _read_marks(marked: str, messages: list[Message]) -> Rendering:
    """Text without marks, and to which message each piece of it belongs: that of the innermost loop over messages."""
    pieces: list[str] = []
    owned: list[tuple[int, int, int]] = []  # (message, start, end)
    loops: list[tuple[int, int]] = []  # (loop, message), innermost last
    length, position = 0, 0

    def take(until: int) -> None:
        nonlocal length
        piece = marked[position:until]
        if loops and piece:
            owned.append((loops[-1][1], length, length + len(piece)))
        pieces.append(piece)
        length += len(piece)

    for mark in _MARK.finditer(marked):
        take(mark.start())
        position = mark.end()
        loop = int(mark[1])
        if loops and loops[-1][0] == loop:
            loops.pop()
        if mark[2] != "end":
            loops.append((loop, int(mark[2])))
    take(len(marked))
    text = "".join(pieces)
    spans = tuple(_span_of(text, owned, number) for number in range(len(messages)))
    last = max((end for _, end in spans), default=0)
    return Rendering(text, messages, spans, text[last:] if last else "")


def _span_of(text: str, owned: list[tuple[int, int, int]], message: int) -> tuple[int, int]:
    """From the first to the last piece of the message that is not blank; a loop that only looks around writes blanks."""
    mine = [(start, end) for number, start, end in owned if number == message and text[start:end].strip()]
    if not mine:
        return 0, 0
    start, end = mine[0][0], mine[-1][1]
    if any(text[a:b].strip() for number, a, b in owned if number != message and a < end and b > start):
        raise ValueError(f"the chat template writes message {message} in several places")
    return start, end
