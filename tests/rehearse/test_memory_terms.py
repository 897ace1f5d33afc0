"""Terms of the memory and cost model, one by one, against numbers by hand for GLM-5.2 on 256 GPUs."""

from __future__ import annotations

from dataclasses import replace

from slime.config.rules.dispatch import buffer_bytes
from slime.config.stages import cut_layers
from slime.rehearse.checks.memory import weight_copies
from slime.rehearse.model.cost import bubble
from slime.rehearse.model.engine_memory import EngineRank, engine_weights
from slime.rehearse.model.host_memory import host_memory
from slime.rehearse.model.memory import Assumed, Turns, in_flight, optimizer_bytes, stage_memory, stored_inputs
from slime.rehearse.model.shares import stage_shares
from tests.config.flags import config_of
from tests.rehearse.test_arithmetic import GRID, HF, SHAPES, STOCK, TABLE


def test_micro_batches_in_flight_never_exceed_those_of_a_step() -> None:
    few = replace(SHAPES, micro_batches=3)
    assert [in_flight(stage, GRID, few) for stage in (0, 5, 6, 7)] == [3, 3, 2, 1]
    # Interleaved in two chunks: 2 (8 - 1 - stage) + 8 + 1 chunks of half a stage each, as megatron-core warms up.
    assert [in_flight(stage, GRID, replace(SHAPES, vpp=2)) for stage in (0, 7)] == [23 / 2, 9 / 2]
    assert in_flight(0, GRID, replace(few, vpp=2)) == 3


def test_block_recomputation_keeps_the_other_layers_whole() -> None:
    """One of stage 0's 14 layers is recomputed, 13 keep 16 inputs' worth each: 8192 x 6144 bf16 values over TP 4."""
    share = stage_shares(TABLE, cut_layers(STOCK), GRID)[0]
    one = 8192 * 6144 * 2 // 4
    assert stored_inputs(share, HF, GRID, SHAPES) == 14 * one
    assert stored_inputs(share, HF, GRID, replace(SHAPES, recompute_block=1)) == (1 + 13 * 16) * one
    assert stored_inputs(share, HF, GRID, replace(SHAPES, recompute_block=20)) == 14 * one
    assert stored_inputs(share, HF, GRID, replace(SHAPES, recompute=False)) == 14 * 16 * one


def test_the_optimizers_state_is_shared_by_replicas_of_experts_too() -> None:
    """Two expert replicas share the state of a rank's experts, 16 data- and context-parallel ranks that of the rest."""
    share = stage_shares(TABLE, cut_layers(STOCK), GRID)[1]
    wide = replace(GRID, world=512)
    assert (GRID.edp, wide.edp, wide.dp * wide.cp) == (1, 2, 16)
    assert optimizer_bytes(share, GRID, SHAPES) == (share.dense - share.frozen) * 12 // 8 + share.experts * 12
    assert optimizer_bytes(share, wide, SHAPES) == (share.dense - share.frozen) * 12 // 16 + share.experts * 12 // 2


