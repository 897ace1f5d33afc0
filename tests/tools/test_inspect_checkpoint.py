"""The inspector finds what is wrong with a checkpoint folder, and nothing wrong with a right one."""

from __future__ import annotations

import json

import pytest

from tools import inspect_checkpoint, make_tiny_checkpoint


@pytest.fixture
def folder(tmp_path):
    make_tiny_checkpoint.main(["--preset", "qwen3", "--output-fp8", str(tmp_path / "q")])
    return tmp_path / "q"


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_whole_checkpoint_is_counted_without_a_fault(folder, capsys):
    assert inspect_checkpoint.main([str(folder)]) == 0
    shown = capsys.readouterr()
    # By hand: 4 layers x (196,864 / 4 attention + 3 x 128 x 384 MLP + 2 x 128 norms) + 2 x 320 x 128 + 128.
    assert f"{4 * (49_152 + 64 + 147_456 + 256) + 81_920 + 128:,} parameters" in shown.out
    assert shown.err == "" and "model.layers.N.mlp.up_proj.weight_scale_inv" in shown.out


def test_missing_extra_and_misplaced_tensors_are_named(folder, capsys):
    def change(weight_map):
        weight_map["model.layers.9.ghost.weight"] = "model-00001-of-00002.safetensors"
        del weight_map["model.norm.weight"]

    edit_index(folder, change)
    assert inspect_checkpoint.main([str(folder)]) == 1
    faults = capsys.readouterr().err
    assert "model.layers.9.ghost.weight: the index says model-00001-of-00002.safetensors, it is nowhere" in faults
    assert "model.norm.weight: it is in" in faults and "the index says nothing" in faults


def test_a_file_that_is_cut_short_is_named(folder, capsys):
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-10])
    assert inspect_checkpoint.main([str(folder)]) == 1
    told = capsys.readouterr().err
    assert f"{path.name} is cut short" in told and "nowhere" not in told


def test_an_fp8_weight_without_scales_is_named():
    lone = inspect_checkpoint.TensorInfo("a.weight", "F8_E4M3", (2, 2), "f")
    orphan = inspect_checkpoint.TensorInfo("b.weight_scale_inv", "F32", (1, 1), "f")
    assert inspect_checkpoint._scale_faults([lone, orphan]) == [
        "a.weight: FP8 without weight_scale_inv",
        "b.weight_scale_inv: scales without an FP8 weight",
    ]
