"""HF -> torch_dist -> HF with the recipe's command at toy size; torch_dist under other layouts."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model.parity import build
from ranks import RankFailed, run_ranks

from slime.model.dist_ckpt import TRACKER, checkpoint_folder, load_model, read_tracker, save_model, write_tracker
from slime.model.hf_config import read_hf_config
from slime.model.hf_io import SafetensorsReader
from slime.model.local import local_tensors

ROOT = Path(__file__).parents[2]
MODEL_ARGS = """
--spec slime_plugins.models.glm5.glm5 get_glm5_spec --moe-layer-freq [0]*3+[1]*5 --num-experts 8
--moe-shared-expert-intermediate-size 64 --moe-router-topk 2 --moe-grouped-gemm --moe-permute-fusion --moe-ffn-hidden-size 64
--moe-router-score-function sigmoid --moe-router-pre-softmax --moe-router-enable-expert-bias --moe-router-bias-update-rate 0
--moe-router-load-balancing-type seq_aux_loss --moe-router-topk-scaling-factor 2.5 --moe-aux-loss-coeff 0 --moe-router-dtype
fp32 --make-vocab-size-divisible-by 16 --num-layers 8 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4
--disable-bias-linear --swiglu --untie-embeddings-and-output-weights --position-embedding-type rope --no-position-embedding
--normalization RMSNorm --qk-layernorm --multi-latent-attention --q-lora-rank 64 --kv-lora-rank 32 --qk-head-dim 32 --v-head-dim
32 --qk-pos-emb-head-dim 16 --kv-channels 32 --vocab-size 320 --rotary-base 8000000 --enable-experimental --allgather-cp
""".split()


def _run(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240, env=environment, cwd=ROOT)


def _convert(
    world: int, source: str, save: Path, *flags: str, model_args: list[str] = MODEL_ARGS
) -> subprocess.CompletedProcess:
    return _run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "tools/convert_hf_to_torch_dist.py",
        *model_args, *flags, "--hf-checkpoint", source, "--save", str(save),
    )  # fmt: skip


def _back(*words: str) -> str:
    """convert_torch_dist_to_hf in this process: what it printed."""
    from tools.convert_torch_dist_to_hf import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(list(words)) == 0
    return out.getvalue()


@pytest.mark.slow
def test_the_recipes_conversion_round_trips_bit_for_bit(glm: str, tmp_path: Path) -> None:
    """TP2 by torchrun (without --sequence-parallel, as in the recipe: conversion computes nothing), then back."""
    done = _convert(2, glm, tmp_path / "dist", "--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2",
                    "--expert-tensor-parallel-size", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "296 tensors, 0 FP8 scales: each accounted for once" in done.stdout
    assert (tmp_path / "dist" / TRACKER).read_text() == "release" and (tmp_path / "dist" / "release" / "common.pt").is_file()
    source = ("--input-dir", str(tmp_path / "dist"), "--origin-hf-dir", glm)
    _back(*source, "--output-dir", str(tmp_path / "hf"), "--add-missing-from-origin-hf")
    before, after = SafetensorsReader(glm), SafetensorsReader(tmp_path / "hf")
    assert sorted(before.names()) == sorted(after.names())
    for name in before.names():
        left, right = before.raw(name), after.raw(name)
        assert left.dtype == right.dtype and torch.equal(left, right), name
    said = _back(*source, "--output-dir", str(tmp_path / "plain"))
    assert "without the multi-token-prediction layer, which was not trained" in said
    assert read_hf_config(tmp_path / "plain").num_mtp_layers == 0
    with pytest.raises(ValueError, match="is not empty; pass --force"):
        _back(*source, "--output-dir", str(tmp_path / "hf"))


@pytest.mark.slow
def test_a_wrong_world_size_or_model_is_one_clear_line(glm: str, tmp_path: Path) -> None:
    done = _convert(1, glm, tmp_path / "a", "--pipeline-model-parallel-size", "2", "--decoder-last-pipeline-num-layers", "6")
    assert done.returncode != 0 and "1 ranks cannot be divided into TP 1 x PP 2 x CP 1 = 2" in done.stderr
    wrong = [word if word != "256" else "512" for word in MODEL_ARGS]
    done = _convert(1, glm, tmp_path / "b", model_args=wrong)
    assert done.returncode != 0 and "--ffn-hidden-size" in done.stderr and "512" in done.stderr and "256" in done.stderr
    assert not (tmp_path / "b" / TRACKER).exists()


@pytest.mark.slow
def test_a_checkpoint_loads_under_any_other_layout(glm: str, tmp_path: Path) -> None:
    """Saved under TP2 x PP2 x EP2; every rank of every other layout holds what the HF files say."""

    def save(rank: int) -> None:
        chunks, ranks, hf, _ = build(rank, 4, glm, tp=2, pp=2, first=2, ep=2)
        save_model(chunks, hf, tmp_path / "ckpt", ranks, common={"iteration": 3})

    def load(rank: int, world: int, layout: dict) -> int:
        chunks, ranks, hf, _ = build(rank, world, glm, **layout)
        wanted = {local.name: local.tensor.clone() for local in local_tensors(chunks, ranks)}
        for local in local_tensors(chunks, ranks):
            local.tensor.fill_(7.0)
        common = load_model(chunks, hf, tmp_path / "ckpt", ranks)
        for local in local_tensors(chunks, ranks):
            assert torch.equal(local.tensor, wanted[local.name]), local.name
        return common["iteration"]

    run_ranks(4, save)
    for world, layout in [
        (1, {}),
        (2, {"tp": 2}),
        (2, {"pp": 2, "first": 6}),
        (2, {"ep": 2}),
        (4, {"ep": 4, "tp": 2}),
        (2, {"cp": 2}),
    ]:
        assert run_ranks(world, load, world, layout) == [3] * world, layout


def test_a_checkpoint_of_another_model_or_a_torn_one_is_refused(glm: str, tmp_path: Path) -> None:
    def run(rank: int) -> tuple[str, str]:
        chunks, ranks, hf, _ = build(rank, 1, glm)
        save_model(chunks, hf, tmp_path / "ckpt", ranks)
        messages = []
        other = read_hf_config(glm)
        other._raw["index_topk"] = 99
        for model, folder in ((other, tmp_path / "ckpt"), (hf, tmp_path / "nothing")):
            try:
                load_model(chunks, model, folder, ranks)
            except ValueError as told:
                messages.append(str(told))
        (tmp_path / "ckpt" / "metadata.json").unlink()
        try:
            load_model(chunks, hf, tmp_path / "ckpt", ranks)
        except ValueError as told:
            messages.append(str(told))
        return messages

    another, nothing, torn = run_ranks(1, run)[0]
    assert "holds another model:\n  index_topk: checkpoint 16," in another and another.endswith("99")
    assert "is not a torch_dist checkpoint" in nothing
    assert "is not a finished torch_dist checkpoint" in torn


def test_a_checkpoint_saved_in_bf16_fills_a_float32_model(glm: str, tmp_path: Path) -> None:
    def run(rank: int) -> None:
        from slime.device import get_device
        from slime.model.build import build_model, padded_vocab_size
        from slime.model.hf_io import load_hf
        from slime.model.names import NameTable

        chunks, ranks, hf, config = build(rank, 1, glm)
        low = build_model(config, hf, ranks, get_device(), dtype=torch.bfloat16)
        load_hf(low, NameTable.for_model(hf), SafetensorsReader(glm), ranks, padded_vocab=padded_vocab_size(config, hf))
        save_model(low, hf, tmp_path / "ckpt", ranks)
        wanted = {local.name: local.tensor.clone() for local in local_tensors(chunks, ranks)}
        for local in local_tensors(chunks, ranks):
            local.tensor.zero_()
        load_model(chunks, hf, tmp_path / "ckpt", ranks)
        for local in local_tensors(chunks, ranks):
            assert local.tensor.dtype == torch.float32 and torch.equal(local.tensor, wanted[local.name]), local.name

    run_ranks(1, run)


def test_a_missing_tensor_in_the_checkpoint_is_named(glm: str, tmp_path: Path) -> None:
    def run(rank: int) -> None:
        from slime.model.dist_ckpt import DESCRIPTION, describe, save_sharded, sharded_model

        chunks, ranks, hf, _ = build(rank, 1, glm)
        state = sharded_model(chunks, ranks)
        del state["model"]["decoder.layers.4.self_attention.linear_proj.weight"]
        save_sharded({**state, DESCRIPTION: describe(hf)}, tmp_path / "ckpt", ranks)
        load_model(chunks, hf, tmp_path / "ckpt", ranks)

    with pytest.raises(
        RankFailed, match=r"lacks 1 tensors of this model: decoder\.layers\.4\.self_attention\.linear_proj\.weight"
    ):
        run_ranks(1, run)


def test_the_tracker_names_folders(tmp_path: Path) -> None:
    assert read_tracker(tmp_path) is None
    write_tracker(tmp_path, "12")
    assert read_tracker(tmp_path) == "12" and checkpoint_folder(tmp_path, "12").name == "iter_0000012"
    assert checkpoint_folder(tmp_path, "release").name == "release"
    assert [path.name for path in tmp_path.iterdir()] == [TRACKER]