def test_who_sleeps_decides_what_a_gpu_holds() -> None:
    """By hand for stage 7: an awake engine takes 0.7 of 80 GB, 8 GB beside it and its buffers; half an optimizer stays."""
    share = stage_shares(TABLE, cut_layers(STOCK), GRID)[7]
    engine = EngineRank("decode", 32 * 10**9, 1, 0.7, draft_weights=10**9, buffers=2 * 10**9)
    told = {"bucket_bytes": 1 << 30, "engine": engine, "gpu_bytes": 80e9, "assumed": Assumed()}
    stage = {
        name: stage_memory(share, HF, GRID, shapes, **told, turns=turns)
        for name, shapes, turns in (
            ("both sleep", SHAPES, Turns(True)),
            ("engine stays", SHAPES, Turns(True, engine_sleeps=False)),
            ("trainer stays", SHAPES, Turns(True, trainer_sleeps=False)),
            ("half offloaded", replace(SHAPES, offloaded=0.5), Turns(True)),
        )
    }
    train = {name: found.phase("train").total for name, found in stage.items()}
    rollout = {name: found.phase("rollout").total for name, found in stage.items()}
    assert train["engine stays"] - train["both sleep"] == 56 * 10**9 + 8 * 10**9 - 5 * 10**9
    assert rollout["both sleep"] == 56 * 10**9 + 8 * 10**9 + 2 * 10**9 + 4 * 10**9 == rollout["engine stays"]
    state = optimizer_bytes(share, GRID, SHAPES)
    weights, gradients = 2 * share.parameters, 4 * share.trained
    assert rollout["trainer stays"] - rollout["both sleep"] == weights + gradients + 6 * 10**9 - 4 * 10**9
    assert train["half offloaded"] - train["both sleep"] == state - int(state * 0.5)
    found = stage["half offloaded"]
    assert (found.host_optimizer, found.host_gradients) == (int(state * 0.5), int(state * 0.5) // 12 * 4)
    assert stage["both sleep"].host_weights == weights and stage["trainer stays"].host_weights == 0


def test_an_engines_weights_follow_its_own_sizes() -> None:
    """16 GPUs keep four times the experts of 64; 8 of one attention share what has heads. FP8 with one scale per 128 x 128."""
    from slime.engine.spec import EngineSpec

    def spec(gpus: int, dp: int, **settings: object) -> EngineSpec:
        return EngineSpec("default", "decode", 0, 0, gpus, gpus // 8, gpus, 1, dp, gpus, "m", True, True, 0, settings)

    expert = 37_757_952
    dense = {"moe_a2a_backend": "deepep", "moe_dense_tp_size": 1, "enable_dp_lm_head": True}
    wide, narrow = (engine_weights(TABLE, HF, spec(gpus, gpus, **dense)).main for gpus in (64, 16))
    assert narrow - wide == 75 * 256 * expert * 3 // 64
    assert round(wide / 1e9, 2) == 31.96 and round(narrow / 1e9, 2) == 65.94
    # The vocabulary's two matrices over 8 attention ranks instead of whole on each.
    shared = engine_weights(TABLE, HF, spec(64, 8, **dense)).main
    assert wide - shared > 2 * 154880 * 6144 * 2 * 7 / 8


def test_a_bubble_shrinks_with_micro_batches_and_chunks() -> None:
    assert bubble(8, 1) == 7 / 8 and bubble(8, 25) == 7 / 32 and bubble(1, 5) == 0
    assert bubble(8, 25, 2) == 7 / 57


def test_deepep_buffers() -> None:
    """1024 tokens x 256 experts x 12,288 bytes four times, and 16 bytes more of each that is received."""
    tokens = 1024 * 256
    assert buffer_bytes(tokens=1024, hidden=6144, experts=256) == 2 * (tokens * 12_288 + tokens * 12_304 + 4 * 256)


def test_reference_and_teacher_lie_in_main_memory_beside_the_trained_weights() -> None:
    """Each pass puts another's weights into the one model, so the trained ones are copied, too: 1 + 1, 1 + 1 + 1."""
    for words, copies in (
        ((), 0),
        (("--use-kl-loss", "--ref-load", "/r"), 2),
        (("--use-opd", "--opd-type", "megatron", "--opd-teacher-load", "/t"), 2),
        (("--kl-coef", "0.1", "--ref-load", "/r", "--use-opd", "--opd-type", "megatron", "--opd-teacher-load", "/t"), 3),
    ):
        assert weight_copies(config_of(*words, door="rehearse")) == copies, words
    share = stage_shares(TABLE, cut_layers(STOCK), GRID)[3]
    told = {"bucket_bytes": 1 << 30, "engine": None, "gpu_bytes": 80e9, "assumed": Assumed(), "turns": Turns(True)}
    assert stage_memory(share, HF, GRID, replace(SHAPES, copies=3), **told).host_copies == 3 * share.parameters * 2
    plain, kept = (host_memory(share, HF, GRID, replace(SHAPES, copies=n), Assumed(), bucket_bytes=1 << 30) for n in (0, 2))
    assert kept.phase("rollout").total - plain.phase("rollout").total == 2 * share.parameters * 2


def test_a_critic_is_a_second_model_wherever_the_trainer_is() -> None:
    """Weights, gradients and state once more while training; of a sleeping trainer its weights once more in main memory."""
    share = stage_shares(TABLE, cut_layers(STOCK), GRID)[7]
    engine = EngineRank("decode", 32 * 10**9, 1, 0.7)
    told = {"bucket_bytes": 1 << 30, "engine": engine, "gpu_bytes": 80e9, "assumed": Assumed(), "turns": Turns(True)}
    plain, ppo = (
        stage_memory(share, HF, GRID, replace(SHAPES, critic=critic, offloaded=0.5), **told) for critic in (False, True)
    )
    weights, gradients = share.parameters * SHAPES.param_bytes, share.trained * SHAPES.grad_bytes
    state = optimizer_bytes(share, GRID, SHAPES)
    more = weights + gradients + state - int(state * 0.5)
    for phase in ("train", "log-probs", "checkpoint"):
        assert ppo.phase(phase).total - plain.phase(phase).total == more
    for phase in ("weight sync", "rollout"):
        assert ppo.phase(phase).total == plain.phase(phase).total
    assert (ppo.host_weights, ppo.host_optimizer) == (2 * plain.host_weights, 2 * plain.host_optimizer)


def test_an_engines_cache_is_no_larger_than_its_options_allow() -> None:
    """32 GB of weights in 0.7 of 80 GB leave 24 GB, 24 million tokens of 1,000 bytes."""
    from slime.rehearse.model.engine_memory import _most_tokens
    from slime.rehearse.model.memory import engine_parts

    assert [_most_tokens(said) for said in (None, "400000", "400k", "1.5M", "1Mi", "many")] == [
        None, 400_000, 400_000, 1_500_000, 1 << 20, None,
    ]  # fmt: skip
    whole = EngineRank("decode", 32 * 10**9, 1000, 0.7)
    assert whole.cache_tokens(80e9) == 24_000_000 and engine_parts(whole, 80e9, Assumed())["KV cache"] == 24 * 10**9
    bounded = replace(whole, most_tokens=400_000)
    assert bounded.cache_tokens(80e9) == 400_000 and engine_parts(bounded, 80e9, Assumed())["KV cache"] == 4 * 10**8
    assert replace(whole, most_tokens=10**9).cache_tokens(80e9) == 24_000_000
