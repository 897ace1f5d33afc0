"""Predicted against real peak memory of a training rank on a CPU. The tiny run's own peaks are compared in tests/e2e."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from training import tiny

from slime.config.stages import Cut, cut_layers
from slime.device import PhasePeak
from slime.model.hf_config import read_hf_config
from slime.model.names import NameTable
from slime.model.placement import Grid
from slime.rehearse.model.host_memory import host_memory
from slime.rehearse.model.memory import Assumed, TrainShapes
from slime.rehearse.model.shares import stage_shares
from slime.types import RolloutBatch

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
    "num_nextn_predict_layers": 0,
}
"""49 million parameters."""
WIDER = {**WIDE, "hidden_size": 640, "n_routed_experts": 16}
"""110 million parameters."""


def batch(rollout_id: int, tokens: int) -> RolloutBatch:
    """Two samples that fill one micro-batch."""
    rng, n, response = np.random.default_rng(rollout_id), 2, tokens // 2 - 8
    return RolloutBatch(
        rollout_id=rollout_id,
        tokens=tuple(rng.integers(1, 90, tokens // 2) for _ in range(n)),
        response_lengths=np.full(n, response),
        loss_masks=tuple(np.ones(response, np.float32) for _ in range(n)),
        rewards=np.array([1.0, -1.0], np.float32),
        raw_rewards=np.array([1.0, -1.0], np.float32),
        groups=np.arange(n),
        trajectories=np.arange(n),
        sample_ids=np.arange(n),
        truncated=np.zeros(n, bool),
        rollout_log_probs=tuple(np.full(response, -4.0, np.float32) for _ in range(n)),
    )


def train_and_measure(rank: int, folder: Path, tokens: int) -> tuple[int, dict[str, PhasePeak], int]:
    """(resident bytes before the model, peaks of two rollouts, rows of the longest micro-batch)."""
    from slime.device import get_device

    # What the tests before this one freed is still resident in the fork, and would serve the model unseen.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = get_device().memory().used
    sizes = {
        "max_tokens_per_gpu": tokens,
        "data_pad_size_multiplier": 64,
        "global_batch_size": 2,
        "rollout_batch_size": 2,
        "n_samples_per_prompt": 1,
    }
    config = tiny.config_for(folder, **sizes)
    config.model.megatron.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    trainer = tiny.start(config)
    for rollout_id in range(2):
        rollout = batch(rollout_id, tokens)
        trainer.train(rollout, tiny.plans(rollout, config, 1))
    return before, trainer.peaks.phases, trainer.largest_micro_batch


@pytest.mark.slow
@pytest.mark.parametrize(("size", "tokens"), [(WIDE, 1024), (WIDER, 64)], ids=["49 M, 1024 tokens", "110 M, 64 tokens"])
def test_peak_memory_is_within_10_percent(size: dict, tokens: int, tmp_path: Path) -> None:
    """Of what the model itself needs: the forked rank's resident memory before it held a model is taken off."""
    from tools.make_tiny_checkpoint import PRESETS, write_checkpoint

    preset = PRESETS["cpu"]
    preset = replace(preset, size=replace(preset.size, **size), max_shard_bytes=1 << 28)
    # In a process of its own: what it frees would otherwise serve the measured one, which is forked from this.
    run_ranks(1, lambda rank: write_checkpoint(tmp_path, preset, seed=0, fp8=False) and None)
    [(before, peaks, rows)] = run_ranks(1, train_and_measure, tmp_path, tokens, timeout=300)
    assert rows == tokens
    hf, grid = read_hf_config(tmp_path), Grid(1, 1, 1, 1, 1, 1)
    share = stage_shares(NameTable.for_model(hf), cut_layers(Cut(hf.num_layers, 1)), grid)[0]
    # float32: the weights are their own masters, 4 + 4 bytes of moments
    shapes = TrainShapes(tokens, tokens, True, 4, 4, 8, 0.0, 1, hf["vocab_size"], -1)
    predicted = host_memory(share, hf, grid, shapes, replace(Assumed(), host_process_gb=0.0), bucket_bytes=0)
    for name in ("log-probs", "train"):
        if name in peaks:
            measured, wanted = peaks[name].tensors - before, predicted.phase(name).total
            print(
                f"{share.parameters:,} parameters, {tokens} tokens, {name}: "
                f"predicted {wanted / 1e9:.3f}, measured {measured / 1e9:.3f} GB"
            )
            assert abs(wanted / measured - 1) < 0.10
    assert "train" in peaks
