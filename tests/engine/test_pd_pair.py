"""One prefill/decode pair of the tiny GLM-5.2 (block FP8 on disk) behind a router, on the CPU, against transformers."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from callers import connects
from engine.engines import TOKEN, make_checkpoint, payload, prompt, request, spec
from engine.reference import (
    largest_difference,
    left_by_sampling,
    load_reference,
    log_probs,
    read_weights,
    restored,
    sample_of,
    share_of_equal_experts,
    share_of_equal_keys,
)

from slime.engine.client import EngineClient, EngineError, HttpClient, RouterClient, sync
from slime.engine.groups import group_exists
from slime.engine.process import EngineDied, EngineProcess
from slime.engine.router import RouterProcess, Worker
from slime.engine.spec import NodePlacement
from slime.ops.fp8 import quantize_blockwise
from slime.ray.first_requests import first_requests

pytestmark = pytest.mark.slow

# Both sides compute in float32; what remains is the order of additions.
ROUND_OFF = 1e-4
RECORDING = {"enable_return_routed_experts": True, "enable_return_indexer_topk": True, "sampling_mask_max_tokens": 64}
ASKED = {"return_routed_experts": True, "return_indexer_topk": True}
PROMPT_LENGTHS = (8, 60, 300)
# As if they were on two nodes: each knows its own address and whose engines may connect. 127.0.0.1 is what the kernel takes as
# the source of a connection to any other of these.
PLACES = {
    role: NodePlacement(0, host, i, peers=("127.0.0.1", "127.0.0.2", "127.0.0.3"))
    for i, (role, host) in enumerate({"prefill": "127.0.0.2", "decode": "127.0.0.3"}.items())
}


@dataclass
class Pair:
    folder: Path
    checkpoint: Path
    engines: list[EngineProcess]
    router: RouterProcess
    reports: list[str]
    weights: dict[str, torch.Tensor]
    """what the engines serve now, float32"""
    model: torch.nn.Module
    """transformers with those weights"""

    @property
    def clients(self) -> list[EngineClient]:
        return [EngineClient(engine.url, TOKEN) for engine in self.engines]

    def generate(self, tokens: list[int], new_tokens: int, **kwargs) -> dict:
        return sync(RouterClient(self.router.url, TOKEN).generate(request(tokens, new_tokens, **kwargs), timeout=120))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pd")
    checkpoint = make_checkpoint("cpu", folder / "glm") / "fp8"
    reports: list[str] = []
    roles = ("prefill", "decode")
    engines = [
        EngineProcess(
            spec(role, i, checkpoint, max_total_tokens=8192, **RECORDING),
            device_kind="host", token=TOKEN, log_path=folder / f"{role}.log", report=reports.append, place=PLACES[role],
        )
        for i, role in enumerate(roles)
    ]  # fmt: skip
    router = None
    try:
        for engine in engines:
            engine.start()
        weights = read_weights(checkpoint)
        model = load_reference(checkpoint, weights, folder / "reference")
        for engine in engines:
            engine.wait_ready()
        workers = [Worker(engine.url, engine.spec.role, engine.ports.bootstrap) for engine in engines]
        router = RouterProcess(workers, token=TOKEN, log_path=folder / "router.log", report=reports.append)
        router.start()
        router.wait_ready()
        yield Pair(folder, checkpoint, engines, router, reports, weights, model)
    finally:
        for process in [*engines, *([router] if router else [])]:
            process.stop()


def test_log_probs_equal_transformers_on_prompts_longer_than_index_topk(pair):
    for length in PROMPT_LENGTHS:
        tokens = prompt(length, length)
        answer = pair.generate(tokens, 40)
        assert max(largest_difference(pair.model, tokens, answer)) < ROUND_OFF
    # The comparison has teeth: attending to everything instead of the 16 selected positions is far away.
    assert min(largest_difference(pair.model, tokens, answer, index_topk=10**6)) > 0.05


def test_engines_that_compile_get_their_first_requests_through_the_router_and_others_none(pair, caplog):
    def answered(engine) -> int:
        return (pair.folder / f"{engine.spec.role}.log").read_text().count('"POST /generate HTTP/1.1" 200 OK')

    asked = [SimpleNamespace(spec=engine.spec, url=engine.url, compiles=True) for engine in pair.engines]
    before = [answered(engine) for engine in pair.engines]
    with caplog.at_level(logging.INFO):
        first_requests([SimpleNamespace(spec=one.spec, url=one.url, compiles=False) for one in asked], {}, TOKEN)
        first_requests(asked, {"default": pair.router}, TOKEN)
    # Two engines of one rank: two prompts of each length, 32 and 2,560 tokens, meet both engines.
    assert [answered(engine) - many for engine, many in zip(pair.engines, before, strict=True)] == [4, 4]
    [line] = [record.getMessage() for record in caplog.records if "first requests" in record.getMessage()]
    assert line.startswith("2 engines have answered their first requests after ")


def test_a_first_request_that_an_engine_refuses_is_told_and_no_error(pair, caplog):
    gone = SimpleNamespace(spec=replace(pair.engines[0].spec, role="regular"), url="http://127.0.0.1:9", compiles=True)
    with caplog.at_level(logging.DEBUG, logger="slime.ray.first_requests"):
        first_requests([gone], {}, TOKEN)
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("first request to engine")]
    assert len(told) == 2 and all("the server is gone or not reachable" in line for line in told)


def test_eight_requests_at_once_are_each_exact(pair):
    prompts = [prompt(50 + i, 20 + 23 * i) for i in range(8)]

    async def all_at_once() -> list[dict]:
        client = RouterClient(pair.router.url, TOKEN)
        answers = await asyncio.gather(
            *(client.generate(request(tokens, 24, temperature=1.0), timeout=120) for tokens in prompts)
        )
        await client.close()
        return answers

    answers = asyncio.run(all_at_once())
    assert [len(answer["output_ids"]) for answer in answers] == [24] * 8
    pairs = zip(prompts, answers, strict=True)
    *others, last = sorted(max(largest_difference(pair.model, tokens, answer)) for tokens, answer in pairs)
    # What is sampled differs from run to run, and two keys at the border of a selection may be equal but for rounding.
    assert max(others) < ROUND_OFF and last < 0.05


def test_both_engines_say_what_they_chose_each_for_its_own_tokens(pair):
    """Experts and keys: the prompt's are the prefill engine's, the response's the decode engine's. A second turn asks for what
    is new alone."""
    url, first = pair.router.url, request(prompt(31, 60), 12) | ASKED
    raw = sync(HttpClient(url, TOKEN).call("POST", "/generate", first, timeout=120)).json()
    assert not {"routed_experts", "indexer_topk"} & set(raw["meta_info"]), "the router drops it: slime.compat.sglang.answers"

    def ask(tokens: list[int], known: int, new: int) -> dict:
        payload = request(tokens, new) | ASKED | {"routed_experts_start_len": known}
        answer = sync(RouterClient(url, TOKEN).generate(payload, timeout=120))
        return answer | {"meta_info": answer["meta_info"] | {"routed_experts_start_len": known}}

    one = ask(first["input_ids"], 0, 12)
    assert max(largest_difference(pair.model, first["input_ids"], one)) < ROUND_OFF
    sample = sample_of(pair.model, first["input_ids"], [one])
    # The rows of a slot that another request had before must not show: the same engines, other tokens, a longer prompt.
    two = ask(list(sample.tokens), 71, 12)
    size = {name: len(base64.b64decode(two["meta_info"][name])) for name in ("prompt_routed_experts", "routed_experts")}
    topk = pair.model.config.num_experts_per_tok
    assert size == {"prompt_routed_experts": 1 * 8 * topk, "routed_experts": 11 * 8 * topk}, "one byte a choice"
    sample = sample_of(pair.model, first["input_ids"], [one, two])
    assert len(sample.tokens) == 84 and share_of_equal_experts(pair.model, sample) > 0.97
    assert share_of_equal_keys(pair.model, sample) > 0.97
    alone = sample_of(pair.model, prompt(32, 20), [ask(prompt(32, 20), 0, 1)])
    assert len(alone.rollout_routed_experts) == alone.rollout_indexer_topk.end == 20


def test_both_engines_say_which_words_sampling_left_and_how_likely_a_token_was_among_them(pair):
    """The first token is drawn by the prefill engine. A mean of many words and of few, against transformers' probabilities."""
    tokens, count = prompt(34, 60), 0
    for top_p, top_k in ((0.5, 40), (0.9, 7)):
        asked = request(tokens, 16, temperature=1.0)
        asked["sampling_params"] |= {"top_p": top_p, "top_k": top_k, "custom_params": {"return_top_p_token_ids": True}}
        answer = sync(RouterClient(pair.router.url, TOKEN).generate(asked, timeout=120))
        sample = sample_of(pair.model, tokens, [answer])
        ids, offsets = sample.rollout_top_p_token_ids, sample.rollout_top_p_token_offsets
        assert len(offsets) == 17
        expected = log_probs(pair.model, list(sample.tokens))
        for number, (value, token, *_) in enumerate(answer["meta_info"]["output_token_logprobs"]):
            row, kept = expected[59 + number], ids[offsets[number] : offsets[number + 1]]
            assert value == pytest.approx(float(row[token] - torch.logsumexp(row[torch.from_numpy(kept).long()], -1)), abs=1e-4)
            count += set(kept.tolist()) == left_by_sampling(row, top_p, top_k)
    assert count >= 31, "a word at the border may fall either way"


