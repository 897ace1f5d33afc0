"""HTTP for plugins: `post` and `get` carry the run's token to the run's own router and engines, and to nobody else.

They work wherever a plugin's code runs: in a generate function or a grader the running rollout says which run that is, in a
thread or a loop of the plugin's own the last `init_http_client`, which the rollout actor has called. Users know this file as
slime.utils.http_utils.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import httpx

from slime.engine.client import CONTROL_SECONDS, GENERATE_SECONDS, EngineError, HttpClient, labelled, opened

T = TypeVar("T")

FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 15.0
# A server that says "later" is well: it gets as long as a full queue may take.
_BUSY_PATIENCE_SECONDS = 600.0
_BUSY = (408, 425, 429)
_LONGEST_PAUSE_OF_PLUGINS_SECONDS = 1.0


def router_url(args: Any) -> str:
    host, port = getattr(args, "sglang_router_ip", None), getattr(args, "sglang_router_port", None)
    if not host or not port:
        raise ValueError(f"the router's address is not known: host {host!r}, port {port!r}")
    return address_of(host, port)


def address_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host and not host.startswith("[") else f"http://{host}:{port}"


@dataclass(frozen=True)
class OwnServers:
    """The servers of one run that take its token."""

    routers: tuple[str, ...]
    token: str
    engines: dict[str, bool] = field(default_factory=dict, compare=False)
    """Origin -> whether it is a worker of one of them; filled as origins are asked for."""

    async def token_for(self, origin: str) -> str:
        """The run's token for its router and its engines, "" for anybody else."""
        if origin in self.routers:
            return self.token
        if origin not in self.engines:
            for router in self.routers:
                try:
                    listed = await _client(router, self.token).call("GET", "/workers", timeout=CONTROL_SECONDS)
                except EngineError:
                    return ""  # asked again next time: the router may only be busy
                self.engines.update({_origin(worker["url"]): True for worker in listed.json()["workers"]})
            self.engines.setdefault(origin, False)
        return self.token if self.engines[origin] else ""


_OWN: contextvars.ContextVar[OwnServers] = contextvars.ContextVar("own_servers")
_last: OwnServers | None = None


def servers_of(args: Any) -> OwnServers:
    others = (address_of(*place) for place in (getattr(args, "sglang_model_routers", None) or {}).values())
    routers = dict.fromkeys(_origin(url) for url in (router_url(args), *others))
    return _own_servers(tuple(routers), getattr(args, "engine_token", None) or "")


@lru_cache(maxsize=8)
def _own_servers(routers: tuple[str, ...], token: str) -> OwnServers:
    return OwnServers(routers, token)


def enter_servers(args: Any) -> None:
    """`post` and `get` of tasks started from here on know these servers."""
    if getattr(args, "sglang_router_ip", None):
        _OWN.set(servers_of(args))


def init_http_client(args: Any) -> None:
    """`post` and `get` outside of every rollout know the servers of `args` from now on; nothing where it names no router."""
    global _last
    if getattr(args, "sglang_router_ip", None):
        _last = servers_of(args)


async def post(url: str, payload: Any, max_retries: int = 60, headers: Mapping[str, str] | None = None) -> Any:
    """The answer of POST `url`, from JSON where it is JSON, else its text.

    Tried `max_retries` times in all while the transport fails or the answer is a 5xx, for minutes while it is a 429. Raises
    EngineError with the server's words for any other refusal and after the last try.
    """
    return await _call("POST", url, payload or {}, tries=max_retries, seconds=GENERATE_SECONDS, headers=headers)


async def get(url: str) -> Any:
    """The same for GET."""
    return await _call("GET", url, None, tries=4, seconds=CONTROL_SECONDS)


async def _call(
    method: str, url: str, body: Any, *, tries: int, seconds: float, headers: Mapping[str, str] | None = None
) -> Any:
    origin, own = _origin(url), _OWN.get(_last)
    token = await own.token_for(origin) if own is not None else ""
    client, path = _client(origin, token), httpx.URL(url).raw_path.decode()
    through_router = own is not None and origin in own.routers and isinstance(body, Mapping)
    if through_router:
        body = labelled(body)
    response = await persistently(
        lambda: client.call(method, path, body, timeout=seconds, headers=headers),
        tries=tries,
        longest_pause=_LONGEST_PAUSE_OF_PLUGINS_SECONDS,
    )
    try:
        return opened(response.json()) if through_router else response.json()
    except ValueError:
        return response.text


def _origin(url: str) -> str:
    """`http://host:port` of an address, in one spelling."""
    parsed = httpx.URL(url)
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"{url!r} is no http address")
    return str(parsed.copy_with(raw_path=b"/", fragment=None, username=None, password=None)).rstrip("/")


@lru_cache(maxsize=256)
def _client(origin: str, token: str) -> HttpClient:
    return HttpClient(origin, token)


async def persistently(
    call: Callable[[], Awaitable[T]],
    *,
    tries: int,
    longest_pause: float = _LONGEST_PAUSE_SECONDS,
    stopped: Callable[[], bool] = lambda: False,
) -> T | None:
    """`call()`, made again with growing pauses while that may help; None once it failed and `stopped()` says to give up.

    A failure of transport or a 5xx: `tries` calls in all. Put off (429 and its like, or Retry-After): for minutes. Whatever
    else the server refuses is raised at once.
    """
    pause, made, deadline = FIRST_PAUSE_SECONDS, 0, time.monotonic() + _BUSY_PATIENCE_SECONDS
    while not (made and stopped()):
        made += 1
        try:
            return await call()
        except EngineError as error:
            if error.status in _BUSY or error.retry_after is not None:
                if time.monotonic() > deadline:
                    raise
                pause = max(pause, min(error.retry_after or 0.0, _LONGEST_PAUSE_SECONDS))
            elif made >= tries or (error.status is not None and error.status < 500):
                raise
        # Each request waits a little longer or shorter: those that were refused together do not come back together.
        await asyncio.sleep(pause * random.uniform(0.75, 1.25))
        pause = min(2 * pause, longest_pause)
    return None
