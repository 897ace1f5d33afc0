"""Engines without disaggregation: the tiny GLM-5.2 on two tensor-parallel ranks, and SGLang's own Qwen3 behind a router."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine.agents import trained_and_scored
from engine.engines import TOKEN, make_checkpoint, payload, prompt, request, spec
from engine.reference import (
    largest_difference,
    load_reference,
    log_probs,
    read_weights,
    sample_of,
    share_of_equal_experts,
    share_of_equal_keys,
)
from engine.replayed import batch_of, gap

from slime.engine.client import EngineClient, RouterClient, labelled, sync, sync_later
from slime.engine.process import EngineDied, EngineProcess
from slime.engine.router import JoinedRouter, RouterProcess, Worker
from slime.rollout.http import enter_servers
from slime.rollout.on_policy_distillation import post_process_rewards, reward_func
from slime.types.sample import Sample

pytestmark = pytest.mark.slow

ROUND_OFF = 1e-4
RECORDING = {"enable_return_routed_experts": True, "enable_return_indexer_topk": True, "sampling_mask_max_tokens": 64}
ASKED = {"return_routed_experts": True, "return_indexer_topk": True}


@pytest.fixture(scope="module")
def megatron_imports(tmp_path_factory):
    """A file with a line for each process that imports megatron while this module's engines run."""
    folder = tmp_path_factory.mktemp("tripwire")
    imports = folder / "imports"
    (folder / "megatron").mkdir()
    (folder / "megatron" / "__init__.py").write_text(
        f"import os, sys\nwith open({str(imports)!r}, 'a') as file:\n    print(os.getpid(), sys.argv, file=file)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
        yield imports


@pytest.fixture(scope="module")
def served(tmp_path_factory, megatron_imports):
    """(GLM engine with TP2, Qwen3 engine, checkpoint of each)."""
    folder = tmp_path_factory.mktemp("regular")
    glm = make_checkpoint("cpu", folder / "glm", seed=1) / "fp8"
    qwen = make_checkpoint("qwen3", folder / "qwen3") / "bf16"
    engines = [
        EngineProcess(
            spec(
                "regular",
                i,
                path,
                tp=ranks,
                max_total_tokens=4096,
                chunked_prefill_size=64,
                **(RECORDING if path is glm else {}),
            ),
            device_kind="host",
            token=TOKEN,
            log_path=folder / f"{path.parent.name}.log",
        )
        for i, (path, ranks) in enumerate(((glm, 2), (qwen, 1)))
    ]
    try:
        for engine in engines:
            engine.start()
        for engine in engines:
            engine.wait_ready()
        yield engines, (glm, qwen), folder
    finally:
        for engine in engines:
            engine.stop()


def largest_gap(engine, model, seed: int, length: int) -> float:
    tokens = prompt(seed, length)
    answer = sync(EngineClient(engine.url, TOKEN).generate(request(tokens, 20), timeout=120))
    return max(largest_difference(model, tokens, answer))


def update(engine, ranks: int, named: list[tuple[str, torch.Tensor]], version: str) -> None:
    client = EngineClient(engine.url, TOKEN)
    sync(client.pause_generation())
    sync(client.flush_cache())
    sync(client.begin_weight_update(version))
    sync(client.update_weights_from_tensor([payload(named)] * ranks))
    sync(client.end_weight_update(version))
    sync(client.continue_generation())


def test_an_engine_says_what_it_chose_for_every_token_but_the_last(served):
    """As training asks that replays it, against the experts and keys that transformers' model takes; before any update. Two
    tensor-parallel ranks, a prompt in three chunks, and half of it from the prefix cache."""
    (glm, _), (checkpoint, _), folder = served
    model = load_reference(checkpoint, read_weights(checkpoint), folder / "routing")
    for length in (75, 150):
        asked = request(prompt(21, 150)[:length], 8) | ASKED
        answer = sync(EngineClient(glm.url, TOKEN).generate(asked, timeout=120))
        sample = sample_of(model, asked["input_ids"], [answer])
        assert sample.rollout_routed_experts.dtype == np.uint8, "one byte names one of 8 experts"
        assert share_of_equal_experts(model, sample) > 0.97
        assert share_of_equal_keys(model, sample) > 0.97
        assert sample.rollout_indexer_topk.nbytes < 4 * (length - 8) * 16, "below a byte a place, in four layers"


def test_choices_taken_again_bring_a_trainer_nearer_to_an_fp8_engine(served):
    """The engine has block-FP8 weights and the trainer those that they were made of, so near-ties fall either way."""
    (glm, _), (checkpoint, _), folder = served
    model = load_reference(checkpoint, read_weights(checkpoint), folder / "gap")
    prompts = [prompt(60 + i, 20 + 20 * i) for i in range(6)]
    client = EngineClient(glm.url, TOKEN)
    answers = [sync(client.generate(request(tokens, 48, temperature=1.0) | ASKED, timeout=120)) for tokens in prompts]
    batch, trainer = batch_of(model, prompts, answers), checkpoint.parent / "bf16"
    experts, keys = {"use_routing_replay": True, "use_rollout_routing_replay": True}, {"use_rollout_indexer_replay": True}
    own, by_experts, by_keys, both = (gap(trainer, batch, **flags) for flags in ({}, experts, keys, experts | keys))
    print(
        f"gap in nats: {own:.5f} as the trainer chooses, {by_experts:.5f} experts, {by_keys:.5f} keys, {both:.5f} both replayed"
    )
    assert by_experts < 0.9 * own and both < 0.9 * by_experts and by_keys < own


def test_words_that_sampling_left_make_training_on_policy(served):
    """Top-p 0.5 of a nearly uniform model: probabilities over all words are half of those that drew."""
    (glm, _), (checkpoint, _), folder = served
    model = load_reference(checkpoint, read_weights(checkpoint), folder / "top-p")
    prompts, answers, client = [prompt(80 + i, 30) for i in range(2)], [], EngineClient(glm.url, TOKEN)
    for tokens in prompts:
        asked = request(tokens, 24, temperature=1.0) | ASKED
        asked["sampling_params"] |= {"top_p": 0.5, "top_k": 60, "custom_params": {"return_top_p_token_ids": True}}
        answers.append(sync(client.generate(labelled(asked), timeout=120)))
    batch = batch_of(model, prompts, answers)
    flags = {"use_routing_replay": True, "use_rollout_routing_replay": True, "use_rollout_indexer_replay": True}
    whole, kept = (gap(checkpoint, of, **flags) for of in (replace(batch, kept_words=None), batch))
    print(f"gap in nats: {whole:.5f} over all words, {kept:.5f} over those that sampling left")
    assert kept < 1e-4 < 0.5 < whole


def test_two_ranks_with_chunked_prefill_equal_transformers_before_and_after_an_update(served):
    (glm, _), (checkpoint, _), folder = served
    weights = read_weights(checkpoint)
    model = load_reference(checkpoint, weights, folder / "reference")
    for length in (10, 40, 230):
        assert largest_gap(glm, model, length, length) < ROUND_OFF

    generator = torch.Generator().manual_seed(3)
    # One of each way of splitting: rows, columns, whole experts, fused experts, not at all.
    changed = {
        name: weights[name] + 0.2 * weights[name].std() * torch.randn(weights[name].shape, generator=generator)
        for name in weights
        if name.startswith("model.layers.5.") or name == "lm_head.weight"
    }
    weights |= changed
    fused = {"gate_up_proj": [], "down_proj": []}
    for expert in range(8):
        gate, up, down = (changed.pop(f"model.layers.5.mlp.experts.{expert}.{w}_proj.weight") for w in ("gate", "up", "down"))
        fused["gate_up_proj"].append(torch.cat((gate, up)))
        fused["down_proj"].append(down)
    changed |= {f"model.layers.5.mlp.experts.{name}": torch.stack(tensors) for name, tensors in fused.items()}
    before = largest_gap(glm, load_reference(checkpoint, weights, folder / "reference"), 9, 200)
    update(glm, 2, list(changed.items()), "7")
    assert before > 0.02, "the update was too small to be seen"
    assert largest_gap(glm, load_reference(checkpoint, weights, folder / "reference"), 9, 200) < ROUND_OFF
    assert sync(EngineClient(glm.url, TOKEN).weight_version()) == "7"


def test_no_process_of_an_engine_imports_megatron(served, megatron_imports):
    # megatron-core would switch torch_memory_saver to a mode in which CUDA graphs cannot be paused.
    (glm, _), _, _ = served
    assert sync(EngineClient(glm.url, TOKEN).generate(request(prompt(2, 8), 2), timeout=60))["output_ids"]
    assert not megatron_imports.exists(), megatron_imports.read_text()
    subprocess.run([sys.executable, "-c", "import megatron"], check=True)
    assert "-c" in megatron_imports.read_text()  # the wire is there
    megatron_imports.unlink()


def test_a_teacher_gives_the_log_prob_of_every_response_token_at_temperature_one(served, tmp_path):
    """SGLang does not scale a prompt's log-probs by the temperature that is asked for: the rule book asks for 1."""
    (_, qwen), (_, checkpoint), _ = served
    model = load_reference(checkpoint, read_weights(checkpoint), tmp_path / "reference")
    host, port = qwen.url.removeprefix("http://").split(":")
    ours = SimpleNamespace(sglang_router_ip=host, sglang_router_port=int(port), engine_token=TOKEN)
    args = SimpleNamespace(rm_url=f"{qwen.url}/generate", rollout_temperature=0.5)
    samples = [
        Sample(index=0, tokens=prompt(11, 30), response_length=12),
        Sample(index=1, tokens=prompt(12, 7), response_length=6),
        Sample(index=2, tokens=prompt(13, 9), response_length=3, remove_sample=True),
    ]

    async def score():
        enter_servers(ours)
        return [await reward_func(args, samples[:2]), await reward_func(args, samples[2])]

    assert asyncio.run(score()) == [[0.0, 0.0], 0.0]
    assert samples[2].teacher_log_probs is None, "nothing of it is trained, so nobody asks"
    for sample in samples[:2]:
        tokens = torch.tensor(sample.tokens)
        with torch.no_grad():
            log_p = torch.log_softmax(model(tokens[None]).logits[0, :-1], -1).gather(1, tokens[1:, None])[:, 0]
        found = torch.tensor(sample.teacher_log_probs)
        torch.testing.assert_close(found, log_p[-sample.response_length :], rtol=0, atol=1e-3)
    assert post_process_rewards(args, samples) == ([0.0] * 3, [0.0] * 3)


def test_a_dense_model_is_served_by_sglangs_own_class_and_updated_too(served, tmp_path):
    (_, qwen), (_, checkpoint), _ = served
    weights = read_weights(checkpoint)
    model = load_reference(checkpoint, weights, tmp_path / "reference")
    assert largest_gap(qwen, model, 5, 100) < ROUND_OFF
    generator = torch.Generator().manual_seed(4)
    changed = {name: tensor * (1 + 0.2 * torch.randn(tensor.shape, generator=generator)) for name, tensor in weights.items()}
    model = load_reference(checkpoint, changed, tmp_path / "reference")
    assert largest_gap(qwen, model, 6, 100) > 0.02
    update(qwen, 1, list(changed.items()), "1")
    assert largest_gap(qwen, model, 6, 100) < ROUND_OFF


def test_a_router_that_already_runs_gets_our_engines_and_runs_on_without_them(served, tmp_path):
    (_, qwen), _, _ = served
    theirs = RouterProcess([], token=TOKEN, log_path=tmp_path / "router.log")
    told: list[str] = []
    where = {"host": theirs.host, "port": theirs.port, "token": TOKEN, "report": told.append}
    with pytest.raises(ValueError, match="does not answer .*; start it, or leave the flag out"):
        JoinedRouter([Worker(qwen.url, "regular")], **where).start()
    try:
        theirs.start()
        theirs.wait_ready()
        ours = JoinedRouter([Worker(qwen.url, "regular")], **where)
        ours.start()
        ours.wait_ready()
        ours.start()  # once more, as after an engine was started again
        client = RouterClient(ours.url, TOKEN)
        assert [worker["url"] for worker in sync(client.workers())] == [qwen.url]
        assert len(sync(client.generate(request(prompt(1, 12), 5), timeout=60))["output_ids"]) == 5
        ours.check()
        ours.stop()
        deadline = time.monotonic() + 30
        while sync(client.workers()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert sync(client.workers()) == [] and theirs.is_alive() and ours.is_alive()
    finally:
        theirs.stop()
    assert not ours.is_alive()
    with pytest.raises(EngineDied, match="does not answer"):
        ours.check()


def test_a_router_in_regular_mode_passes_the_key_and_keeps_a_routing_key_together(served, tmp_path):
    (_, qwen), _, _ = served
    router = RouterProcess(
        [Worker(qwen.url, "regular")], token=TOKEN, log_path=tmp_path / "router.log", options={"policy": "consistent_hashing"}
    )
    try:
        router.start()
        router.wait_ready()
        client = RouterClient(router.url, TOKEN)
        assert [worker["url"] for worker in sync(client.workers())] == [qwen.url]
        answer = sync(client.generate(request(prompt(1, 12), 5), routing_key="sample-1", timeout=60))
        assert len(answer["output_ids"]) == 5
    finally:
        router.stop()


def test_an_agents_turns_keep_the_engines_tokens_and_log_probs(served, tmp_path):
    """Of three requests, each a continuation: the log-probs that were recorded are those of the whole sample scored at once."""
    (glm, _), (checkpoint, _), _ = served
    router = RouterProcess([Worker(glm.url, "regular")], token=TOKEN, log_path=tmp_path / "router.log")
    try:
        router.start()
        router.wait_ready()
        sample, scored, read = asyncio.run(trained_and_scored(checkpoint, router.url, glm.url))
    finally:
        router.stop()
    assert 3 <= sum(sample.loss_mask) <= 27 and sample.metadata["num_turns"] == 3 and sample.reward == 1.0
    assert sample.response.count("<|user|>") >= 2 and sample.response.count("<|assistant|>") >= 2
    for kept, recorded, again in zip(sample.loss_mask, sample.rollout_log_probs, scored, strict=True):
        assert recorded == (pytest.approx(again, abs=1e-3) if kept else 0.0)
    assert [message["content"].strip() for message in read] == ["So", "So"]
    assert [json.loads(message["tool_calls"][0]["function"]["arguments"]) for message in read] == [{"a": 2}, {"a": 2}]


@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
def test_weights_change_in_the_middle_of_an_answer_and_each_token_says_which_wrote_it(served, tmp_path, mode):
    """As --pause-generation-mode asks: log-probs against both models, on either side of the change. Last in this file, for the
    engine keeps the second."""
    (_, qwen), (_, checkpoint), _ = served
    client, weights, generator = EngineClient(qwen.url, TOKEN), read_weights(checkpoint), torch.Generator().manual_seed(8)
    changed = {name: tensor * (1 + 0.2 * torch.randn(tensor.shape, generator=generator)) for name, tensor in weights.items()}
    old, new = (load_reference(checkpoint, one, tmp_path / f"{i}") for i, one in enumerate((weights, changed)))
    update(qwen, 1, list(weights.items()), "11")
    tokens, count = prompt(31, 12), 250
    sample = Sample(tokens=tokens)

    def add(answer: dict) -> None:
        said = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
        sample.append_response_tokens(tokens=answer["output_ids"], log_probs=said, meta_info=answer["meta_info"])

    answer = sync_later(client.generate(request(tokens, count), timeout=120))
    while not sync(client.call("GET", "/v1/loads", timeout=30)).json()["loads"][0]["num_running_reqs"]:
        assert not answer.done()
    sync(client.pause_generation(mode))
    if mode != "in_place":
        sync(client.flush_cache())
    sync(client.begin_weight_update("12"))
    sync(client.update_weights_from_tensor([payload(list(changed.items()))]))
    sync(client.end_weight_update("12"))
    sync(client.continue_generation())
    add(answer.result())
    if mode == "abort":
        assert sample.status is Sample.Status.ABORTED
        add(sync(client.generate(request(sample.tokens, count - sample.response_length), timeout=120)))

    first = sample.token_weight_versions.count("11")
    assert sample.weight_version_spans == [["11", first], ["12", count - first]] and 0 < first < count
    at = torch.arange(len(tokens) - 1, len(sample.tokens) - 1)
    written = torch.tensor(sample.tokens)[at + 1]
    before, after = (
        log_probs(model, sample.tokens)[at, written] - torch.tensor(sample.rollout_log_probs) for model in (old, new)
    )
    assert before[:first].abs().max() < ROUND_OFF
    if mode == "in_place":
        assert after[first:].abs().max() > ROUND_OFF, "its cache is that of the older weights"
    else:
        assert after[first:].abs().max() < ROUND_OFF
