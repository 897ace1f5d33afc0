"""Engines for the tests of this folder: specs, a tiny checkpoint, requests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from slime.device import get_device
from slime.engine.payload import bucket_payload
from slime.engine.spec import EngineSpec
from slime.weights.buckets import pack_bucket

REPOSITORY = Path(__file__).resolve().parents[2]
TOKEN = "token-of-this-test-run"


def spec(role: str, engine_id: int, model_path: Path | str, *, tp: int = 1, **settings) -> EngineSpec:
    return EngineSpec(
        model="default",
        role=role,
        engine_id=engine_id,
        gpu_offset=engine_id,
        num_gpus=tp,
        num_nodes=1,
        tp_size=tp,
        pp_size=1,
        dp_size=1,
        ep_size=1,
        model_path=str(model_path),
        update_weights=True,
        needs_offload=True,
        random_seed=42 + engine_id,
        settings=settings,
    )


def make_checkpoint(preset: str, folder: Path, *, seed: int = 0) -> Path:
    """A tiny checkpoint; for GLM-5.2 `folder/bf16` and `folder/fp8`."""
    command = [
        sys.executable,
        "tools/make_tiny_checkpoint.py",
        "--preset",
        preset,
        "--seed",
        str(seed),
        "--output",
        str(folder),
    ]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder


def payload(named: Iterable[tuple[str, torch.Tensor]]) -> bytes:
    """Named tensors as the trainer sends them, in one bucket."""
    return bucket_payload(pack_bucket(list(named)), get_device())


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(4, 290, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def request(tokens: list[int], new_tokens: int, *, temperature: float = 0.0, log_probs: bool = True) -> dict:
    body = {
        "input_ids": tokens,
        "sampling_params": {"max_new_tokens": new_tokens, "temperature": temperature, "ignore_eos": True},
        "return_logprob": log_probs,
    }
    return body | ({"logprob_start_len": 0} if log_probs else {})
