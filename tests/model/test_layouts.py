"""Every parallel layout is the same model: log-probabilities, index selections, every gradient and the grad norm of one step.

Float32 throughout; each layout is compared with one rank and with `transformers`, which knows no packing and no layout. A
gradient may differ by TOLERANCE of the largest entry of its tensor, a log-probability by 1e-5, the grad norm by 1e-7 of itself,
and an index selection by nothing.

The layouts of one world size run one after the other on one set of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from model.parity import StepResult, build, run_layouts, run_step, samples_of, whole_grads, worst_difference
from model.reference import load_reference, make_reference, reference_step
from model.replay import Choices
from ranks import RankFailed, run_ranks

from slime.model.hf_config import HfConfig, read_hf_config
from slime.model.layout import merge
from slime.model.names import NameTable
from slime_plugins.models.glm5.balance import deal_rows

# index_topk (16) is below some samples and above others; one sample is shorter than every CP, one longer than half its stream.
LENGTHS = ((70, 33, 1, 90), (3, 150, 20))
TOLERANCE = 2e-5
BF16_GRADIENT, BF16_LOG_PROB = 0.05, 0.1

# Eight layers, of which 1, 2, 3 and 7 compute indices: stages start there, or on shared layers where indices are sent along,
# some behind a stage that computes none itself.
FOUR_STAGES = "Et|t|tttt|ttL"
# move_cost 0: the indexer scores rows on other ranks wherever that evens them; the default moves none of so short samples.
GLM_LAYOUTS: dict[int, dict[str, dict]] = {
    1: {"recompute": {"recompute": True}},
    2: {
        "DP2": {},
        "TP2": {"tp": 2},
        "TP2, the core split by heads": {"tp": 2, "axis": "heads"},
        "TP2, the core split by heads, rows dealt": {"tp": 2, "axis": "heads", "move_cost": 0},
        "PP2, 2 + 6 layers": {"pp": 2, "first": 2},
        "PP2, 6 + 2 layers, recompute": {"pp": 2, "first": 6, "recompute": True},
        "PP2, stage 1 begins on a shared layer": {"pp": 2, "send_indices": True},
        "PP2 VPP2, shared layers begin stages, recompute": {"pp": 2, "vpp": 2, "send_indices": True, "recompute": True},
        "PP2 VPP2 by a list": {"pp": 2, "layers": (3, 1, 1, 3), "send_indices": True},
        "PP2 VPP2, 1 + 1 + 4 + 2 layers": {"pp": 2, "vpp": 2, "stages": FOUR_STAGES},
        "CP2": {"cp": 2},
        "EP2": {"ep": 2},
        "CP2 EP2": {"cp": 2, "ep": 2},
        "TP2, experts too": {"tp": 2, "etp": 2},
    },
    4: {
        "TP4, recompute": {"tp": 4, "recompute": True},
        "PP4 by a list": {"pp": 4, "layers": (1, 1, 4, 2)},
        "PP4, indices pass a stage": {"pp": 4, "layers": (3, 1, 1, 3), "send_indices": True, "recompute": True},
        "PP4, 1 + 1 + 4 + 2 layers": {"pp": 4, "stages": FOUR_STAGES},
        "CP4": {"cp": 4},
        "CP4, rows dealt": {"cp": 4, "move_cost": 0},
        "TP2 CP2, rows dealt, recompute": {"tp": 2, "cp": 2, "move_cost": 0, "recompute": True},
        "EP4": {"ep": 4},
        "TP2 PP2 EP2": {"tp": 2, "pp": 2, "first": 6, "ep": 2},
        "TP2 CP2": {"tp": 2, "cp": 2},
        "TP2 CP2 EP4": {"tp": 2, "cp": 2, "ep": 4},
        "CP4 EP2": {"cp": 4, "ep": 2},
        "TP2 EP4, DP2": {"tp": 2, "ep": 4},
        "TP2 CP2 EP2, experts TP2": {"tp": 2, "cp": 2, "ep": 2, "etp": 2},
    },
    8: {
        "TP2 PP2 CP2, indices sent": {"tp": 2, "pp": 2, "cp": 2, "layers": (5, 3), "send_indices": True},
        "TP2 PP2 CP2": {"tp": 2, "pp": 2, "cp": 2, "first": 6},
        "TP2 PP2 CP2 EP4, recompute": {"tp": 2, "pp": 2, "cp": 2, "ep": 4, "first": 2, "recompute": True},
        "CP8 EP8": {"cp": 8, "ep": 8},
    },
}
DENSE_LAYOUTS: dict[int, dict[str, dict]] = {
    2: {
        "DP2": {},
        "TP2": {"tp": 2},
        "PP2, 1 + 3 layers": {"pp": 2, "first": 1},
        "PP2 VPP2": {"pp": 2, "vpp": 2},
        "CP2": {"cp": 2},
        "CP2 zigzag": {"cp": 2, "zigzag": True},
    },
    4: {
        "PP4": {"pp": 4},
        "TP2 PP2 VPP2": {"tp": 2, "pp": 2, "vpp": 2},
        "TP2 CP2 zigzag": {"tp": 2, "cp": 2, "zigzag": True},
        "CP4 zigzag": {"cp": 4, "zigzag": True},
    },
}
LATENT_LAYOUTS: dict[int, dict[str, dict]] = {
    2: {"TP2 EP2": {"tp": 2, "ep": 2}, "CP2 zigzag": {"cp": 2, "zigzag": True}},
}


@dataclass(frozen=True)
class Expected:
    """What one rank of ours and what transformers say about the same micro-batches of one checkpoint."""

    hf: HfConfig
    micro_batches: list[list[torch.Tensor]]
    ours: StepResult
    our_grads: dict[str, torch.Tensor]
    log_probs: list[torch.Tensor]
    grads: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("qwen")
    make_reference("qwen3-tied", folder)
    return str(folder)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("deepseek")
    make_reference("deepseek_v3", folder)
    return str(folder)


_EXPECTED: dict[str, Expected] = {}
_RESULTS: dict[tuple[str, int], list[dict[str, StepResult]]] = {}


def _expected(folder: str) -> Expected:
    """Once per checkpoint."""
    if folder not in _EXPECTED:
        hf = read_hf_config(folder)
        micro_batches = [samples_of(20 + n, lengths, hf["vocab_size"]) for n, lengths in enumerate((*LENGTHS, *LENGTHS))]
        (ours,) = run_ranks(1, lambda rank: run_step(rank, 1, folder, micro_batches))
        log_probs, theirs = reference_step(load_reference(folder), micro_batches)
        table, our_grads = NameTable.for_model(hf), whole_grads(hf, [ours])
        grads = {name: merge(table[name], [theirs[tensor.name] for tensor in table[name].hf]) for name in our_grads}
        _EXPECTED[folder] = Expected(hf, micro_batches, ours, our_grads, log_probs, grads)
    return _EXPECTED[folder]


def _results(folder: str, world: int, layouts: dict[str, dict]) -> list[dict[str, StepResult]]:
    """Of every rank, under every layout of this world size; computed once."""
    if (folder, world) not in _RESULTS:
        micro_batches = _expected(folder).micro_batches
        _RESULTS[folder, world] = run_ranks(
            world, lambda rank: run_layouts(rank, world, folder, micro_batches, layouts), timeout=600
        )
    return _RESULTS[folder, world]


def _check(folder: str, world: int, name: str, layouts: dict[int, dict[str, dict]]) -> None:
    expected = _expected(folder)
    results = [result[name] for result in _results(folder, world, layouts[world])]
    found = whole_grads(expected.hf, results)
    for what, grads in (("one rank", expected.our_grads), ("transformers", expected.grads)):
        worst, parameter = worst_difference(grads, found)
        assert worst < TOLERANCE, f"gradient of {parameter}: {worst:.2e} of its largest entry from that of {what}"
    norm, wanted = sum(result.norm_share for result in results) ** 0.5, expected.ours.norm_share**0.5
    assert abs(norm / wanted - 1) < 1e-7
    seen: set[int] = set()
    for result in results:
        for number, log_probs in zip(result.numbers, result.log_probs, strict=bool(result.log_probs)):
            seen.add(number)
            assert (log_probs - expected.ours.log_probs[number]).abs().max() < 1e-5
            assert (log_probs - expected.log_probs[number]).abs().max() < 1e-5
    assert seen == set(range(len(expected.micro_batches))), "every micro-batch was somewhere"
    if expected.hf.has_indexer:
        _same_selection(expected.ours, results)


def _same_selection(reference: StepResult, results: list[StepResult]) -> None:
    """Exactly equal indices, every row of every computing layer. The seeds are chosen: a near-tie of scores may legitimately
    flip a selection, which changes everything after it."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    for rank, result in enumerate(results):
        for key, (rows, picked) in result.indices.items():
            wanted = reference.indices[key][1]
            own = rows >= 0  # what follows is padding, which the one-rank run has not
            assert torch.equal(picked[own], wanted[rows[own]]), f"micro-batch, layer {key} on rank {rank}"
            found.setdefault(key, torch.zeros(len(wanted), dtype=torch.bool))[rows[own]] = True
    assert set(found) == set(reference.indices) and all(rows.all() for rows in found.values())


