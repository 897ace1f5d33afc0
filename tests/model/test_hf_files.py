"""Hugging Face files in and out: bit-exact, complete, and every mistake named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from model.parity import build, make_config, samples_of, step
from ranks import RankFailed, run_ranks
from safetensors.torch import load_file, save_file

from slime.model.coverage import check_files
from slime.model.export import export_weights
from slime.model.hf_config import read_hf_config
from slime.model.hf_io import INDEX, HfWriter, SafetensorsReader, copy_assets, save_hf, write_hf
from slime.model.names import NameTable


def _edited(source: str, target: Path, edit) -> str:
    """A copy of a checkpoint in one file, its tensors passed through `edit`."""
    reader = SafetensorsReader(source)
    tensors = {name: reader.raw(name).clone() for name in reader.names()}
    edit(tensors)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    save_file(tensors, str(target / "model.safetensors"))
    return str(target)


def _refusal(folder: str) -> str:
    with pytest.raises(ValueError) as told:
        check_files(NameTable.for_model(read_hf_config(folder)), SafetensorsReader(folder))
    return str(told.value)


def test_missing_unexpected_and_misshaped_tensors_are_all_named(glm: str, tmp_path: Path) -> None:
    def edit(tensors: dict) -> None:
        del tensors["model.layers.4.mlp.experts.3.up_proj.weight"]
        tensors["model.layers.3.self_attn.indexer.wk.weight"] = torch.zeros(128, 128)  # layer 3 shares
        tensors["model.norm.weight"] = torch.zeros(64)

    message = _refusal(_edited(glm, tmp_path / "bad", edit))
    assert "1 missing tensors: model.layers.4.mlp.experts.3.up_proj.weight" in message
    assert "1 unexpected tensors: model.layers.3.self_attn.indexer.wk.weight" in message
    assert "1 mis-shaped tensors: model.norm.weight: file [64], config [128]" in message


def test_loading_such_files_into_a_model_fails_before_anything_is_written(glm: str, tmp_path: Path) -> None:
    folder = _edited(glm, tmp_path / "bad", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(RankFailed, match="1 missing tensors: lm_head.weight"):
        run_ranks(1, lambda rank: build(rank, 1, folder) and None)


def test_an_fp8_weight_without_its_scale_is_named(glm_pair: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_b_proj.weight"
    folder = _edited(str(glm_pair / "fp8"), tmp_path / "bad", lambda tensors: tensors.pop(f"{name}_scale_inv"))
    entry = NameTable.for_model(read_hf_config(folder)).by_hf(name)
    with pytest.raises(ValueError, match=f"{name} is FP8, but {name}_scale_inv is missing"):
        SafetensorsReader(folder).read(entry.hf[0])


def test_an_index_that_names_an_absent_file_is_refused(glm: str, tmp_path: Path) -> None:
    shutil.copytree(glm, tmp_path / "torn")
    victim = sorted((tmp_path / "torn").glob("*.safetensors"))[-1]
    victim.unlink()
    with pytest.raises(ValueError, match=f"names files that are not there: {victim.name}"):
        SafetensorsReader(tmp_path / "torn")


def test_fp8_files_are_the_same_model_within_the_format(glm_pair: Path) -> None:
    """e4m3 has 3 mantissa bits: each restored number is within 1/16 of the largest of its tile's steps, here 2^-4 relative +
    tile/448/2."""
    table = NameTable.for_model(read_hf_config(glm_pair / "fp8"))
    exact, coded = SafetensorsReader(glm_pair / "bf16"), SafetensorsReader(glm_pair / "fp8")
    assert str(check_files(table, coded)).startswith("296 tensors, 226 FP8 scales")
    for tensor in table.hf_tensors():
        left, right = exact.read(tensor).float(), coded.read(tensor, torch.float32).float()
        if tensor.fp8:
            assert ((left - right).abs() <= left.abs() / 16 + left.abs().max() / 448 / 2**5).all(), tensor.name
        else:
            assert torch.equal(left, right), tensor.name


def test_an_fp8_checkpoint_loads_into_the_trainer(glm_pair: Path) -> None:
    def run(rank: int, folder: str) -> torch.Tensor:
        chunks, ranks, hf, config = build(rank, 1, folder)
        return step(chunks, ranks, hf, config, [samples_of(1, (14,), 320)]).log_probs[0]

    exact, coded = (run_ranks(1, run, str(glm_pair / kind))[0] for kind in ("bf16", "fp8"))
    # At most 16 keys, so no selection can flip; quantisation noise alone.
    assert 1e-6 < (exact - coded).abs().mean() < 0.1


@pytest.mark.parametrize("layout", [{"tp": 2}, {"ep": 2}, {"pp": 2, "first": 6}, {"cp": 2}], ids=str)
def test_exported_weights_are_the_files_bit_for_bit_and_each_comes_once(layout: dict, glm: str) -> None:
    def export(rank: int):
        chunks, ranks, hf, _ = build(rank, 2, glm, **layout)
        table = NameTable.for_model(hf, with_mtp=False)
        return [[(name, tensor.clone()) for name, tensor in group] for group in export_weights(chunks, table, ranks)]

    found: dict[str, torch.Tensor] = {}
    lists = run_ranks(2, export)
    for group in [group for groups in lists for group in groups]:
        for name, tensor in group:
            assert name not in found, f"{name} came twice"
            found[name] = tensor
        names = {name.rsplit(".", 2)[-2] for name, _ in group}
        assert ("q_a_proj" in names) == ("kv_a_proj_with_mqa" in names)
        assert ("wk" in names) == ("weights_proj" in names)
    table, reader = NameTable.for_model(read_hf_config(glm), with_mtp=False), SafetensorsReader(glm)
    assert sorted(found) == sorted(table.hf_names())
    for name, tensor in found.items():
        assert torch.equal(tensor, reader.raw(name).float()), name
    if "tp" in layout or "cp" in layout:
        assert [len(groups) for groups in lists][0] == len(lists[1])  # ranks of a group iterate in step


def test_a_saved_checkpoint_reads_back_and_its_config_is_true(glm_pair: Path, tmp_path: Path) -> None:
    origin = glm_pair / "fp8"
    table, reader = NameTable.for_model(read_hf_config(origin), with_mtp=False), SafetensorsReader(origin)
    tensors = [(tensor.name, reader.read(tensor)) for tensor in table.hf_tensors()]
    write_hf(tmp_path / "out", tensors, origin=origin, table=table, mtp_kept=False, max_bytes=1_000_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["num_nextn_predict_layers"] == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (origin / "tokenizer.json").read_bytes()
    again = SafetensorsReader(tmp_path / "out")
    assert str(check_files(NameTable.for_model(read_hf_config(tmp_path / "out")), again)).startswith(str(len(tensors)))
    assert all(torch.equal(again.raw(name), tensor) for name, tensor in tensors)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for _, t in tensors)
    assert index["weight_map"].keys() == load_all(tmp_path / "out").keys()


@pytest.mark.parametrize("layout", [{"tp": 2}, {"ep": 2}, {"pp": 2, "first": 6}], ids=str)
def test_a_sharded_model_saves_the_checkpoint_it_was_loaded_from(layout: dict, glm: str, tmp_path: Path) -> None:
    def save(rank: int) -> None:
        chunks, ranks, hf, _ = build(rank, 2, glm, **layout)
        save_hf(chunks, NameTable.for_model(hf, with_mtp=False), ranks, tmp_path / "out", origin=glm, max_bytes=1_000_000)

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-00001-of-00001.safetensors").write_bytes(b"old")
    run_ranks(2, save)
    saved, origin = SafetensorsReader(tmp_path / "out"), SafetensorsReader(glm)
    check_files(NameTable.for_model(read_hf_config(tmp_path / "out")), saved)
    for name in saved.names():
        left, right = saved.raw(name), origin.raw(name)
        assert left.dtype == right.dtype and torch.equal(left, right), name
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_every_exported_file_has_the_mode_of_a_new_file(umask: int, mode: int, glm: str, tmp_path: Path) -> None:
    origin = Path(shutil.copytree(glm, tmp_path / "origin"))
    (origin / "tokenizer.json").chmod(0o600)
    table, reader = NameTable.for_model(read_hf_config(origin), with_mtp=False), SafetensorsReader(origin)
    before = os.umask(umask)
    try:
        write_hf(
            tmp_path / "out",
            ((tensor.name, reader.read(tensor)) for tensor in table.hf_tensors()),
            origin=origin,
            table=table,
            mtp_kept=False,
        )
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()} == {
        name: oct(mode) for name in os.listdir(tmp_path / "out")
    }


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_a_tensor_twice_or_never_is_an_error(glm: str, tmp_path: Path) -> None:
    table = NameTable.for_model(read_hf_config(glm), with_mtp=False)
    writer = HfWriter(tmp_path)
    writer.add("model.norm.weight", torch.ones(128))
    with pytest.raises(ValueError, match="model.norm.weight would be written twice"):
        writer.add("model.norm.weight", torch.ones(128))
    with pytest.raises(
        ValueError, match=f"{len(table.hf_names()) - 1} tensors were never written, e.g. model.embed_tokens.weight"
    ):
        writer.close(table)
    assert not (tmp_path / INDEX).exists()


def test_the_origin_is_never_overwritten(glm: str) -> None:
    with pytest.raises(ValueError, match="choose another folder to save to"):
        copy_assets(glm, glm)


def test_model_args_that_differ_from_the_checkpoint_are_listed(glm: str) -> None:
    def build_wrong(rank: int) -> str:
        from slime.device import get_device
        from slime.model.build import build_model
        from slime.parallel import init_ranks

        hf = read_hf_config(glm)
        config = make_config(glm, hf)
        config.model.megatron.update(num_layers=7, v_head_dim=64, moe_layer_freq=[0, 0, 1, 1, 1, 1, 1])
        config.model.rotary_base = 1e6
        ranks = init_ranks(config.parallel, rank=0, world_size=1, device=get_device())
        try:
            build_model(config, hf, ranks, get_device())
        except ValueError as told:
            return str(told)
        return ""

    message = run_ranks(1, build_wrong)[0]
    for line in (
        "num_hidden_layers is 8 there, --num-layers is 7 here; pass --num-layers 8",
        "v_head_dim is 32 there, --v-head-dim is 64 here; pass --v-head-dim 32",
        "first_k_dense_replace is 3 there, --moe-layer-freq has 2 dense layers of 7 here; pass --moe-layer-freq '[0,0,0,1,",
        "rope_theta is 8000000.0 there, --rotary-base is 1000000.0 here; pass --rotary-base 8000000 (",
    ):
        assert line in message
    assert message.count(" here; ") == 4
