"""A reward server: POST {prompt, response, label} to --rm-url; its JSON answer is the reward."""

from __future__ import annotations

import asyncio
import logging
import random
import weakref
from typing import Any

import httpx

from slime.types.sample import Sample

logger = logging.getLogger(__name__)

TRIES = 10
LONGEST_PAUSE_SECONDS = 30.0
ANSWER_SECONDS = 120.0
CONNECTIONS = 64

_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = weakref.WeakKeyDictionary()


def _client() -> httpx.AsyncClient:
    loop = asyncio.get_running_loop()
    if loop not in _clients:
        limits = httpx.Limits(max_connections=CONNECTIONS)
        # Waiting for a free connection may take as long as the server needs; the answer itself is bounded.
        timeout = httpx.Timeout(ANSWER_SECONDS, pool=None)
        _clients[loop] = httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False)
    return _clients[loop]


async def remote_rm(args: Any, sample: Sample) -> Any:
    """Raises RuntimeError when the server did not answer in ten tries, or refuses the request (4xx)."""
    if not args.rm_url:
        raise ValueError("--rm-type remote_rm needs the address of the server: --rm-url URL")
    payload = {"prompt": sample.prompt, "response": sample.response, "label": sample.label}
    last = ""
    for attempt in range(TRIES):
        try:
            response = await _client().post(args.rm_url, json=payload)
            if response.is_success:
                return response.json()
            last = f"{response.status_code} {response.text[:200]}"
            if response.status_code < 500:
                break
        except (httpx.TransportError, ValueError) as error:
            last = f"{type(error).__name__} {error}"
        logger.info("reward server %s: %s (try %d of %d)", args.rm_url, last, attempt + 1, TRIES)
        if attempt + 1 < TRIES:
            await asyncio.sleep(min(2.0**attempt, LONGEST_PAUSE_SECONDS) + random.random())
    raise RuntimeError(f"the reward server {args.rm_url} gave no reward: {last}")