def test_what_a_decode_engine_took_back_is_not_said_of_others(pair):
    """Its cache was computed anew by the prefill engine, in slots that belonged to whomever: nothing is told of those
    tokens."""
    tokens = prompt(33, 50)

    async def paused_after(seconds: float) -> dict:
        client = RouterClient(pair.router.url, TOKEN)
        running = asyncio.create_task(client.generate(request(tokens, 400) | ASKED, timeout=300))
        while not running.done() and not await decodes():
            await asyncio.sleep(0.02)
        await asyncio.sleep(seconds)
        for engine in pair.clients:
            await engine.pause_generation("retract")
        for engine in pair.clients:
            await engine.continue_generation()
        answer = await running
        await client.close()
        return answer

    async def decodes() -> bool:
        loads = (await pair.clients[-1].call("GET", "/v1/loads", timeout=30)).json()["loads"]
        return bool(loads[0]["num_running_reqs"])

    for seconds in (0.2, 1.0, 0.0, 5.0):  # a busy machine may not have decoded a token, a quick one all of them
        sample = sample_of(pair.model, tokens, [asyncio.run(paused_after(seconds))])
        unknown = (sample.rollout_routed_experts < 0).any((1, 2))
        if unknown.any():
            break
    first, count = int(unknown.argmax()), int(unknown.sum())
    assert first == 50 and unknown[50 : 50 + count].all() and 0 < count < 399
    told = [(piece.first, piece.end) for piece in sample.rollout_indexer_topk.pieces]
    assert told == [(16, 50), (50 + count, 449)] and sample.rollout_indexer_topk.has_gap
    assert share_of_equal_experts(pair.model, sample) > 0.97


