"""Predicted against real peak memory of a training rank on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from slime.model.hf_config import HfConfig, read_hf_config
from slime.model.names import NameTable
from slime.rehearse.memory import Assumed, Measured, StageMemory, TrainShapes, compare, host_training
from slime.rehearse.shares import Grid, StageShare, stage_shares
from slime.rehearse.stages import Cut, cut_layers
from tests.rehearse.recipes import ROOT

WIDE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 512,
    "num_attention_heads": 8,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "index_topk": 128,
}
WIDER = {**WIDE, "hidden_size": 640, "n_routed_experts": 16}


@pytest.fixture(scope="module", params=[WIDE, WIDER, {}], ids=["49 M", "110 M", "the tiny run's"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tools.make_tiny_checkpoint import PRESETS, write_checkpoint

    folder, preset = tmp_path_factory.mktemp("model"), PRESETS["cpu"]
    size = replace(preset.size, num_nextn_predict_layers=0, **request.param)
    write_checkpoint(folder, replace(preset, size=size, max_shard_bytes=1 << 28), seed=0, fp8=False)
    return folder


def predicted(hf: HfConfig, tokens: int) -> tuple[StageShare, StageMemory]:
    grid = Grid(1, 1, 1, 1, 1, 1)
    share = stage_shares(NameTable.for_model(hf), cut_layers(Cut(hf.num_layers, 1)), grid)[0]
    shapes = TrainShapes(
        tokens, tokens, True, 4, 4, 8, False, 1, hf["vocab_size"], -1
    )  # float32: the weights are their own masters
    return share, StageMemory(share, (host_training(share, hf, grid, shapes, Assumed()),), 0)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [64, 512, 1024])
def test_peak_memory_is_within_10_percent(checkpoint: Path, tokens: int) -> None:
    script = ROOT / "tests" / "rehearse" / "train_and_measure.py"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    child = subprocess.run(
        [sys.executable, str(script), str(checkpoint), str(tokens)], capture_output=True, text=True, timeout=500, env=env
    )
    assert child.returncode == 0, child.stderr[-2000:]
    measured = int(child.stdout.split("PEAK ")[1])
    share, memory = predicted(read_hf_config(checkpoint), tokens)
    line = compare(Measured({(0, "train"): measured}), [memory])[0]
    print(f"{share.parameters:,} parameters, {tokens} tokens: {line.line()}")
    assert abs(line.error) < 0.10, line.line()
