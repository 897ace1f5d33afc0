"""A checkpoint of one layout is the same training state under any other: every parameter, fp32 main parameter, moment, step.

The states are read from the live trainers, rank by rank, and put together by global name with the weight table: no
checkpoint code takes part in the comparison.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from ranks import run_ranks
from tiny import config_for, plans, rollout, start

from slime.model.build import trained_table
from slime.model.hf_config import read_hf_config
from slime.model.layout import unshard
from slime.model.local import local_tensors, split_of
from slime.model.names import NameTable
from slime.training.optimizer import parts_of

pytestmark = pytest.mark.slow

KINDS = ("weight", "param", "exp_avg", "exp_avg_sq", "step")
Pieces = dict[tuple[str, str], tuple[torch.Tensor, int, int]]
"""(kind, global name) -> (this rank's tensor, NaN where another data-parallel rank owns it; position, size of the split)."""

LAYOUTS = {
    "one rank": (1, {}),
    "2x2x2": (8, dict(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2,
                      decoder_first_pipeline_num_layers=6, expert_model_parallel_size=2, expert_tensor_parallel_size=1)),
    "1x4x1": (4, dict(pipeline_model_parallel_size=4, decoder_first_pipeline_num_layers=2,
                      decoder_last_pipeline_num_layers=2)),
    "4x1x4": (4, dict(tensor_model_parallel_size=4, sequence_parallel=True, expert_model_parallel_size=4,
                      expert_tensor_parallel_size=1)),
    "PP2 VPP2": (2, dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
}  # fmt: skip


def pieces(trainer) -> Pieces:
    """Everything of this rank that a checkpoint must keep."""
    found: Pieces = {}
    table = trained_table(trainer.config.model, read_hf_config(trainer.config.checkpoint.hf_checkpoint))

    def note(kind: str, of) -> None:
        for local in local_tensors(trainer.model, trainer.ranks, of=of):
            if kind == "weight" or local.parameter is not None and local.parameter.requires_grad:
                entry = table[local.name]
                found[kind, entry.name] = (local.tensor.detach().float().clone(), *split_of(entry, trainer.ranks))

    note("weight", lambda parameter: parameter.data)
    for kind in KINDS[1:]:
        note(kind, lambda parameter, kind=kind: _own_range(trainer, parameter, kind))
    return found


def _own_range(trainer, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
    whole = torch.full((parameter.numel(),), torch.nan)
    for part in parts_of(trainer.optimizer):
        if parameter in getattr(part, "model_param_gbuf_map", {}):
            place = part._get_model_param_range_map(parameter)["param"]
            whole[place.start : place.end] = part._get_main_param_and_optimizer_states(parameter)[kind].float()
    return whole.view(parameter.shape)


def wholes(folder: Path, ranks: list[Pieces]) -> dict[tuple[str, str], torch.Tensor]:
    """The same, whole: replicas must agree, and nothing may be missing."""
    table = NameTable.for_model(read_hf_config(folder))
    shards: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for found in ranks:
        for key, (tensor, position, size) in found.items():
            known = shards.setdefault(key, {}).get(position)
            if known is not None:
                both = ~known.isnan() & ~tensor.isnan()
                assert torch.equal(known[both], tensor[both]), key
                tensor = torch.where(known.isnan(), tensor, known)
            shards[key][position], sizes[key] = tensor, size
    result = {}
    for key, parts in shards.items():
        entry = table[key[1]]
        whole = unshard(entry, [parts[n] for n in range(1 if entry.split == "none" else sizes[key])])
        assert tuple(whole.shape) == entry.shape and not whole.isnan().any(), key
        result[key] = whole
    return result


def train_and_save(rank: int, folder: Path, root: Path, layout: dict) -> Pieces:
    trainer = start(config_for(folder, params_dtype="bf16", save=str(root), **layout))
    batch = rollout(0)
    trainer.train(batch, plans(batch, trainer.config, trainer.ranks.world_size))
    trainer.save(0, data_state=None)
    return pieces(trainer)


def load(rank: int, folder: Path, root: Path, layout: dict, save: Path | None = None) -> Pieces:
    files = dict(load=str(root)) | (dict(save=str(save)) if save else {})
    trainer = start(config_for(folder, params_dtype="bf16", **files, **layout), load=False)
    assert trainer.load().start_rollout_id == 1
    if save:
        trainer.save(0, data_state=None)
    return pieces(trainer)


def expect_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize("layouts", [("PP2 VPP2", "one rank"), ("one rank", "PP2 VPP2")], ids=" to ".join)
def test_virtual_stages_are_no_part_of_a_checkpoint(qwen3, tmp_path, layouts):
    (world, before), (other, after) = (LAYOUTS[name] for name in layouts)
    state = wholes(qwen3, run_ranks(world, train_and_save, qwen3, tmp_path / "run", before))
    expect_equal(state, wholes(qwen3, run_ranks(other, load, qwen3, tmp_path / "run", after)))


MTP = dict(mtp_num_layers=1, enable_mtp_training=True)
TP2_PP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2,
               expert_model_parallel_size=2, expert_tensor_parallel_size=1)  # fmt: skip


def test_the_prediction_layer_and_its_moments_go_along(glm_mtp, tmp_path):
    """The last stage has it, and a copy of the embedding with moments of its own."""
    root = tmp_path / "run"
    state = wholes(glm_mtp, run_ranks(4, train_and_save, glm_mtp, root, MTP | TP2_PP2))
    moved = {name for kind, name in state if kind == "exp_avg_sq" and name.startswith("mtp.") and state[kind, name].any()}
    # eh_proj, 3 norms around it, 2 inside, 7 of attention (5 matrices, 2 norms), router, shared expert of 2, 4 experts of 2
    assert len(moved) == 4 + 2 + 7 + 1 + 2 + 4 * 2
    pp2_vpp2 = MTP | LAYOUTS["PP2 VPP2"][1]
    expect_equal(state, wholes(glm_mtp, run_ranks(2, load, glm_mtp, root, pp2_vpp2, tmp_path / "again")))
    expect_equal(state, wholes(glm_mtp, run_ranks(1, load, glm_mtp, tmp_path / "again", MTP)))


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """Twelve layers, so that four stages can each start on a layer that computes its own indices (1, 3, 7, 11)."""
    return tiny.glm(tmp_path_factory.mktemp("deep"), num_layers=12)


@pytest.fixture(scope="module")
def written(deep, tmp_path_factory) -> tuple[Path, dict]:
    """Saved under TP2 x PP2 x EP2 on eight ranks, after a step."""
    root = tmp_path_factory.mktemp("written") / "run"
    world, layout = LAYOUTS["2x2x2"]
    state = wholes(deep, run_ranks(world, train_and_save, deep, root, layout, timeout=400))
    moved = [key for key in state if key[0] == "exp_avg_sq" and state[key].any()]
    assert len(moved) > 100 and {key[0] for key in state} == set(KINDS)
    assert any(".mlp.experts." in name for _, name in moved)
    assert all((state[key] == 1).all() for key in state if key[0] == "step")
    return root, state


@pytest.mark.parametrize("layout", ["4x1x4", "one rank"])
def test_what_eight_ranks_saved_is_the_same_under_another_layout(deep, written, layout):
    root, state = written
    world, changes = LAYOUTS[layout]
    expect_equal(state, wholes(deep, run_ranks(world, load, deep, root, changes, timeout=400)))


def test_a_first_stage_without_experts_takes_it_and_gives_it_back(deep, written, tmp_path):
    """Rank 0, whose common values are the ones that are written, has two dense layers: no expert parameter counts its steps."""
    root, state = written
    world, changes = LAYOUTS["1x4x1"]
    expect_equal(state, wholes(deep, run_ranks(world, load, deep, root, changes, tmp_path / "again", timeout=400)))
    expect_equal(state, wholes(deep, run_ranks(1, load, deep, tmp_path / "again", {}, timeout=400)))
