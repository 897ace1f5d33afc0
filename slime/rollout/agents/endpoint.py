"""/v1/chat/completions in front of the policy: an agent framework is trained by giving it another base_url and api_key.

One server per event loop of rollouts, on loopback, started by the first session that needs it. Every session has a key of its
own, drawn when it opens and worth nothing once it closes. A request is answered by the session (session.py), which records what
the engine was sent and what it said.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import json
import logging
import secrets
import socket
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict

from slime.rollout.agents.loop import Reward, run_agent
from slime.rollout.agents.session import Session, SessionEnded, Turn
from slime.rollout.messages import Message
from slime.types.sample import Sample, Status

logger = logging.getLogger(__name__)

MODEL = "policy"
_START_SECONDS = 60.0


@dataclass(frozen=True)
class Address:
    """What an agent needs to talk to the policy."""

    base_url: str
    api_key: str
    messages: list[Message]
    """The prompt."""

    @property
    def environment(self) -> dict[str, str]:
        """The variables that OpenAI's clients read, for an agent in a process of its own."""
        return {"OPENAI_BASE_URL": self.base_url, "OPENAI_API_KEY": self.api_key}


async def serve_agent(
    args: Any,
    sample: Sample,
    sampling_params: dict[str, Any],
    agent: Callable[[Address], Awaitable[Reward] | Reward],
    *,
    max_turns: int | None = 64,
) -> list[Sample]:
    """run_agent() for an agent that speaks HTTP: it gets an address instead of the session.

    A plain function runs in a thread, so a framework that blocks is no harm. A client that goes away in the middle of a request
    ends that request, and nothing of it is recorded.
    """

    async def with_address(session: Session) -> Reward:
        server = await _server_here()
        async with server.opened(session) as address:
            answer = agent(address) if inspect.iscoroutinefunction(agent) else asyncio.to_thread(agent, address)
            return await answer

    return await run_agent(args, sample, sampling_params, with_address, max_turns=max_turns)


class ChatRequest(BaseModel):
    """The fields that are read. The rest is taken and has no effect, and that is said once."""

    model_config = ConfigDict(extra="allow")

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    n: int | None = 1
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    model: str | None = None

    def problem(self) -> str | None:
        """What cannot be trained: an answer that the policy was not free to give has no log-prob of the policy's."""
        if self.n not in (None, 1):
            return f"n is {self.n}; ask once for each answer"
        if self.tool_choice not in (None, "auto", "none"):
            return f"tool_choice is {self.tool_choice!r}; the policy chooses: auto or none"
        if self.response_format is not None and self.response_format.get("type") != "text":
            return f"response_format is {self.response_format.get('type')!r}; the policy's tokens are not constrained"
        return None


_SILENT = {"user", "metadata", "store", "seed", "service_tier", "parallel_tool_calls"}
"""Fields without effect that lose nothing."""


@dataclass(frozen=True)
class _Open:
    session: Session
    context: contextvars.Context
    """Of the sample that the session belongs to: the server's own is that of whoever started it."""