def _cases(layouts: dict[int, dict[str, dict]]) -> list:
    return [pytest.param(world, name, id=f"{world} ranks: {name}") for world in layouts for name in layouts[world]]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "name"), _cases(GLM_LAYOUTS))
def test_glm_is_the_same_model_under(world: int, name: str, glm: str) -> None:
    _check(glm, world, name, GLM_LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "name"), _cases(DENSE_LAYOUTS))
def test_a_tied_dense_model_is_the_same_under(world: int, name: str, qwen: str) -> None:
    _check(qwen, world, name, DENSE_LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "name"), _cases(LATENT_LAYOUTS))
def test_dense_latent_attention_is_the_same_under(world: int, name: str, deepseek: str) -> None:
    _check(deepseek, world, name, LATENT_LAYOUTS)


RECOMPUTATIONS = {
    "uniform 1": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "uniform 4": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 4},
    "block 5": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 5},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["moe", "mlp", "core_attn"]},
    "shared experts": {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "shared_experts"]},
}


@pytest.mark.slow
def test_recomputation_changes_no_bit_or_but_rounding(glm: str) -> None:
    expected = _expected(glm)
    layouts = {name: {"recompute": values} for name, values in RECOMPUTATIONS.items()}
    (results,) = run_ranks(1, run_layouts, 1, glm, expected.micro_batches, layouts)
    for name, result in results.items():
        assert all(torch.equal(x, y) for x, y in zip(result.log_probs, expected.ours.log_probs, strict=True)), name
        if RECOMPUTATIONS[name]["recompute_granularity"] == "full":
            different = [n for n, (grad, _) in result.grads.items() if not torch.equal(grad, expected.ours.grads[n][0])]
            assert not different, (name, different[:5])
        # Inside a layer, sums of gradients meet in another order.
        worst, parameter = worst_difference(expected.our_grads, whole_grads(expected.hf, [result]))
        assert worst < TOLERANCE, (name, parameter, worst)


