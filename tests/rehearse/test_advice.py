"""The advice on cost against numbers by hand: a decode step, a rollout of several waves, what trainers exchange, the knees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from slime.engine.spec import EngineSpec
from slime.model.hf_config import HfConfig
from slime.model.placement import Grid
from slime.rehearse.advice.curves import Curve, Point, acceptance, accepted_tokens
from slime.rehearse.advice.variants import Bench, Variant
from slime.rehearse.known_models import known_config
from slime.rehearse.model.cost import Cost, CostPhase
from slime.rehearse.model.decode import Engines, Served, decode_step, generation, prefill_seconds
from slime.rehearse.model.engine_memory import EngineRank
from slime.rehearse.model.exchange import training_exchange
from slime.rehearse.model.rates import GPUS, Rates, rates_of
from slime.rehearse.model.shares import StageShare
from slime.rehearse.result import Options, rehearse
from tests.rehearse.recipes import Recipe, one_node

GLM = known_config("GLM-5.2-FP8")
QWEN = known_config("Qwen3-4B")


def served(
    hf: HfConfig, gpus: int, *, dp: int = 1, weights: int, experts: int = 0, held: int = 6, **settings: object
) -> Served:
    sizes = {"tp_size": gpus, "pp_size": 1, "dp_size": dp, "ep_size": gpus if experts else 1}
    spec = EngineSpec(
        model="default", role="decode", engine_id=0, gpu_offset=0, num_gpus=gpus, num_nodes=max(1, gpus // 8), **sizes,
        model_path="m", update_weights=True, needs_offload=True, random_seed=1, settings=settings,
    )  # fmt: skip
    rank = EngineRank("decode", weights, 1000, 0.7, gpus=gpus, attention_dp=dp, expert_weights=experts)
    return Served(spec, rank, 2, held)


def test_a_decode_step_of_a_dense_model_by_hand() -> None:
    """Qwen3-4B, TP 2 in a node, 10 requests of 3,000 tokens: 36 layers, 2 x 2 sums of 10 x 2560 bf16 a layer."""
    kind = served(QWEN, 2, weights=4 * 10**9)
    step = decode_step(QWEN, kind, Rates(), requests=10, context=3000, flops=8e9, gpus_per_node=8)
    memory = 3350e9 * 0.7
    assert step.parts == pytest.approx(
        {
            "kernels": 36 * 250e-6,
            "weights": 4e9 / memory,
            "cache": 10 * 3000 * 1000 / memory,
            "products": 10 * 8e9 / 2 / (989e12 * 0.3),
            "exchange": 36 * (2 * 50e-6 + 4 * 10 * 2560 * 2 / 450e9),
        }
    )
    assert step.limit == "decode latency" and step.draft_tokens == 1
    wide = decode_step(QWEN, kind, Rates(), requests=200, context=300_000, flops=8e9, gpus_per_node=8)
    assert wide.limit == "decode bandwidth" and wide.parts["kernels"] == step.parts["kernels"]
    given = decode_step(QWEN, kind, Rates(decode_step_ms=40), requests=10, context=3000, flops=8e9, gpus_per_node=8)
    assert given.seconds == 0.040 and given.limit == "decode step"


def test_a_decode_step_of_wide_experts_reads_those_that_are_met() -> None:
    """64 ranks with DeepEP and 4 drafts: 8 of 256 experts for each of 64 x 5 tokens; 56 of 64 GPUs are on other nodes."""
    settings = {"moe_a2a_backend": "deepep", "speculative_algorithm": "EAGLE", "speculative_num_steps": 4}
    kind = served(GLM, 64, dp=64, weights=32 * 10**9, experts=11 * 10**9, **settings)
    step = decode_step(GLM, kind, Rates(), requests=64, context=30000, flops=1e11, gpus_per_node=8)
    met = 1 - (248 / 256) ** 320
    assert met > 0.999
    assert step.parts["weights"] == pytest.approx((21e9 + 11e9 * met) / (3350e9 * 0.7))
    assert step.parts["kernels"] == pytest.approx((78 + 4) * 250e-6)
    sent = 5 * 8 * 6144 * 3
    assert step.parts["exchange"] == pytest.approx(75 * (2 * 50e-6 + sent * (56 / 64 / 50e9 + 8 / 64 / 450e9)))
    few = decode_step(GLM, kind, Rates(), requests=1, context=30000, flops=1e11, gpus_per_node=8)
    assert few.parts["weights"] == pytest.approx((21e9 + 11e9 * (1 - (248 / 256) ** 5)) / (3350e9 * 0.7))


def test_samples_that_wait_take_a_place_after_a_mean_response() -> None:
    """Two engines hold 6 each. 12 samples of up to 1,000 tokens take 1,000 steps; 36 take 1,000 + 2 x 500."""
    engines = Engines((served(QWEN, 1, weights=10**9),), (served(QWEN, 1, weights=10**9),))
    assert engines.held == 12
    told = {"longest": 1000, "prompt": 100, "flops": 1e9, "gpus_per_node": 8}
    once, thrice = (generation(QWEN, engines, Rates(), samples=samples, **told) for samples in (12, 36))
    assert (once.steps, once.waves, once.limit) == (1000, 1, "decode latency")
    assert (thrice.steps, thrice.waves, thrice.limit) == (2000, 3, "KV room")
    # On average 12 x 500 / 1000 = 6 samples are under way, and 9 where others follow.
    assert [one.step.parts["products"] * 989e12 * 0.3 / 1e9 for one in (once, thrice)] == pytest.approx([3, 4.5])
    assert prefill_seconds(engines, Rates(), samples=12, prompt=100, flops=1e9) == pytest.approx(1.2e12 / (2 * 989e12 * 0.3))


def test_what_trainers_exchange_by_hand() -> None:
    """TP 2, CP 2, EP 8 on 16 GPUs of 2 nodes, DP 4: 4,000 tokens are 500 rows of a rank; one layer, with experts."""
    grid = Grid(world=16, tp=2, pp=1, cp=2, ep=8, etp=1)
    share = StageShare(0, (5,), 1, dense=10**9, experts=2 * 10**9, frozen=0, has_embedding=True, has_head=True)
    told = {"tokens": 4000, "steps": 1, "passes": 1, "recompute": True, "grad_bytes": 4, "gpus_per_node": 8}
    found = training_exchange(GLM, grid, [share], Rates(), **told)
    rows, times = 500, 4  # log-probs, forward, forward again, backward
    assert found["TP"] == pytest.approx(times * 4 * rows * 6144 * 2 / 2 / 450e9)
    assert found["CP"] == pytest.approx(times * 2 * rows * 576 * 2 / 2 / 450e9)
    assert found["EP"] == pytest.approx(times * 2 * rows / 2 * 8 * 6144 * 2 * 7 / 8 / 450e9)
    # Dense gradients over 8 ranks, 2 apart: 4 on a node. Experts over 2, 8 apart: on two nodes.
    dense = 6e9 * 7 / 8 * (4 / 7 / 50e9 + 3 / 7 / 450e9)
    assert found["DP"] == pytest.approx(dense + 12e9 / 2 / 50e9) and found["PP"] == 0


def test_drafts_are_right_with_the_chance_that_the_accepted_tokens_give() -> None:
    chance = acceptance(1 + 0.5 + 0.25 + 0.125, 3)
    assert chance == pytest.approx(0.5) and accepted_tokens(chance, 1) == pytest.approx(1.5)


def point(value: float, seconds: float, *, own: bool = False) -> Point:
    cost = Cost(1_000_000, 1.0, 3.0, 1.0, (CostPhase("train", seconds, "", "training FLOPs"),), None, 3600)
    return Point(value, str(value), Variant(("--x", str(value))), cost, own=own)


def test_the_knee_is_the_first_choice_that_is_as_good_as_the_best() -> None:
    points = (point(1, 10, own=True), point(2, 6), point(4, 4.1), point(8, 4.0))
    assert Curve("x", points).knee.value == 4 and Curve("x", points).gain == pytest.approx(10 / 4.1)
    assert Curve("x", points, most=2).knee.value == 2, "beyond it samples wait"
    assert Curve("x", (point(1, 4.2), point(2, 4.1, own=True), point(4, 4.0))).knee.value == 2, "its own is as good"


def test_rates_are_those_of_the_gpu() -> None:
    assert rates_of(None) == Rates() == rates_of("h100")
    assert rates_of("h200").hbm_gb_per_s == 4800 and GPUS["h200"].memory_gb == 141


def test_every_knee_of_the_recipe_passes_the_rehearsal_that_names_it(flagship: Recipe, tmp_path: Path) -> None:
    """Three decode engines of 64 ranks hold six of the longest samples each rank by cache, 768 requests by flag: 3 x 384."""
    options = Options(env=flagship.env, build_ranks=False, weight_map=False, engine_version="0.5.23")
    argv = flagship.written(tmp_path)
    done = rehearse(argv, options)
    by_name = {curve.over: curve for curve in done.curves}
    assert list(by_name) == [
        "rollout batch", "prefill/decode split", "nodes", "response length", "accepted draft tokens",
    ]  # fmt: skip
    assert done.assessment.engines.held == 3 * 6 * 64 == 1152
    batch = by_name["rollout batch"]
    assert batch.own.value == 8 and batch.knee.value == 144 and batch.gain > 5
    assert batch.knee.variant.flags == ("--rollout-batch-size", "144", "--global-batch-size", "1152")
    [small] = [point for point in by_name["nodes"].points if point.value == 16]
    assert small.cost is None and "a GPU has 80" in small.refused
    bench = Bench(tuple(argv), options, done.rates, done.engines.version, tmp_path)
    for curve in done.curves:
        for choice in curve.known:
            again = rehearse(bench.words(choice.variant), replace(options, curves=False))
            assert again.findings.launchable, (curve.over, choice.label)
            if curve.over != "accepted draft tokens":  # which assumes another number of tokens than the flags
                assert again.cost.per_million == pytest.approx(choice.per_million)


def test_a_dense_model_without_drafts_has_curves_too(tmp_path: Path) -> None:
    options = Options(build_ranks=False, weight_map=False, engine_version="0.5.23")
    argv = one_node("qwen3-4B", "Qwen3-4B", tp="2", ep="1")
    done = rehearse(argv, options)
    assert [curve.over for curve in done.curves] == ["rollout batch", "nodes", "response length"]
    bench = Bench(tuple(argv), options, done.rates, done.engines.version, tmp_path)
    for curve in done.curves:
        assert rehearse(bench.words(curve.knee.variant), replace(options, curves=False)).findings.launchable