def test_every_control_endpoint_needs_the_token(pair):
    control = (
        "/update_weights_from_tensor", "/update_weights_from_disk", "/begin_weight_update", "/end_weight_update",
        "/update_weight_version", "/pause_generation", "/continue_generation", "/abort_request", "/flush_cache",
        "/release_memory_occupation", "/resume_memory_occupation", "/generate",
    )  # fmt: skip
    for headers in ({}, {"Authorization": "Bearer somebody-else"}):
        for engine in pair.engines:
            for path in control:
                assert httpx.post(engine.url + path, json={}, headers=headers).status_code == 401, path
            for path in ("/model_info", "/server_info"):
                assert httpx.get(engine.url + path, headers=headers).status_code == 401, path
        assert httpx.post(pair.router.url + "/generate", json=request(prompt(1, 5), 1), headers=headers).status_code == 401
        assert httpx.post(pair.router.url + "/workers", json={"url": "http://127.0.0.1:9"}, headers=headers).status_code == 401
    with pytest.raises(EngineError, match="401.*token is not this run's"):
        sync(EngineClient(pair.engines[0].url, "wrong").pause_generation())


def test_the_token_is_in_no_argument_list_and_no_log_which_no_other_user_can_read(pair):
    assert all("'api_key': '***'" in engine.child.log_path.read_text() for engine in pair.engines), "SGLang logs its options"
    for process in (*pair.engines, pair.router):
        assert TOKEN not in process.child.log_path.read_text(errors="replace")
        assert TOKEN not in Path(f"/proc/{process.child.pid}/cmdline").read_text()
        assert process.child.log_path.stat().st_mode & 0o077 == 0


def test_every_listener_is_at_its_engines_own_address(pair):
    """At 127.0.0.2 and 127.0.0.3, and the router at 127.0.0.1: nothing listens on every interface."""
    for engine in pair.engines:
        found = listeners({engine.child.pid})
        # The KV transfer has two, SGLang's server one, the ranks' store one on loopback, the bootstrap server one.
        assert {address for address, _ in found} <= {engine.place.host, "127.0.0.1"}, found
        assert len([port for address, port in found if address == engine.place.host]) >= 3, found
    assert {address for address, _ in listeners({pair.router.child.pid})} == {"127.0.0.1"}


