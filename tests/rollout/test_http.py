"""A plugin's own requests: the run's token goes to the run's servers and to nobody else."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
from rollout_helpers import FakeRouter

from slime.engine.client import EngineError
from slime.rollout import http
from slime.rollout.generation import GenerateState, enter
from slime.rollout.sglang_rollout import get_model_url
from slime.utils.async_utils import run
from slime.utils.http_utils import get, init_http_client, post


@pytest.fixture
def servers():
    """(router, engine, foreign): three real servers on loopback; the router lists the engine."""
    made = [FakeRouter(None, answer=lambda path, payload: {"path": path, "got": payload}).start() for _ in range(3)]
    made[0].workers.append(made[1].url)
    yield made
    for server in made:
        server.server.shutdown()
        server.server.server_close()


def args_for(router: FakeRouter, token: str = "t0ken") -> SimpleNamespace:
    return SimpleNamespace(sglang_router_ip="127.0.0.1", sglang_router_port=router.server.server_port, engine_token=token)


def token_seen_by(server: FakeRouter) -> list[str | None]:
    return [headers.get("Authorization") for _, headers in server.requests]


def test_the_token_goes_to_router_and_engines_and_to_nobody_else(servers):
    router, engine, foreign = servers
    init_http_client(args_for(router))
    for server in servers:
        answer = asyncio.run(post(f"{server.url}/score?x=1", {"prompt": "p"}, headers={"X-Mine": "1"}))
        assert answer == {"path": "/score?x=1", "got": {"prompt": "p"}}
    assert token_seen_by(router) == token_seen_by(engine) == ["Bearer t0ken"]
    assert token_seen_by(foreign) == [None] and foreign.requests[0][1]["X-Mine"] == "1"
    assert run(get(f"{router.url}/workers"))["workers"][1] == {"url": engine.url}


def test_the_token_goes_to_the_router_of_every_model_of_the_run(servers):
    router, engine, judge = servers
    args = args_for(router)
    args.sglang_model_routers = {
        "default": ("127.0.0.1", args.sglang_router_port),
        "judge": ("127.0.0.1", judge.server.server_port),
    }
    init_http_client(args)
    assert (
        get_model_url(args, "judge", "/score") == f"{judge.url}/score" and get_model_url(args, "x") == f"{router.url}/generate"
    )
    asyncio.run(post(get_model_url(args, "judge", "/score"), {}))
    asyncio.run(post(f"{engine.url}/score", {}))
    assert token_seen_by(judge) == token_seen_by(engine) == ["Bearer t0ken"]


def test_what_a_router_would_drop_of_a_request_travels_as_a_label(servers):
    """A generate function written for slime asks for experts in its own request; engines are asked as they know it."""
    router, engine, _ = servers
    init_http_client(args_for(router))
    asked = {"text": "a", "return_routed_experts": True, "routed_experts_start_len": 0}
    assert asyncio.run(post(f"{engine.url}/generate", asked))["got"] == asked
    told = asyncio.run(post(f"{router.url}/generate", asked | {"custom_labels": {"team": "a"}}))["got"]
    labels = told.pop("custom_labels")
    assert told == {"text": "a"} and labels.pop("team") == "a"
    assert [json.loads(value) for value in labels.values()] == [{"return_routed_experts": True, "routed_experts_start_len": 0}]


def test_sampling_parameters_that_are_handed_on_ask_for_the_kept_words(servers):
    router = servers[0]
    init_http_client(args_for(router))
    params = {"top_p": 0.9, "custom_params": {"return_top_p_token_ids": True}}
    told = asyncio.run(post(f"{router.url}/generate", {"text": "a", "sampling_params": params}))["got"]
    assert [json.loads(value) for value in told["custom_labels"].values()] == [{"return_sampling_mask": True}]


def test_an_engine_that_comes_up_later_is_known_by_then(servers):
    router, engine, foreign = servers
    router.workers.clear()
    init_http_client(args_for(router, token="other"))
    asyncio.run(post(f"{foreign.url}/score", {}))
    router.workers.append(engine.url)
    asyncio.run(post(f"{engine.url}/score", {}))
    assert token_seen_by(engine) == ["Bearer other"] and token_seen_by(foreign) == [None]


def test_the_running_rollout_says_whose_token_it_is(servers, tokenizer_folder, rollout_config):
    first, _, second = servers
    init_http_client(args_for(first, token="first"))
    args = rollout_config(hf_checkpoint=tokenizer_folder).args.with_runtime(**vars(args_for(second, token="second")))

    async def in_a_rollout():
        enter(GenerateState(args))
        await post(f"{second.url}/x", {})
        await post(f"{first.url}/x", {})

    asyncio.run(in_a_rollout())
    assert token_seen_by(second) == ["Bearer second"] and token_seen_by(first) == [None]


def test_a_refusal_is_told_in_the_servers_words_and_a_failure_is_tried_again(servers, monkeypatch):
    router, _, _ = servers
    monkeypatch.setattr(http, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(http, "_LONGEST_PAUSE_OF_PLUGINS_SECONDS", 0.001)
    init_http_client(args_for(router))
    router.answer = lambda path, payload: 401
    with pytest.raises(EngineError, match="POST .*/x answered 401: made to fail; the token is not this run's"):
        asyncio.run(post(f"{router.url}/x", {}))
    assert len(router.requests) == 1
    router.answer = lambda path, payload: 503 if len(router.requests) < 9 else {"ok": True}
    assert asyncio.run(post(f"{router.url}/x", {})) == {"ok": True} and len(router.requests) == 9
    router.answer = lambda path, payload: 500
    with pytest.raises(EngineError, match="answered 500"):
        asyncio.run(post(f"{router.url}/x", {}, max_retries=3))
    assert len(router.requests) == 12
    with pytest.raises(ValueError, match="'localhost:80/x' is no http address"):
        asyncio.run(post("localhost:80/x", {}))
