"""The multi-token-prediction layer in checkpoints: HF -> torch_dist under one layout -> HF and other layouts, bit for bit."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
import torch
from model.parity import build
from ranks import run_ranks

from slime.device import get_device
from slime.model.build import build_model, padded_vocab_size
from slime.model.dist_ckpt import load_model, save_model, write_tracker
from slime.model.hf_config import read_hf_config
from slime.model.hf_io import SafetensorsReader, load_hf
from slime.model.local import local_tensors
from slime.model.names import NameTable


def save(rank: int, glm: str, folder: Path) -> int:
    """As the conversion does it, in the checkpoint's dtype, on PP2 x EP2: the last stage has a copy of the embedding."""
    _, ranks, hf, config = build(rank, 2, glm, pp=2, first=6, mtp=True)
    chunks = build_model(config, hf, ranks, get_device(), dtype=torch.bfloat16)
    reader = SafetensorsReader(glm)
    load_hf(chunks, NameTable.for_model(hf), reader, ranks, padded_vocab=padded_vocab_size(config, hf))
    save_model(chunks, hf, folder / "release", ranks, common={"iteration": 1})
    if rank == 0:
        write_tracker(folder, "release")
    return sum(local.is_copy for local in local_tensors(chunks, ranks))


def load(rank: int, world: int, glm: str, folder: Path, layout: dict) -> int:
    chunks, ranks, hf, _ = build(rank, world, glm, mtp=True, **layout)
    wanted = {local.name: local.tensor.clone() for local in local_tensors(chunks, ranks)}
    for local in local_tensors(chunks, ranks):
        local.tensor.fill_(7.0)
    load_model(chunks, hf, folder / "release", ranks)
    for local in local_tensors(chunks, ranks):
        assert torch.equal(local.tensor, wanted[local.name]), local.name
    return sum(name.startswith("mtp.") for name in wanted)


@pytest.mark.slow
def test_the_layer_goes_through_torch_dist_bit_for_bit_and_under_any_layout(glm: str, tmp_path: Path) -> None:
    assert run_ranks(2, save, glm, tmp_path) == [0, 1], "copies of the embedding"
    from tools.convert_torch_dist_to_hf import main

    with contextlib.redirect_stdout(io.StringIO()):
        main(["--input-dir", str(tmp_path), "--origin-hf-dir", glm, "--output-dir", str(tmp_path / "hf")])
    before, after = SafetensorsReader(glm), SafetensorsReader(tmp_path / "hf")
    assert sorted(before.names()) == sorted(after.names())
    for name in before.names():
        left, right = before.raw(name), after.raw(name)
        assert left.dtype == right.dtype and torch.equal(left, right), name
    assert read_hf_config(tmp_path / "hf").num_mtp_layers == 1
    layouts = [(1, {}), (2, {"tp": 2}), (2, {"pp": 2, "first": 2, "vpp": None}), (2, {"ep": 2})]
    assert all(all(run_ranks(world, load, world, glm, tmp_path, layout)[-1:]) for world, layout in layouts)


def test_a_checkpoint_without_the_layer_is_refused_with_the_way_out(glm: str, tmp_path: Path) -> None:
    def run(rank: int) -> str:
        chunks, ranks, hf, config = build(rank, 1, glm)
        save_model(chunks, hf, tmp_path / "plain", ranks)
        chunks, ranks, hf, config = build(rank, 1, glm, mtp=True)
        try:
            load_model(chunks, hf, tmp_path / "plain", ranks)
        except ValueError as told:
            return str(told)
        return "loaded"

    (told,) = run_ranks(1, run)
    assert "holds no multi-token-prediction layer" in told and "convert the model again with --mtp-num-layers 1" in told
