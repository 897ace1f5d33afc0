"""A reward server: POST {prompt, response, label} to --rm-url; its JSON answer is the reward."""

from __future__ import annotations

import asyncio
import logging
import random
import weakref
from typing import Any

import httpx

from slime.rollout.grading.pool import GradingError
from slime.types.sample import Sample

logger = logging.getLogger(__name__)

TRIES = 10
LONGEST_PAUSE_SECONDS = 30.0
ANSWER_SECONDS = 120.0
CONNECTIONS = 64
PUT_OFF = (408, 425, 429)
"""Refusals that ask to come again later, as every 5xx does."""

_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = weakref.WeakKeyDictionary()


def _client() -> httpx.AsyncClient:
    loop = asyncio.get_running_loop()
    if loop not in _clients:
        limits = httpx.Limits(max_connections=CONNECTIONS)
        _clients[loop] = httpx.AsyncClient(limits=limits, trust_env=False)
    return _clients[loop]


async def remote_rm(args: Any, sample: Sample) -> Any:
    """Raises GradingError when the server gave no reward in ten tries (`server_busy`, `server_failed`), or refused at once
    (`server_refused`). --rm-timeout bounds each try."""
    if not args.rm_url:
        raise ValueError("--rm-type remote_rm needs the address of the server: --rm-url URL")
    # Waiting for a free connection may take as long as the server needs; the answer itself is bounded.
    timeout = httpx.Timeout(getattr(args, "rm_timeout", None) or ANSWER_SECONDS, pool=None)
    payload = {"prompt": sample.prompt, "response": sample.response, "label": sample.label}
    last, reason = "", ""
    for attempt in range(TRIES):
        try:
            response = await _client().post(args.rm_url, json=payload, timeout=timeout)
            if response.is_success:
                return response.json()
            last, asked = f"{response.status_code} {response.text[:200]}", _retry_after(response)
            reason = "server_busy" if response.status_code in PUT_OFF else "server_failed"
            if response.status_code < 500 and response.status_code not in PUT_OFF:
                reason = "server_refused"
                break
        except (httpx.TransportError, ValueError) as error:
            last, reason, asked = f"{type(error).__name__} {error}", "server_failed", 0.0
        logger.info("reward server %s: %s (try %d of %d)", args.rm_url, last, attempt + 1, TRIES)
        if attempt + 1 < TRIES:
            await asyncio.sleep(min(max(2.0**attempt, asked), LONGEST_PAUSE_SECONDS) + random.random())
    raise GradingError(reason, f"the reward server {args.rm_url} gave no reward: {last}")


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait; 0 where it says nothing, or a date."""
    try:
        return max(0.0, float(response.headers.get("Retry-After", 0)))
    except ValueError:
        return 0.0
