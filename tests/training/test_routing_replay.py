"""--use-routing-replay: in every layout the steps use the experts of the pass before them, whatever the routers have become."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import RankFailed, run_ranks
from test_gradients import GLM_CUTS
from tiny import config_for, plans, rollout, start

from slime.batch.layout import SequenceLayout
from slime.config.passes import passes_of
from slime.model.hf_config import read_hf_config
from slime.training.routing_replay import own_rows

pytestmark = pytest.mark.slow


def whole_cut(cut: dict) -> dict:
    return cut | {"expert_tensor_parallel_size": 1, "sequence_parallel": cut.get("tensor_model_parallel_size", 1) > 1}


CUTS = {1: {"whole": {}}, 2: {name: whole_cut(cut) for name, cut in GLM_CUTS[2].items()}}
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def listened(rank: int, folder, changes: dict, batch, world: int, megatron: dict) -> tuple:
    """A rollout of two steps with routers that forget all they knew in between -> (choices in the steps that were not the
    recorded ones, choices that the routers themselves would have made otherwise, choices in all, the report)."""
    config = config_for(folder, global_batch_size=4, use_routing_replay=True, **changes)
    config.model.megatron.update(megatron)
    trainer = start(config)
    wrong, own, total = 0, 0, 0

    def listen(choices):
        nonlocal wrong, own, total
        ask, calls = choices.get_replay_topk, {False: 0, True: 0}

        def asked(scores, topk, groups, group_topk, own_topk):
            nonlocal wrong, own, total
            values, chosen = ask(scores, topk, groups, group_topk, own_topk)
            if choices._mode == "replay":
                kind = torch.is_grad_enabled()
                kept = choices.kept[calls[kind]]
                calls[kind] += 1
                wrong += int((chosen.cpu() != kept.long()).sum())
                own += int((own_topk(scores, topk, groups, group_topk)[1].cpu() != kept.long()).sum())
                total += chosen.numel()
                torch.testing.assert_close(values, scores.gather(1, chosen))
            return values, chosen

        choices.get_replay_topk = asked

    for choices in trainer.replay.of_routers:
        listen(choices)

    def forget(*_: object) -> None:
        for chunk in trainer.model:
            for name, parameter in chunk.named_parameters():
                if name.endswith("router.weight"):
                    parameter.data.normal_(generator=torch.Generator().manual_seed(3))

    trainer._hooks["step"] = forget
    report = trainer.train(batch, plans(batch, config, world))
    return wrong, own, total, report


@pytest.mark.parametrize("world", CUTS)
def test_steps_take_the_recorded_experts_in_every_layout(glm_tiny, world):
    batch = rollout(seed=61)
    for name, cut in CUTS[world].items():
        for megatron in ({}, RECOMPUTED) if name in ("whole", "PP2, 6 + 2 layers", "PP2 VPP2") else ({},):
            answers = run_ranks(world, listened, glm_tiny, cut, batch, world, megatron)
            assert sum(wrong for wrong, _, _, _ in answers) == 0, (name, megatron)
            own, total = (sum(answer[i] for answer in answers) for i in (1, 2))
            assert own > total / 4, "routers that forgot would choose others, so that the promise is worth something"


def test_what_is_kept_costs_two_bytes_a_choice(glm_tiny):
    """Five MoE layers, top 2 of 8 experts or as the model has it: rows of all micro-batches, padding included."""
    batch = rollout(seed=61)
    _, _, total, report = run_ranks(1, listened, glm_tiny, {}, batch, 1, {})[0]
    assert report.metrics["perf/routing_replay_bytes"] == 2 * total


def test_with_routers_that_stand_still_nothing_changes(glm_tiny):
    def run(rank: int, **changes):
        trainer = start(config_for(glm_tiny, advantage_estimator="gspo", **changes))
        batch = rollout(seed=62)
        return trainer.train(batch, plans(batch, trainer.config, 1)).per_step

    assert run_ranks(1, lambda rank: run(rank, use_routing_replay=True))[0] == run_ranks(1, run)[0]


def test_replay_needs_the_pass_that_records(glm_tiny):
    assert passes_of(config_for(glm_tiny, use_routing_replay=True), 1).old
    assert passes_of(config_for(glm_tiny, use_routing_replay=True, use_rollout_logprobs=True), 1).old


def engines_said(folder, batch, *, seed: int = 0):
    """The batch with experts that no router would choose: distinct numbers drawn anew, none for the last prompt token."""
    hf = read_hf_config(folder)
    rng, layers, topk = np.random.default_rng(seed), hf.num_layers, hf["num_experts_per_tok"]
    column = []
    for tokens in batch.tokens:
        drawn = rng.random((len(tokens) - 1, layers, hf.num_experts)).argsort(-1)[..., :topk].astype(np.int16)
        drawn[0] = -1
        # Of two samples the engines did not see the last tokens.
        column.append(drawn[: len(drawn) - 3] if len(column) % 4 == 1 else drawn)
    return replace(batch, routed_experts=tuple(column))


def of_engines(rank: int, folder, changes: dict, batch, world: int) -> dict[str, float]:
    config = config_for(folder, clip_grad=0.0, use_routing_replay=True, use_rollout_routing_replay=True, **changes)
    trainer = start(config)
    report = trainer.train(batch, plans(batch, config, world))
    return report.per_step[0] | {"log_probs": report.metrics.get("rollout/log_probs", 0.0)}


@pytest.mark.parametrize("world", CUTS)
def test_the_engines_experts_are_the_trainers_in_every_layout(glm_tiny, world):
    """Drawn at random, they make another function of the model, and it must be the same one however the rows are cut."""
    batch = engines_said(glm_tiny, rollout(seed=63))
    changes = dict(advantage_estimator="gspo")
    one = run_ranks(1, of_engines, glm_tiny, changes, batch, 1)[0]
    assert one["train/ppo_kl"] == 0, "the old log-probs are of the same experts as the step's"
    free = run_ranks(1, lambda rank: of_engines(rank, glm_tiny, changes, engines_said(glm_tiny, rollout(seed=63), seed=1), 1))[
        0
    ]
    assert abs(free["log_probs"] - one["log_probs"]) > 1e-4, "other experts are another function"
    for name, cut in CUTS[world].items():
        for found in run_ranks(world, of_engines, glm_tiny, changes | cut, batch, world):
            assert found["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=1e-3), name
            assert found["train/entropy_loss"] == pytest.approx(one["train/entropy_loss"], rel=1e-4), name


def test_experts_that_an_engine_did_not_record_are_named(glm_tiny):
    batch = rollout(seed=64)
    hf = read_hf_config(glm_tiny)
    nothing = tuple(np.zeros((len(t) - 1, hf.num_layers, hf["num_experts_per_tok"]), np.int16) for t in batch.tokens)
    with pytest.raises(RankFailed, match="layer 4: an engine names one expert twice for a token"):
        run_ranks(1, of_engines, glm_tiny, {}, replace(batch, routed_experts=nothing), 1)
    for wrong, words in ((nothing[0][:, 1:], "2 a token in 7 layers; this model has"), (nothing[0] + 99, "experts up to 99, ")):
        with pytest.raises(RankFailed, match=words):
            run_ranks(1, of_engines, glm_tiny, {}, replace(batch, routed_experts=(wrong, *nothing[1:])), 1)
    with pytest.raises(RankFailed, match="this rollout has no routed experts"):
        run_ranks(1, of_engines, glm_tiny, {}, batch, 1)


@pytest.mark.parametrize("contiguous", [True, False])
def test_every_row_of_a_stream_is_on_one_rank_with_its_own_experts(contiguous):
    """Two context-parallel ranks of two tensor-parallel ones: a row's experts say which token they are of."""
    lengths, seen = [5, 9, 2], []
    chosen = [np.stack([np.arange(n - 1) + 100 * s, np.full(n - 1, 7)], 1).astype(np.int16) for s, n in enumerate(lengths)]
    expected = [value for s, n in enumerate(lengths) for value in [*(np.arange(n - 1) + 100 * s), -1]]
    make = SequenceLayout.contiguous if contiguous else SequenceLayout.zigzag
    for cp_rank in range(2):
        layout = make(lengths, cp_rank=cp_rank, cp_size=2, multiple=4)
        slices = [own_rows(chosen, layout, tp_rank=tp_rank, tp_size=2) for tp_rank in range(2)]
        assert len(slices[0]) == len(slices[1]) == len(layout.rows) // 2
        for row, experts in zip(layout.rows.tolist(), torch.cat(slices).tolist(), strict=True):
            if row < 0 or expected[row] < 0:
                assert experts == [-1, -1]
            else:
                assert experts == [expected[row], 7]
            seen += [row] if row >= 0 else []
    assert sorted(seen) == list(range(sum(lengths)))
    assert (own_rows([], make([], cp_rank=0, cp_size=1, multiple=4), tp_rank=0, tp_size=1) == -1).all()