def test_strides_that_do_not_fit_are_refused(glm: str) -> None:
    three = {**RECOMPUTATIONS["uniform 4"], "recompute_num_layers": 3}
    with pytest.raises(RankFailed, match="--recompute-num-layers 3: this pipeline stage has 8 layers, no multiple of it"):
        run_ranks(1, lambda rank: build(rank, 1, glm, recompute=three) and None)


BF16_LAYOUTS = {
    1: {"one rank": {}},
    2: {"TP2": {"tp": 2}, "PP2, 6 + 2 layers": {"pp": 2, "first": 6}, "CP2": {"cp": 2}, "EP2": {"ep": 2}},
    4: {"TP2 CP2 EP4": {"tp": 2, "cp": 2, "ep": 4}},
}


@pytest.mark.slow
def test_in_bf16_every_layout_is_as_far_from_float32_as_one_rank(glm: str) -> None:
    """Key selections and expert choices are those of the float32 run on one rank, replayed: a flipped near-tie would be an
    error of another kind than rounding.

    Distance: norm of the difference over the norm, per parameter, of gradients; largest difference of log-probabilities. bf16
    has 8 bits (0.4%), and the embedding's gradient has been through 8 layers forward and backward.
    """
    hf, (lengths, *_) = read_hf_config(glm), LENGTHS
    micro_batches = [samples_of(20 + n, lengths, hf["vocab_size"]) for n in range(2)]

    def exact(rank: int) -> tuple[StepResult, Choices]:
        choices = Choices()
        result = run_step(rank, 1, glm, micro_batches, choices)
        return result, Choices({key: picked for key, (_, picked) in result.indices.items()}, choices.experts, replays=True)

    ((float32, choices),) = run_ranks(1, exact)
    wanted, distances = whole_grads(hf, [float32]), {}
    for world, layouts in BF16_LAYOUTS.items():
        rounded = {name: {**layout, "dtype": "bf16", "choices": choices} for name, layout in layouts.items()}
        results = run_ranks(world, run_layouts, world, glm, micro_batches, rounded)
        for name in layouts:
            found = whole_grads(hf, [result[name] for result in results])
            gradients = max(((found[n] - wanted[n]).norm() / wanted[n].norm()).item() for n in wanted)
            log_probs = max(
                (found - float32.log_probs[number]).abs().max().item()
                for result in results
                for number, found in zip(result[name].numbers, result[name].log_probs, strict=False)
            )
            distances[name] = (gradients, log_probs)
    alone = distances.pop("one rank")
    assert alone[0] < BF16_GRADIENT and alone[1] < BF16_LOG_PROB, alone
    for name, (gradients, log_probs) in distances.items():
        assert gradients < 1.5 * alone[0] and log_probs < 1.5 * alone[1], (name, gradients, log_probs, alone)


