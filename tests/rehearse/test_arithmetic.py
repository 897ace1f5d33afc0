"""Numbers against the published accounting of GLM-5.2, worked out by hand from its config."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from slime.config.stages import Cut, cut_layers, layout_string, wrong_starts
from slime.engine.spec import EngineSpec
from slime.model.hf_config import HfConfig
from slime.model.names import NameTable
from slime.model.placement import Grid, Places, ranges
from slime.rehearse.checks.layout import layer_costs
from slime.rehearse.known_models import known_config
from slime.rehearse.model.cost import Rates, sync_bytes
from slime.rehearse.model.engine_memory import EngineRank, kv_bytes_per_token
from slime.rehearse.model.flops import active_parameters, core, mean_selected, model_work
from slime.rehearse.model.keepers import Keepers
from slime.rehearse.model.measured import Measured, compare, read_measured
from slime.rehearse.model.memory import (
    Assumed,
    TrainShapes,
    Turns,
    checkpointed_input,
    experts_parts,
    head_parts,
    in_flight,
    index_holder,
    optimizer_bytes,
    stage_memory,
    working_sets,
)
from slime.rehearse.model.shares import stage_shares
from slime.rehearse.model.stages import balance, best_list, legal_first_last, stage_costs
from slime.rehearse.model.weight_map import Row, WeightMap, build_weight_map, checkpoint_bytes, problems, undelivered
from slime.weights.plan import Receiver, Trainer, nodes_of, plan_sync

HF = known_config("/any/GLM-5.2-FP8")
TABLE = NameTable.for_model(HF)
GRID = Grid(world=256, tp=4, pp=8, cp=8, ep=32, etp=1)
STOCK = Cut(78, 8, first=14, last=16)
SHAPES = TrainShapes(
    tokens=8192,
    stream=65536,
    recompute=True,
    param_bytes=2,
    grad_bytes=4,
    optimizer_bytes=12,
    offloaded=1.0,
    micro_batches=64,
    padded_vocab=154880,
    log_probs_chunk=16384,
)


def test_tensors_and_parameters_are_those_of_the_release() -> None:
    assert TABLE.num_parameters(mtp=False) == 743_377_000_704
    assert TABLE.num_parameters(mtp=True) == 9_952_920_320
    assert len(TABLE.hf_names()) == 59_585 and len(TABLE.hf_names(fp8=True)) == 118_629
    assert checkpoint_bytes(TABLE, fp8=True) == 755_617_140_416
    attention, indexer, expert, router = 165_019_648, 9_371_648, 37_748_736, 256 * 6144
    by_hand = 78 * attention + 21 * indexer + 3 * 3 * 12288 * 6144 + 75 * (9 * expert + router) + 154880 * 6144
    assert active_parameters(TABLE, HF) == by_hand == 40_297_758_720


@pytest.mark.parametrize(
    ("length", "forward", "training", "recomputed"),
    [
        (8192, 100.8, 311, 410),
        (32768, 105.0, 321, 424),
        (65536, 108.1, 325, 431),
        (131072, 113.9, 331, 443),
        (262144, 125.3, 343, 466),
        (1048576, 193.0, 410, 602),
    ],
)
def test_flops_per_token(length: int, forward: float, training: float, recomputed: float) -> None:
    work = model_work(TABLE, HF, length)
    assert round(work.forward / 1e9, 1) == forward
    # The published sums have three products of the output layer; here the logits are made twice, 2 x 154,880 x 6144 more.
    again = 2 * 154880 * 6144
    assert round((work.training(recompute=False) - again) / 1e9) == training
    assert round((work.training(recompute=True) - again) / 1e9) == recomputed


def test_selected_keys_are_the_mean_of_a_loop() -> None:
    for topk, length in ((4, 11), (16, 16), (7, 3)):
        assert mean_selected(topk, length) == pytest.approx(sum(min(i, topk) for i in range(1, length + 1)) / length)
    dense = known_config("/any/Qwen3-4B")
    assert core(dense, 9)[0] == 2 * 32 * 5 * (128 + 128)


def test_parameters_per_stage_of_the_stock_split() -> None:
    shares = stage_shares(TABLE, cut_layers(STOCK), GRID)
    assert [round(share.parameters / 1e9, 3) for share in shares] == [4.645, *[2.950] * 6, 6.137]
    assert [share.computing for share in shares] == [5, *[2] * 6, 4]
    rows = [(0, 9.29, 18.58, 27.9, 41.8, 335), (3, 5.90, 11.80, 17.7, 29.8, 238), (7, 12.27, 24.55, 36.8, 59.9, 480)]
    for stage, bf16, gradients, both, optimizer, node in rows:
        count = shares[stage].parameters
        state = optimizer_bytes(shares[stage], GRID, SHAPES, trained_only=False)
        found = (
            round(2 * count / 1e9, 2),
            round(4 * count / 1e9, 2),
            round(6 * count / 1e9, 1),
            round(state / 1e9, 1),
            round(8 * state / 1e9),
        )
        assert found == (bf16, gradients, both, optimizer, node)
    # Every rank's parameters, each tensor once: replicated ones are counted by one rank of the stage.
    assert sum(s.dense for s in shares) > 0 and 32 * sum(s.experts for s in shares) == 75 * 256 * 37_748_736


def test_activations_of_the_first_stage() -> None:
    assert in_flight(0, GRID, SHAPES) == 8 and in_flight(7, GRID, SHAPES) == 1
    assert checkpointed_input(HF, GRID, SHAPES) == 8192 * 6144 * 2 // 4
    assert checkpointed_input(HF, GRID, SHAPES) * 14 * 8 == 2.625 * 2**30
    # By heads every tensor-parallel rank has the indices of all 8192 rows, by queries of its 2048.
    by_heads = replace(SHAPES, core_axis="heads")
    assert index_holder(HF, GRID, by_heads) == 64 * 2**20 and index_holder(HF, GRID, by_heads) * 5 * 8 == 2.5 * 2**30
    assert index_holder(HF, GRID, SHAPES) == 16 * 2**20
    last = head_parts(HF, GRID, SHAPES)
    # Logits of 8192 rows and 38,720 words would be 1.27 GB in fp32; a tile of 4096 words is 134 MB, and half that its gradient.
    assert last["logits of a tile, fp32"] == 2 * last["gradient of these logits"] == 8192 * 4096 * 4 == 134_217_728
    assert last["rows before the output layer"] * 3 == last["gradient of these rows, fp32 and rounded"] == 8192 * 6144 * 6
    assert last["gradient of the output layer"] == 38720 * 6144 * 2


def test_working_set_of_a_sparse_layer() -> None:
    """One of 8 context-parallel ranks has 8192 rows, one of 4 tensor-parallel ranks 2048 of them with all 64 heads."""
    shares = stage_shares(TABLE, cut_layers(STOCK), GRID)
    core, indexer, experts = working_sets(HF, GRID, SHAPES, shares[0], backward=True)
    pairs, bf16 = 2048 * 64, 2
    assert core["absorbed queries and their gradient"] == 2 * pairs * 576 * bf16
    assert core["outputs over latents, their gradient and its copy"] == 3 * pairs * 512 * bf16
    assert core["staged gradients of keys"] == 2048 * 2048 * 576 * bf16 == 4_831_838_208
    # Keys as they are and reordered in bf16, and their gradient in float32.
    assert core["keys, reordered, and their fp32 gradient"] == 65536 * 576 * (2 + 2 + 4)
    assert indexer["indexer scores"] == 1 << 28 < 2048 * 65536 * 4, "in pieces, whatever their number"
    # What attention keeps for its own backward, then 16,384 routed rows of 6144 in and out, three of 2048, all with gradients.
    kept = pairs * bf16 * (256 + 576 + 512 + 256) + 64 * (192 + 256) * 512 * bf16
    routed = experts_parts(HF, GRID, SHAPES, both_ways=True)
    assert sum(routed.values()) == 2 * 16_384 * bf16 * (2 * 6144 + 3 * 2048)
    hidden = 4 * 2048 * 6144 * bf16
    assert sum(experts.values()) == kept + sum(routed.values()) + hidden
    by_heads = working_sets(HF, GRID, replace(SHAPES, core_axis="heads"), shares[0], backward=True)[0]
    assert by_heads["staged gradients of keys"] == 5_000_000_000 and by_heads["queries"] == core["queries"]
    last = working_sets(HF, GRID, SHAPES, shares[7], backward=False)[-1]
    assert set(last) == {"rows before the output layer", "logits of a tile, fp32"}


@pytest.mark.parametrize(
    ("tokens", "micro_batches", "measured"),
    [
        (14_912, 3, (4_191_205_376, 7_753_120_256, 11_880_366_080, 19_532_266_496)),
        (16_272, 6, (4_191_205_376, 7_653_117_440, 12_269_192_192, 20_163_791_360)),
    ],
    ids=["H100", "H200"],
)
def test_the_tiny_run_on_one_gpu_is_predicted(tokens: int, micro_batches: int, measured: tuple[int, ...]) -> None:
    """Peaks of live tensors that scripts/run-glm5.2-tiny.sh measured in load, hand-over, log-probs and training, in its
    longest micro-batch."""
    from tools.make_tiny_checkpoint import PRESETS, glm_config
    from tools.tiny_tokenizer import TokenizerFacts

    hf = HfConfig(glm_config(PRESETS["h200"].size, TokenizerFacts(320, (1,), 1)))
    grid, table = Grid(world=1, tp=1, pp=1, cp=1, ep=1, etp=1), NameTable.for_model(hf, with_mtp=False)
    (share,) = stage_shares(table, cut_layers(Cut(8, 1)), grid)
    shapes = replace(
        SHAPES,
        tokens=tokens,
        stream=tokens,
        offloaded=0.0,
        micro_batches=micro_batches,
        padded_vocab=320,
        log_probs_chunk=1024,
    )
    told = dict(bucket_bytes=64 << 20, engine=None, gpu_bytes=80e9, assumed=Assumed(overhead_gb=0, sleeping_engine_gb=0))
    found = stage_memory(share, hf, grid, shapes, **told, turns=Turns(True), resumes=False)
    for phase, peak in zip(("load", "hand-over", "log-probs", "train"), measured, strict=True):
        assert found.phase(phase).total == pytest.approx(peak, rel=0.05), phase
    # Written from main memory: 2 bytes of every weight and 12 of every trained one.
    assert (found.host_optimizer, found.host_checkpoint) == (0, 2 * share.parameters + 12 * share.trained)
    resumed = stage_memory(share, hf, grid, shapes, **told, turns=Turns(True))
    assert resumed.phase("load").total - found.phase("load").total == 8 * share.trained


def test_loading_holds_a_ranks_experts_twice_while_they_move_into_one_buffer() -> None:
    """The mini recipe on two H200s: 31.2 GB of live tensors at most until its checkpoint was loaded, 26.0 after."""
    from tools.make_tiny_checkpoint import PRESETS, glm_config
    from tools.tiny_tokenizer import TokenizerFacts

    hf = HfConfig(glm_config(PRESETS["mini"].size, TokenizerFacts(320, (1,), 1)))
    grid, table = Grid(world=2, tp=2, pp=1, cp=1, ep=2, etp=1), NameTable.for_model(hf, with_mtp=False)
    (share,) = stage_shares(table, cut_layers(Cut(8, 1)), grid)
    told = dict(bucket_bytes=2 << 30, engine=None, gpu_bytes=141e9, assumed=Assumed(overhead_gb=0, sleeping_engine_gb=0))
    found = stage_memory(share, hf, grid, SHAPES, **told, turns=Turns(True), resumes=False)
    assert share.experts == 5 * 16 * 3 * 6144 * 2048
    awake = 2 * share.parameters + 4 * share.trained
    assert found.phase("hand-over").total == awake == pytest.approx(26.0e9, rel=0.04)
    assert found.phase("load").total == awake + 2 * share.experts == pytest.approx(31.2e9, rel=0.01)


def test_kv_cache_bytes() -> None:
    assert kv_bytes_per_token(HF, fp8=True) == 51_168 + 2_772
    assert kv_bytes_per_token(HF, fp8=True, drafts=True) == 51_168 + 2_772 + 788
    assert kv_bytes_per_token(HF, fp8=False) == 89_856 + 2_772
    # SGLang 0.5.17 keeps the indexer's 132 bytes in all 79 layers: (656 + 132) x 79.
    assert kv_bytes_per_token(HF, fp8=True, drafts=True, every_layer=True) == 62_252
    assert kv_bytes_per_token(known_config("/any/Qwen3-4B"), fp8=False) == 36 * 2 * 8 * 128 * 2


def test_weight_sync_bytes() -> None:
    from slime.engine.spec import EngineSpec

    whole = {"moe_a2a_backend": "deepep", "moe_dense_tp_size": 1, "enable_dp_lm_head": True}
    engines = [EngineSpec("default", "decode", i, 64 * i, 64, 8, 64, 1, 64, 64, "m", True, True, 0, whole) for i in range(4)]
    sync = sync_bytes(TABLE, HF, engines, Rates(), gpus_per_node=8)
    assert sync.experts == 75 * 256 * 37_757_952
    assert (round(sync.experts / 1e9, 2), round(sync.rest / 1e9, 2), round(sync.per_gpu / 1e9, 2)) == (724.95, 20.63, 31.96)
    assert round(sync.per_engine / 1e12, 2) == 2.05 and round(sync.all_engines / 1e12, 2) == 8.18
    # The MTP layer's 256 experts over 64 GPUs; its other tensors on each of them.
    assert sync.draft_per_gpu == 4 * 37_757_952 + (10_032_632_960 - 256 * 37_757_952)
    assert round(sync.lower_bound_s, 2) == 0.28 and round(sync.broadcast_s, 1) == 14.9
    assert sync.load_s == pytest.approx(sync.lands_per_gpu / 50e9) and sync.seconds == sync.load_s + 0.45


def test_stock_split_is_61_percent_by_layers_and_less_by_flops() -> None:
    stock, listed = (14, *[8] * 6, 16), (10, 12, 8, 12, 8, 12, 8, 8)
    assert round(78 / (8 * 16), 2) == 0.61 and round(78 / (8 * 12), 2) == 0.81
    work = model_work(TABLE, HF, 65536)
    costs, head = layer_costs(work, recompute=True)
    assert round(balance(stage_costs(stock, costs, head)), 3) == 0.568
    assert round(balance(stage_costs(listed, costs, head)), 3) == 0.823
    best = best_list(HF, 8, costs, head)
    assert best.balance >= balance(stage_costs(listed, costs, head))
    pairs = legal_first_last(HF, 8, costs, head)
    assert (14, 16) in [pair.first_last for pair in pairs] and pairs[0].first_last == (2, 4)
    sent = best_list(HF, 8, costs, head, any_start=True)
    assert sent.sizes == (*[10] * 7, 8) and round(sent.balance, 3) == 0.983


def test_best_list_is_what_trying_every_list_finds() -> None:
    from itertools import combinations

    hf = HfConfig({**dict(HF), "num_hidden_layers": 18})
    work = model_work(NameTable.for_model(hf, with_mtp=False), hf, 65536)
    costs, head = layer_costs(work, recompute=True)
    for stages in (2, 3, 4):
        legal = [layer for layer in range(1, 18) if hf.runs_indexer(layer)]
        tried = []
        for cuts in combinations(legal, stages - 1):
            edges = (0, *cuts, 18)
            sizes = tuple(b - a for a, b in zip(edges, edges[1:], strict=False))
            tried.append(balance(stage_costs(sizes, costs, head)))
        assert best_list(hf, stages, costs, head).balance == pytest.approx(max(tried))


def test_wrong_starts_and_layout_strings() -> None:
    assert [chunk.layers.start + 1 for chunk in cut_layers(STOCK)] == [1, 15, 23, 31, 39, 47, 55, 63]
    assert not wrong_starts(HF, cut_layers(STOCK))
    assert [chunk.layers.start + 1 for chunk in wrong_starts(HF, cut_layers(Cut(78, 6)))] == [14, 40, 53, 66]
    text = layout_string((10, 12, 8, 12, 8, 12, 8, 8))
    assert [len(chunk.layers) for chunk in cut_layers(Cut(78, 8, layout=text))] == [10, 12, 8, 12, 8, 12, 8, 8]
    with pytest.raises(ValueError, match="places 77 layers"):
        cut_layers(Cut(78, 8, layout=layout_string((9, 12, 8, 12, 8, 12, 8, 8))))


def _map(*, limit: int = 2 << 30, mtp: bool = False) -> WeightMap:
    """Of the recipe, to four engines of 64."""
    whole = {"moe_a2a_backend": "deepep", "moe_dense_tp_size": 1, "enable_dp_lm_head": True, "speculative_algorithm": "EAGLE"}
    engines = [EngineSpec("default", "decode", i, 64 * i, 64, 8, 64, 1, 64, 64, "m", True, True, 0, whole) for i in range(4)]
    trainer = Trainer(GRID, tuple(cut_layers(STOCK)), mtp=mtp)
    receivers = [Receiver.of(engine, first_gpu=0) for engine in engines]
    plan = plan_sync(TABLE, HF, trainer, receivers, nodes=nodes_of(256, 8), limit_bytes=limit)
    return build_weight_map(TABLE, HF, trainer, engines, plan)


def test_each_tensor_is_sent_once_and_pairs_stay_together() -> None:
    found = _map()
    names = [row.name for row in found.rows]
    assert not found.problems and len(names) == len(set(names)) == 59_585 - 791
    assert found.nbytes == 745_584_507_456 and {row.round for row in found.rows} == set(range(16))
    assert [row.round for row in found.rows] == sorted(row.round for row in found.rows)
    number = {row.name: row.round for row in found.rows}
    for layer in range(78):
        attention = f"model.layers.{layer}.self_attn."
        assert number[f"{attention}q_a_proj.weight"] == number[f"{attention}kv_a_proj_with_mqa.weight"]
    assert {row.block for row in found.rows if row.fp8} == {"shard"}
    assert found.digest != _map(limit=1 << 30).digest
    assert len(found.made_bytes) == 256, "every rank makes something"
    # Experts are made where they are trained, once: those of one rank of the last stage, 16 layers of 8.
    experts = [row for row in found.rows if row.makers == (255,)]
    assert sum(row.nbytes for row in experts) == 16 * 8 * 37_757_952 and {row.stage for row in experts} == {7}


Q_B, O, EXPERT = (
    "model.layers.20.self_attn.q_b_proj.weight",
    "model.layers.20.self_attn.o_proj.weight",
    "model.layers.20.mlp.experts.9.up_proj.weight",
)


def _parts(row: Row, *edits: tuple[int, dict]) -> Row:
    parts = list(row.holders.parts)
    for number, values in edits:
        parts[number] = replace(parts[number], **values)
    return replace(row, holders=replace(row.holders, parts=tuple(parts)))


# Layer 20 is on stage 1, ranks 32 to 63; 16,384 rows of q_b and columns of o over TP 4; expert 9 is the second of rank 33.
PLANTED: dict[str, tuple[str, Callable[[Row], list[Row]], str]] = {
    "an orphan": (Q_B, lambda row: [], "is in no row"),
    "sent twice": (EXPERT, lambda row: [row, row], "is sent 2 times"),
    "a stranger": (
        EXPERT,
        lambda row: [row, replace(row, name="model.layers.20.mlp.experts.256.up_proj.weight")],
        "not in the",
    ),
    "away from its partner": (
        "model.layers.20.self_attn.kv_a_proj_with_mqa.weight",
        lambda row: [replace(row, round=row.round + 1)],
        "is not in the round of the tensor that engines fuse it with",
    ),
    "a replica without a part": (
        Q_B,
        lambda row: [_parts(row, (2, {"ranks": tuple(range(34, 62, 4))}))],
        "part 2 is 0 times in replica (1, 7, 0, -1), not 1 times",
    ),
    "a part twice in a replica": (
        O,
        lambda row: [_parts(row, (0, {"ranks": (*range(32, 64, 4), 33)}))],
        "part 0 is 2 times in replica (1, 0, 0, -1), not 1 times",
    ),
    "parts that overlap": (O, lambda row: [_parts(row, (1, {"start": 4000}))], "columns 4000:4096 are held twice"),
    "parts with a gap": (Q_B, lambda row: [_parts(row, (3, {"start": 12300}))], "rows 12288:12300 are held by nobody"),
    "an end that is missing": (Q_B, lambda row: [_parts(row, (3, {"stop": 16380}))], "rows 16380:16384 are held by nobody"),
    "an expert on another shard": (
        EXPERT,
        lambda row: [_parts(row, (0, {"ranks": (34,)}))],
        "part 0 is 0 times in replica (1, 1, 0, 0), not 1 times",
    ),
    "an expert on another stage": (EXPERT, lambda row: [_parts(row, (0, {"ranks": (65,)}))], "replica (1, 1, 0, 0), not 1"),
    "a maker without it": (EXPERT, lambda row: [replace(row, makers=(33, 34))], "rank 34 makes it and does not hold"),
    "a part that nobody makes": (Q_B, lambda row: [replace(row, makers=(32, 33, 35))], "no rank that holds part 2 makes it"),
}


def test_a_planted_fault_of_the_weight_map_is_told_and_no_other() -> None:
    chunks = cut_layers(STOCK)
    rows = _map().rows
    places = Places(TABLE, GRID, chunks, mtp=False, padded_vocab=None)
    at = {row.name: number for number, row in enumerate(rows)}
    for fault, (name, edit, message) in PLANTED.items():
        edited = [*rows[: at[name]], *edit(rows[at[name]]), *rows[at[name] + 1 :]]
        told = problems(TABLE, edited, GRID, places, mtp=False)
        assert told and len(told) <= 2 and all(line.startswith("model.layers.20.") for line in told), (fault, told[:3])
        assert any(message in line for line in told), (fault, told[:3])


def test_a_delivery_that_does_not_reach_everyone_just_once_is_told() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    hf = HfConfig({**sizes, "model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 16})
    trainer = Trainer(Grid(1, 1, 1, 1, 1, 1), tuple(cut_layers(Cut(1, 1))))
    plan = plan_sync(NameTable.for_model(hf), hf, trainer, [Receiver(0, (0, 1, 2), 3)], nodes=(0, 1, 1), limit_bytes=2**20)
    [one] = plan.deliveries
    assert list(undelivered(plan, one)) == [] and [leg.hop for leg in one.legs] == [0, 1]
    entered, fanned = one.legs
    told = {
        "reaches GPU 2 0 times": replace(one, legs=(entered,)),
        "reaches GPU 2 2 times": replace(one, legs=(entered, fanned, fanned)),
        "leaves GPU 1 in hop 0 before it is there": replace(one, legs=(entered, fanned._replace(hop=0))),
        "is made on ranks that do not hold it": replace(one, makers=(1,), legs=(entered._replace(source=1, target=0), fanned)),
    }
    for words, wrong in told.items():
        assert any(words in line for line in undelivered(plan, wrong)), words


def test_rank_sets_are_written_as_ranges() -> None:
    assert ranges([]) == "" and ranges([5]) == "5" and ranges(range(4)) == "0-3" and ranges([0, 1, 2, 3, 7]) == "0-3,7"
    assert ranges([*range(1, 32, 4), *range(225, 256, 4)]) == "1-29/4,225-253/4" and ranges([3, 8]) == "3,8"


def test_engines_keep_what_sglang_gives_their_ranks() -> None:
    """8 ranks in 2 attention replicas: a quarter of the heads each; 4 shards of the 64 of 256 experts, halves of each."""
    from slime.engine.spec import EngineSpec

    engine = EngineSpec("default", "regular", 3, 0, 8, 1, 8, 1, 2, 4, "m", True, True, 0)
    whole = replace(engine, engine_id=4, settings={"moe_a2a_backend": "deepep", "moe_dense_tp_size": "1"})
    whole = replace(whole, settings={**whole.settings, "enable_dp_lm_head": True})
    keepers = Keepers([engine, whole], 256)

    def kept(name: str, tensor: int = 0) -> str:
        return keepers.text(TABLE[name], TABLE[name].hf[tensor])

    layer = "decoder.layers.3."
    assert kept(f"{layer}mlp.experts.linear_fc1.weight64") == "3-4:1/2@2-3"
    assert kept(f"{layer}self_attention.linear_proj.weight") == kept("embedding.word_embeddings.weight") == "3-4:1/4@0-7"
    assert kept(f"{layer}mlp.router.weight") == "3-4:all@0-7"
    assert kept(f"{layer}mlp.shared_experts.linear_fc2.weight") == "3:1/8@0-7;4:all@0-7"
    assert kept("decoder.layers.0.mlp.linear_fc2.weight") == "3:1/8@0-7;4:all@0-7"
    assert kept("output_layer.weight") == "3:1/8@0-7;4:1/4@0-7"
    qwen = NameTable.for_model(known_config("/any/Qwen3-4B"))["decoder.layers.0.self_attention.linear_qkv.weight"]
    sixteen = Keepers([EngineSpec("default", "regular", 0, 0, 16, 2, 16, 1, 1, 1, "m", True, True, 0)], 0)
    assert [sixteen.text(qwen, tensor) for tensor in qwen.hf] == ["0:1/16@0-15", "0:1/8@0-15", "0:1/8@0-15"]


def test_a_trained_mtp_layer_is_counted_on_the_last_stage_and_travels() -> None:
    from slime.engine.spec import EngineSpec

    chunks = cut_layers(STOCK)
    plain, trained = stage_shares(TABLE, chunks, GRID), stage_shares(TABLE, chunks, GRID, mtp=True)
    assert trained[:7] == plain[:7] and trained[7].layers == plain[7].layers
    # By hand, of 32 expert and 4 tensor-parallel ranks: 8 experts; a quarter of the shared expert, of the heads' projections
    # (q up, kv up, o) and of the embedding's copy; whole: router, latent projections, indexer, norms, eh_proj.
    cut = 37_748_736 + 2048 * 64 * 256 + 512 * 64 * (192 + 256) + 64 * 256 * 6144 + 154880 * 6144
    indexer = 2048 * 32 * 128 + 6144 * 128 + 2 * 128 + 6144 * 32
    whole = 256 * 6144 + 6144 * (2048 + 576) + indexer + (2 * 6144 + 2048 + 512) + 3 * 6144 + 2 * 6144 * 6144
    assert trained[7].experts - plain[7].experts == 8 * 37_748_736
    assert trained[7].dense - plain[7].dense == cut // 4 + whole and trained[7].frozen - plain[7].frozen == indexer
    assert trained[7].computing == plain[7].computing + 1 and trained[7].stored_inputs == plain[7].stored_inputs + 2
    alone = Grid(world=1, tp=1, pp=1, cp=1, ep=1, etp=1)
    assert stage_shares(TABLE, cut_layers(Cut(78, 1)), alone, mtp=True)[0].parameters == 753_329_921_024
    found = _map(mtp=True)
    assert not found.problems and len({row.name for row in found.rows}) == len(found.rows) == 59_585
    assert found.nbytes == checkpoint_bytes(TABLE, fp8=True) == 755_617_140_416
    mtp = [row for row in found.rows if row.name.startswith("model.layers.78.")]
    assert len(mtp) == 791 and {row.stage for row in mtp} == {7} and {rank // 32 for row in mtp for rank in row.makers} == {7}
    engines = [EngineSpec("default", "decode", 0, 0, 64, 8, 64, 1, 64, 64, "m", True, True, 0)]
    before, sync = (sync_bytes(TABLE, HF, engines, Rates(), gpus_per_node=8, mtp=mtp) for mtp in (False, True))
    assert sync.experts == 76 * 256 * 37_757_952 and sync.experts + sync.rest == found.nbytes
    assert sync.per_gpu == before.per_gpu and sync.lands_per_gpu == before.per_gpu + before.draft_per_gpu


def test_a_trained_mtp_layer_costs_one_more_layer_and_one_more_output_layer() -> None:
    plain, trained = (model_work(TABLE, HF, 65536, mtp=mtp) for mtp in (False, True))
    assert trained.forward == plain.forward, "log-probabilities are computed without it"
    # eh_proj, attention, indexer, router, eight routed experts and the shared one; no norms.
    weights = 2 * 6144 * 6144 + 165_019_648 + 9_371_648 + 256 * 6144 + 9 * 37_748_736
    forward, backward = core(HF, 65536)
    scores = 2 * 32 * 128 * 65536 / 2
    once = 3 * 2 * weights + forward + backward + scores + 3 * 2 * 154880 * 6144
    assert trained.training(recompute=False) - plain.training(recompute=False) == pytest.approx(once)
    again = once + 2 * weights + forward + scores
    assert trained.training(recompute=True) - plain.training(recompute=True) == pytest.approx(again)
    assert trained.tail(recompute=True) - plain.tail(recompute=True) == pytest.approx(again), "all of it on the last stage"


def test_a_trainer_with_gpus_of_its_own_keeps_everything_during_a_sync() -> None:
    share = stage_shares(TABLE, cut_layers(STOCK), GRID)[3]
    told = {"bucket_bytes": 2 << 30, "engine": EngineRank("decode", 32 << 30, 1, 0.7), "gpu_bytes": 80e9, "assumed": Assumed()}
    apart, shared = (stage_memory(share, HF, GRID, SHAPES, **told, turns=Turns(shares)) for shares in (False, True))
    buckets = 3 * (2 << 30)
    assert apart.phase("weight sync").total == apart.phase("hand-over").total + buckets
    weights, gradients = 2 * 2_949_632_512, 4 * (2_949_632_512 - 2 * 9_371_904)
    assert apart.phase("weight sync").total == weights + gradients + 6 * 10**9 + buckets
    assert shared.phase("weight sync").total == weights + 6 * 10**9 + buckets + (32 << 30)


def test_measured_peaks_stand_beside_predictions(tmp_path: Path) -> None:
    from slime.rehearse.model.memory import Phase, StageMemory

    share = stage_shares(TABLE, cut_layers(STOCK), GRID)[0]
    phases = (Phase("load", {"weights": 700, "overhead": 80}), Phase("train", {"weights": 900, "rest": 70, "overhead": 80}))
    predicted = [StageMemory(share, phases, 0)]

    def row(rank: int, **peaks: int) -> dict:
        sizes = {name: {"tensors": count, "reserved": 2 * count} for name, count in peaks.items()}
        return {"rank": rank, "stage": 0, "device": "host", "micro_batch_tokens": 90 + rank, "micro_batches": 3, "peaks": sizes}

    file = tmp_path / "memory.json"
    file.write_text(json.dumps({"ranks": [row(0, train=900, load=800), row(1, train=1000)]}))
    measured = read_measured(str(file))
    assert measured == Measured("host", 2, 1, 91, 3, {(0, "train"): 1000, (0, "load"): 800}, slack=1000)
    load, train = compare(measured, predicted)
    assert (load.error, train.error) == (pytest.approx(-0.025), pytest.approx(0.05))
    # The allocator of a GPU does not see contexts and libraries.
    assert compare(replace(measured, device="cuda"), predicted)[1].error == pytest.approx(-0.03)
    assert compare(replace(measured, device="cuda", peaks={(0, "start"): 512, (0, "train"): 900}), predicted)[1:] == []
    with pytest.raises(ValueError, match="not predicted"):
        compare(replace(measured, peaks={(0, "rollout"): 1}), predicted)
    file.write_text("{}")
    with pytest.raises(ValueError, match="is not a run's memory.json"):
        read_measured(str(file))
    with pytest.raises(ValueError, match="cannot be read .No such file"):
        read_measured(str(tmp_path / "none.json"))
