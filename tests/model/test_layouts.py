"""Every parallel layout is the same model: log-probabilities, index selections, every gradient and the grad norm of one
step."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from model.parity import StepResult, build, run_step, samples_of, whole_grads, worst_difference
from model.reference import make_reference
from ranks import run_ranks

from slime.model.hf_config import read_hf_config
from slime_plugins.models.glm5.balance import deal_rows

# Lengths several times and below index_topk (16); one sample longer than half the stream, one shorter than CP.
LENGTHS = ((70, 33, 1, 90), (3, 150, 20))

GLM_LAYOUTS = [
    (2, {"tp": 2}),
    (2, {"pp": 2, "first": 2}),
    (2, {"ep": 2}),
    (2, {"cp": 2}),
    (1, {"recompute": True}),
    (2, {"pp": 2, "first": 6, "recompute": True}),
    (4, {"tp": 2, "pp": 2, "first": 6, "ep": 2}),
    (4, {"tp": 2, "cp": 2, "ep": 2}),
    (4, {"cp": 4, "ep": 2}),
    (4, {"ep": 4, "tp": 2}),
    (2, {"tp": 2, "axis": "heads"}),
    (4, {"tp": 4, "recompute": True}),
    (8, {"tp": 2, "pp": 2, "cp": 2, "first": 6}),
]
# move_cost 0: the indexer scores rows on other ranks wherever that evens them; the default moves none of so short samples.
DEALT_LAYOUTS = [
    (4, {"cp": 4, "move_cost": 0}),
    (4, {"tp": 2, "cp": 2, "move_cost": 0, "recompute": True}),
    (2, {"tp": 2, "axis": "heads", "move_cost": 0}),
]
# The tiny model computes indices on layers 1, 2, 3 and 7: these cuts begin stages on shared layers 4, 5 and 6, some of them
# behind a stage that computes none itself.
SENDING_LAYOUTS = [
    (2, {"pp": 2}),
    (4, {"pp": 4, "layers": (3, 1, 1, 3), "recompute": True}),
    (2, {"pp": 2, "vpp": 2, "recompute": True}),
    (2, {"pp": 2, "layers": (3, 1, 1, 3)}),
    (8, {"tp": 2, "pp": 2, "cp": 2, "layers": (5, 3)}),
]
DENSE_LAYOUTS = [
    (2, {"tp": 2}),
    (2, {"pp": 2, "first": 1}),
    (2, {"pp": 2, "vpp": 2}),
    (4, {"tp": 2, "pp": 2, "vpp": 2}),
    (2, {"cp": 2}),
    (2, {"cp": 2, "zigzag": True}),
    (4, {"tp": 2, "cp": 2, "zigzag": True}),
]


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


_REFERENCES: dict[str, tuple[list, StepResult]] = {}


def _reference(folder: str) -> tuple[list, StepResult]:
    """The one-rank result, once per checkpoint."""
    if folder not in _REFERENCES:
        vocab = read_hf_config(folder)["vocab_size"]
        micro_batches = [samples_of(20 + number, lengths, vocab) for number, lengths in enumerate((*LENGTHS, *LENGTHS))]
        (result,) = run_ranks(1, lambda rank: run_step(rank, 1, folder, micro_batches))
        _REFERENCES[folder] = (micro_batches, result)
    return _REFERENCES[folder]


def _check(folder: str, world: int, layout: dict, tolerance: float = 2e-5) -> None:
    micro_batches, reference = _reference(folder)
    hf = read_hf_config(folder)
    results = run_ranks(world, lambda rank: run_step(rank, world, folder, micro_batches, **layout))
    if hf.has_indexer:
        _same_selection(reference, results, world // (layout.get("tp", 1) * layout.get("pp", 1) * layout.get("cp", 1)), layout)
    worst, name = worst_difference(whole_grads(hf, [reference]), whole_grads(hf, results))
    assert worst < tolerance, f"{name}: {worst:.2e}"
    norm, expected = sum(result.norm_share for result in results) ** 0.5, reference.norm_share**0.5
    assert abs(norm / expected - 1) < 1e-7
    last = [result for result in results if result.log_probs]
    dp = len(micro_batches) // len(last[0].log_probs)
    for result in last:
        number = next(d for d in range(dp) if _close(result.log_probs[0], reference.log_probs[d]))
        for found, wanted in zip(result.log_probs, reference.log_probs[number::dp], strict=True):
            assert (found - wanted).abs().max().item() < 1e-5


def _close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and torch.allclose(left, right, atol=1e-4)


def _same_selection(reference: StepResult, results: list[StepResult], dp: int, layout: dict) -> None:
    """Exactly equal indices. Chosen seeds: a near-tie of scores may legitimately flip a selection and make everything after it
    differ."""
    cp, tp, pp = (layout.get(axis, 1) for axis in ("cp", "tp", "pp"))
    for rank, result in enumerate(results):
        by_heads = layout.get("axis") == "heads"
        place, shares = (rank // tp % cp, cp) if by_heads else (rank % (tp * cp), tp * cp)
        dp_rank = rank // (tp * cp) % dp
        assert result.indices or pp > 1
        for (number, layer), found in result.indices.items():
            wanted = reference.indices[(number * dp + dp_rank, layer)]
            share = wanted[place * len(found) :][: len(found)]
            assert 0 <= len(found) * shares - len(wanted) < shares * tp  # each row has one holder
            rows = len(share)  # what follows is padding, which the one-rank run has not
            assert torch.equal(found[:rows], share), f"layer {layer} on rank {rank}"


@pytest.mark.slow
@pytest.mark.parametrize(("world", "layout"), GLM_LAYOUTS, ids=[str(layout) for _, layout in GLM_LAYOUTS])
def test_glm_is_the_same_model_under(world: int, layout: dict, glm: str) -> None:
    _check(glm, world, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "layout"), DEALT_LAYOUTS, ids=[str(layout) for _, layout in DEALT_LAYOUTS])
def test_rows_scored_by_other_ranks_get_the_same_selection(world: int, layout: dict, glm: str) -> None:
    for lengths in LENGTHS:
        total = sum(lengths) + -sum(lengths) % world
        assert deal_rows([0, *accumulate(lengths), *([total] if total > sum(lengths) else [])], world, move_cost=0)
    _check(glm, world, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "layout"), SENDING_LAYOUTS, ids=[str(layout) for _, layout in SENDING_LAYOUTS])
def test_indices_travel_to_stages_that_begin_on_shared_layers(world: int, layout: dict, glm: str) -> None:
    _check(glm, world, {**layout, "send_indices": True})


@pytest.mark.slow
def test_listed_layers_per_stage_are_where_the_list_says(glm: str) -> None:
    _check(glm, 4, {"pp": 4, "layers": (1, 1, 4, 2)})

    def built(rank: int) -> list[int]:
        (chunk,), *_ = build(rank, 4, glm, pp=4, layers=(1, 1, 4, 2))
        return [layer.layer_number for layer in chunk.decoder.layers]

    assert run_ranks(4, built) == [[1], [2], [3, 4, 5, 6], [7, 8]]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "layout"), DENSE_LAYOUTS, ids=[str(layout) for _, layout in DENSE_LAYOUTS])
def test_a_tied_dense_model_is_the_same_under(world: int, layout: dict, qwen: str) -> None:
    _check(qwen, world, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "layout"), [(2, {"tp": 2, "ep": 2}), (2, {"cp": 2, "zigzag": True})], ids=str)
def test_dense_latent_attention_is_the_same_under(world: int, layout: dict, deepseek: str) -> None:
    _check(deepseek, world, layout)


def test_experts_split_over_ranks_start_different(glm: str) -> None:
    """megatron-core's own initialisation gave all expert-parallel ranks the same experts; ours come from the files."""
    micro_batches = [samples_of(1, (20,), 320)] * 2
    first, second = run_ranks(2, lambda rank: run_step(rank, 2, glm, micro_batches, ep=2))
    names = [{name for name in result.grads if ".experts." in name} for result in (first, second)]
    assert not names[0] & names[1] and len(names[0]) == len(names[1]) == 5 * 4 * 2


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path) -> None:
    torch.set_num_threads(1)
