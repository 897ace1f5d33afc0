"""The first requests of engines, before a rollout's: what SGLang compiles when it is first asked is compiled by then.

Graph capture at the start meets decoding alone. Reading a prompt has kernels of its own, which a cold machine compiled for a
minute in the first rollout (two H200s, DeepEP: DeepGEMM's contiguous grouped products).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from slime.engine.client import EngineClient, EngineError, RouterClient
from slime.engine.router import JoinedRouter, RouterProcess
from slime.engine.spec import EngineSpec

logger = logging.getLogger(__name__)

PROMPTS = (32, 2560)
"""Lengths: sparse attention reads up to 2,048 keys otherwise than more."""
NEW_TOKENS = 8
SECONDS = 3600.0


class Served(Protocol):
    """What is asked of an engine."""

    @property
    def spec(self) -> EngineSpec: ...
    @property
    def url(self) -> str: ...
    @property
    def compiles(self) -> bool: ...


def first_requests(engines: Sequence[Served], routers: Mapping[str, RouterProcess | JoinedRouter], token: str) -> None:
    """To each engine that compiles by itself, to prefill and decode engines through their model's router.

    One that does not answer is left to the first rollout, which finds the same: it may have no room for so long a prompt.
    routers: by model.
    """
    own = [engine for engine in engines if engine.compiles]
    if not own:
        return
    ranks = max(engine.spec.dp_size for engine in own)
    asked: list[tuple[str, EngineClient | RouterClient, int]] = [
        (f"engine {engine.spec.label}", EngineClient(engine.url, token), ranks)
        for engine in own
        if engine.spec.role == "regular"
    ]
    for model, router in routers.items():
        pairs = [engine for engine in own if engine.spec.model == model and engine.spec.role != "regular"]
        if pairs and isinstance(router, RouterProcess):  # somebody else's may have other engines
            asked.append((router.name, RouterClient(router.url, token), ranks * len(pairs)))
    started = time.monotonic()
    for (name, _, _), refused in zip(asked, asyncio.run(_all(asked)), strict=True):
        for why in refused:
            logger.debug("first request to %s: %s", name, why)
    logger.info("%d engines have answered their first requests after %.1f s", len(own), time.monotonic() - started)


async def _all(asked: Sequence[tuple[str, EngineClient | RouterClient, int]]) -> list[list[str]]:
    return await asyncio.gather(*(warm_up(client, requests=requests) for _, client, requests in asked))


async def warm_up(client: EngineClient | RouterClient, *, requests: int) -> list[str]:
    """So many prompts of each length at once, with log-probs as a rollout asks for them. -> why some were not answered."""
    refused: list[str] = []

    async def one(number: int, length: int) -> None:
        tokens = [4 + (31 * number + 7 * position) % 251 for position in range(length)]
        sampling = {"max_new_tokens": NEW_TOKENS, "temperature": 1.0, "ignore_eos": True}
        try:
            await client.generate({"input_ids": tokens, "sampling_params": sampling, "return_logprob": True}, timeout=SECONDS)
        except EngineError as error:
            refused.append(str(error))

    try:
        for length in PROMPTS:
            await asyncio.gather(*(one(number, length) for number in range(requests)))
    finally:
        await client.close()
    return refused