def test_the_kv_transfer_accepts_the_runs_nodes_alone(pair):
    for engine in pair.engines:
        kept = {engine.ports.http, engine.ports.bootstrap}
        ours = [port for address, port in listeners({engine.child.pid}) if address == engine.place.host and port not in kept]
        reached = {port for port in ours if connects((engine.place.host, port), source="127.0.0.3")}
        assert reached == set(ours)
        # mooncake's two, ZeroMQ's, over which destinations are told, and the ranks' store.
        assert len(ours) == 4 and not [port for port in ours if connects((engine.place.host, port), source="127.0.0.9")]


def test_the_bootstrap_server_needs_the_token(pair):
    prefill = pair.engines[0]
    base = f"http://{prefill.place.host}:{prefill.ports.bootstrap}"
    for headers in ({}, {"Authorization": "Bearer somebody-else"}):
        assert httpx.get(f"{base}/health", headers=headers).status_code == 401
        assert httpx.get(f"{base}/route", headers=headers).status_code == 401
        assert httpx.put(f"{base}/route", json={}, headers=headers).status_code == 401
        for path in ("/register_dp_rank", "/query_dp_ranks"):
            assert httpx.post(base + path, json={}, headers=headers).status_code == 401
    assert httpx.get(f"{base}/health", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


def listeners(groups: set[int]) -> set[tuple[str, int]]:
    """(IPv4 address, port) of the listening TCP sockets of these process groups, from /proc; IPv6 ones as they map."""
    inodes = set()
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[2]) not in groups:
                continue
            inodes |= {os.readlink(fd) for fd in entry.joinpath("fd").iterdir()}
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                address, _, port = fields[1].partition(":")
                words = [int(address[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(address), 8)]
                found.add((str(ipaddress.ip_address(words[-1])), int(port, 16)))
    return found


def test_an_update_of_both_engines_serves_the_new_weights(pair):
    tokens = prompt(7, 200)
    before = pair.generate(tokens, 30)
    assert [sync(client.weight_version()) for client in pair.clients] == ["default", "default"]

    wire = perturbed_wire_weights(pair, seed=1)
    send(pair, wire, version=1)
    assert [sync(client.weight_version()) for client in pair.clients] == ["1", "1"]
    pair.weights |= restored(wire)
    pair.model = load_reference(pair.checkpoint, pair.weights, pair.folder / "reference")

    after = pair.generate(tokens, 30)
    assert after["meta_info"]["weight_version"] == "1"
    assert max(largest_difference(pair.model, tokens, after)) < ROUND_OFF
    assert max(largest_difference(pair.model, tokens, before)) > 0.05, "the update was too small to be seen"


def test_a_subset_in_reverse_order_updates_only_what_it_names(pair):
    names = [name for name in pair.weights if ".indexer." in name or ".mlp.experts." in name]
    wire = perturbed_wire_weights(pair, seed=2, only=names)
    send(pair, dict(reversed(wire.items())), version=2)
    pair.weights |= restored(wire)
    pair.model = load_reference(pair.checkpoint, pair.weights, pair.folder / "reference")
    tokens = prompt(8, 150)
    assert max(largest_difference(pair.model, tokens, pair.generate(tokens, 20))) < ROUND_OFF


def test_an_engine_in_the_middle_of_an_update_says_so(pair):
    client = pair.clients[0]
    sync(client.pause_generation())
    try:
        with pytest.raises(EngineError, match="begin_weight_update first"):
            sync(client.end_weight_update(3))
        with pytest.raises(EngineError, match="begin_weight_update"):
            sync(client.update_weights_from_tensor([payload([("model.norm.weight", torch.ones(128))])]))
        sync(client.begin_weight_update(3))
        assert sync(client.weight_version()) == "incomplete:3"
        with pytest.raises(EngineError, match="incomplete:3"):
            sync(client.end_weight_update(4))
        assert sync(client.weight_version()) == "incomplete:3"
        sync(client.end_weight_update(3))
        assert sync(client.weight_version()) == "3"
    finally:
        sync(client.continue_generation())


def test_the_checksum_sees_one_changed_weight(pair):
    client = pair.clients[1]
    before = sync(client.weights_checksums())
    name = "model.layers.4.mlp.experts.3.up_proj.weight"
    changed = pair.weights[name].clone()
    changed[0, 0] += 1.0
    for tensor, same in ((changed, False), (pair.weights[name], True)):
        sync(client.pause_generation())
        sync(client.begin_weight_update(9))
        sync(client.update_weights_from_tensor([payload([(name, tensor)])]))
        sync(client.end_weight_update(9))
        sync(client.continue_generation())
        assert (sync(client.weights_checksums()) == before) is same


def test_abort_ends_running_requests(pair):
    async def abort_after(seconds: float) -> dict:
        client = RouterClient(pair.router.url, TOKEN)
        running = asyncio.create_task(client.generate(request(prompt(3, 30), 3000, log_probs=False), timeout=300))
        await asyncio.sleep(seconds)
        for engine in pair.clients:
            await engine.abort_all()
        answer = await running
        await client.close()
        return answer

    for seconds in (1.0, 4.0, 16.0):  # a busy machine may not have begun when the first abort comes
        answer = asyncio.run(abort_after(seconds))
        if answer["output_ids"]:
            break
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(answer["output_ids"]) < 3000


def test_an_unreachable_engine_is_one_clear_error(pair):
    with pytest.raises(EngineError, match="127.0.0.1:9/model_info.*not reachable"):
        sync(EngineClient("http://127.0.0.1:9", TOKEN).weight_version())


def test_a_dead_engine_is_named_with_the_end_of_its_log(pair):
    prefill = pair.engines[0]
    prefill.check()
    os.kill(prefill.child.pid, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while prefill.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(EngineDied, match=r"default-prefill-0 was killed by signal 9 \(SIGKILL\); its log .*prefill.log ends"):
        prefill.check()
    with pytest.raises(EngineError, match="server is gone"):
        sync(EngineClient(prefill.url, TOKEN).health())
    # Its schedulers outlive it for a moment; stop() sees to all of them.
    prefill.stop()
    assert not group_exists(prefill.child.pid)


@pytest.mark.parametrize("dead", [0, 1], ids=["prefill", "decode"])
def test_an_engine_started_again_serves_behind_the_same_router(pair, dead):
    """Last in this module: they start with the checkpoint's weights, which the updates above have changed."""
    engine = pair.engines[dead]
    url, first_log = engine.url, engine.child.log_path
    if engine.is_alive():
        os.killpg(engine.child.pid, signal.SIGKILL)
    engine.stop()
    died, stopped = engine.child.pid, time.monotonic()
    engine.start()
    if dead == "prefill":
        assert engine.child.started - stopped > 10, "its decode engine misses it after two heartbeats of 5 s"
    engine.wait_ready()
    assert engine.url == url and Path(f"{first_log}.{died}").stat().st_size > 0
    tokens = prompt(7, 60)
    answer = sync(RouterClient(pair.router.url, TOKEN).generate(request(tokens, 8), timeout=120))
    assert len(answer["output_ids"]) == 8


def perturbed_wire_weights(pair: Pair, *, seed: int, only: list[str] | None = None) -> dict[str, torch.Tensor]:
    """New values for weights, in the checkpoint's wire format: FP8 and scales where the checkpoint has FP8, else float32."""
    from safetensors import safe_open

    quantised = set()
    for file in sorted(pair.checkpoint.glob("*.safetensors")):
        with safe_open(str(file), "pt") as reader:
            quantised |= {name.removesuffix("_scale_inv") for name in reader.keys() if name.endswith("_scale_inv")}
    generator = torch.Generator().manual_seed(seed)
    wire: dict[str, torch.Tensor] = {}
    for name in sorted(only or pair.weights):
        tensor = pair.weights[name]
        changed = tensor + torch.randn(tensor.shape, generator=generator) * 0.2 * (tensor.std() if tensor.numel() > 1 else 0.0)
        if name in quantised:
            wire[name], wire[f"{name}_scale_inv"] = quantize_blockwise(changed)
        else:
            wire[name] = changed
    return wire


def send(pair: Pair, wire: dict[str, torch.Tensor], *, version: int, pairs_per_bucket: int = 40) -> None:
    """As a trainer does: pause all, flush, begin, buckets (a weight with its scale), end, continue."""
    bases = list(dict.fromkeys(name.removesuffix("_scale_inv") for name in wire))
    for call in ("pause_generation", "flush_cache"):
        for client in pair.clients:
            sync(getattr(client, call)())
    for client in pair.clients:
        sync(client.begin_weight_update(version))
    for at in range(0, len(bases), pairs_per_bucket):
        names = [name for base in bases[at : at + pairs_per_bucket] for name in (f"{base}_scale_inv", base) if name in wire]
        bucket = payload([(name, wire[name]) for name in names])
        for client in pair.clients:
            sync(client.update_weights_from_tensor([bucket]))
    for client in pair.clients:
        sync(client.end_weight_update(version))
        sync(client.continue_generation())