@pytest.mark.slow
def test_scored_in_fp8_every_layout_selects_what_one_rank_selects(glm: str) -> None:
    micro_batches = [samples_of(20 + n, LENGTHS[0], read_hf_config(glm)["vocab_size"]) for n in range(2)]
    layouts = {"float32": {}, "fp8": {"scoring": "fp8"}}
    (alone,) = run_ranks(1, run_layouts, 1, glm, micro_batches, layouts)
    split = {"fp8": {"scoring": "fp8", "tp": 2, "cp": 2, "move_cost": 0}}
    results = [result["fp8"] for result in run_ranks(4, run_layouts, 4, glm, micro_batches, split)]
    _same_selection(alone["fp8"], results)
    for result in results:
        for number, log_probs in zip(result.numbers, result.log_probs, strict=True):
            assert (log_probs - alone["fp8"].log_probs[number]).abs().max() < 1e-5
    # Rounding changes few of the keys, and not none.
    rows = [(picked == alone["float32"].indices[key][1]).all(dim=1) for key, (_, picked) in alone["fp8"].indices.items()]
    same = torch.cat(rows).float().mean().item()
    assert 0.3 < same < 1.0, same


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_of_these_samples_are_dealt_where_moving_is_free(lengths: tuple[int, ...], ranks: int) -> None:
    total = sum(lengths) + -sum(lengths) % ranks
    assert deal_rows([0, *accumulate(lengths), *([total] if total > sum(lengths) else [])], ranks, move_cost=0)


@pytest.mark.slow
def test_listed_layers_per_stage_are_where_the_list_says(glm: str) -> None:
    def held(rank: int) -> list[int]:
        (chunk,), *_ = build(rank, 4, glm, pp=4, layers=(1, 1, 4, 2))
        return [layer.layer_number for layer in chunk.decoder.layers]

    assert run_ranks(4, held) == [[1], [2], [3, 4, 5, 6], [7, 8]]


def test_experts_split_over_ranks_start_different(glm: str) -> None:
    """megatron-core's own initialisation gave all expert-parallel ranks the same experts; ours come from the files."""
    micro_batches = [samples_of(1, (20,), 320)] * 2
    first, second = run_ranks(2, lambda rank: run_step(rank, 2, glm, micro_batches, ep=2))
    names = [{name for name in result.grads if ".experts." in name} for result in (first, second)]
    assert not names[0] & names[1] and len(names[0]) == len(names[1]) == 5 * 4 * 2


@pytest.fixture(autouse=True)
def _quiet() -> None:
    torch.set_num_threads(1)