class Endpoint:
    """The server of one event loop."""

    def __init__(self) -> None:
        self._open: dict[str, _Open] = {}
        self._told: set[str] = set()
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.base_url = "http://127.0.0.1:{1}/v1".format(*self._socket.getsockname())
        config = uvicorn.Config(self._app(), log_level="warning", access_log=False, lifespan="off")
        self._server = uvicorn.Server(config)

    async def start(self) -> None:
        # Kept: the loop itself holds tasks weakly.
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        deadline = time.monotonic() + _START_SECONDS
        while not self._server.started:
            if self._task.done() or time.monotonic() > deadline:
                raise RuntimeError(f"the endpoint of agents did not start at {self.base_url}")
            await asyncio.sleep(0.01)
        logger.info("agents reach the policy at %s, each session with a key of its own", self.base_url)

    @contextlib.asynccontextmanager
    async def opened(self, session: Session) -> AsyncIterator[Address]:
        key = f"sk-{secrets.token_hex(24)}"
        self._open[key] = _Open(session, contextvars.copy_context())
        try:
            yield Address(self.base_url, key, session.messages)
        finally:
            del self._open[key]

    def _app(self) -> FastAPI:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"], response_model=None)
        app.add_api_route("/v1/models", self._models, methods=["GET"], response_model=None)
        app.add_exception_handler(RequestValidationError, _refuse_fields)
        return app

    def _opened_by(self, request: Request) -> _Open | None:
        return self._open.get(request.headers.get("Authorization", "").removeprefix("Bearer "))

    async def _models(self, request: Request) -> JSONResponse:
        if self._opened_by(request) is None:
            return _refusal(401, "no open session has this key")
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "slime"}]})

    async def _chat(self, body: ChatRequest, request: Request) -> JSONResponse | StreamingResponse:
        opened = self._opened_by(request)
        if opened is None:
            return _refusal(401, "no open session has this key")
        if problem := body.problem():
            return _refusal(400, problem)
        self._tell_unread(body)
        try:
            work = asyncio.create_task(_asked(opened.session, body), context=opened.context)
            turn = await _while_connected(request, work)
        except SessionEnded as error:
            return _refusal(400, str(error), code="context_length_exceeded")
        except ValueError as error:
            return _refusal(400, str(error))
        if turn is None:
            return _refusal(499, "the client has gone")
        return _streamed(turn, body) if body.stream else JSONResponse(_completion(turn))

    def _tell_unread(self, body: ChatRequest) -> None:
        unread = {name for name, value in (body.model_extra or {}).items() if value is not None} - _SILENT - self._told
        if unread:
            self._told |= unread
            logger.info(
                "agents send %s, without effect: how the policy samples is said by the run's flags", ", ".join(sorted(unread))
            )


async def _asked(session: Session, body: ChatRequest) -> Turn:
    bounds = [bound for bound in (body.max_tokens, body.max_completion_tokens) if bound is not None]
    return await session.ask(
        body.messages,
        tools=None if body.tool_choice == "none" else body.tools,
        max_tokens=min(bounds, default=None),
        stop=[body.stop] if isinstance(body.stop, str) else body.stop,
    )


async def _while_connected(request: Request, work: asyncio.Task[Turn]) -> Turn | None:
    """What the work gives; None where the client went away first, which ends the work."""
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait([work, leaving], return_when=asyncio.FIRST_COMPLETED)
        return await work if work.done() else None
    finally:
        for task in (work, leaving):
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal(status: int, message: str, *, code: str | None = None) -> JSONResponse:
    """As OpenAI words one. No client need try again: the answer would be the same."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers={"x-should-retry": "false"})


async def _refuse_fields(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _refusal(400, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}")


# -------------------------------------------------------------------------------------------------- OpenAI's answers


def _finish_reason(turn: Turn) -> str:
    if turn.answer.get("tool_calls"):
        return "tool_calls"
    return "length" if turn.sample.status is Status.TRUNCATED else "stop"


def _usage(turn: Turn) -> dict[str, int]:
    new, total = len(turn.own), len(turn.sample.tokens)
    return {"prompt_tokens": total - new, "completion_tokens": new, "total_tokens": total}


def _head(kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": MODEL}


def _completion(turn: Turn) -> dict[str, Any]:
    choice = {"index": 0, "message": turn.answer, "logprobs": None, "finish_reason": _finish_reason(turn)}
    return _head("chat.completion") | {"choices": [choice], "usage": _usage(turn)}


def _streamed(turn: Turn, body: ChatRequest) -> StreamingResponse:
    """The whole answer as one event: its calls are read when all of it is there."""
    head = _head("chat.completion.chunk")
    delta = dict(turn.answer)
    if calls := delta.get("tool_calls"):
        delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
    chunks = [
        head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]},
        head | {"choices": [{"index": 0, "delta": {}, "finish_reason": _finish_reason(turn)}]},
    ]
    if (body.stream_options or {}).get("include_usage"):
        chunks.append(head | {"choices": [], "usage": _usage(turn)})
    events = [*(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks), "data: [DONE]\n\n"]
    return StreamingResponse(iter(events), media_type="text/event-stream")


_SERVERS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Task[Endpoint]] = weakref.WeakKeyDictionary()


async def _server_here() -> Endpoint:
    """This loop's server; whoever comes while it starts waits for the same one."""
    loop = asyncio.get_running_loop()
    if loop not in _SERVERS:
        _SERVERS[loop] = asyncio.create_task(_started())
    return await asyncio.shield(_SERVERS[loop])


async def _started() -> Endpoint:
    server = Endpoint()
    await server.start()
    return server
