"""A dense model with grouped-query attention trains and serves through the same loop, without launcher and Ray job."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def _model_args() -> list[str]:
    script = f"source {ROOT}/scripts/models/qwen3-tiny.sh; printf '%s\\0' \"${{MODEL_ARGS[@]}}\""
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.rstrip("\0").split("\0")


def test_a_tiny_qwen3_trains_on_two_tensor_parallel_ranks_and_feeds_two_engines(tmp_path):
    from tools.make_arithmetic_data import main as make_data
    from tools.make_tiny_checkpoint import main as make_checkpoint

    make_checkpoint(["--preset", "qwen3", "--seed", "3", "--output", str(tmp_path / "model")])
    make_data(["--output", str(tmp_path), "--train", "64", "--eval", "8", "--max-operand", "4"])
    checkpoint = next(path.parent for path in (tmp_path / "model").rglob("config.json"))
    # Rewards are random, because an untrained model earns none, and the step is large enough to show in bf16.
    flags = [
        *_model_args(),
        "--hf-checkpoint",
        checkpoint,
        "--save",
        tmp_path / "run",
        "--save-interval",
        1,
        "--save-hf",
        tmp_path / "hf-{rollout_id}",
        "--actor-num-nodes",
        1,
        "--actor-num-gpus-per-node",
        2,
        "--num-gpus-per-node",
        2,
        "--colocate",
        "--tensor-model-parallel-size",
        2,
        "--sequence-parallel",
        "--rollout-num-gpus-per-engine",
        1,
        "--prompt-data",
        tmp_path / "train.jsonl",
        "--input-key",
        "prompt",
        "--label-key",
        "label",
        "--apply-chat-template",
        "--rm-type",
        "random",
        "--num-rollout",
        1,
        "--rollout-batch-size",
        4,
        "--n-samples-per-prompt",
        4,
        "--global-batch-size",
        16,
        "--rollout-max-response-len",
        8,
        "--use-kl-loss",
        "--kl-loss-coef",
        0.01,
        "--kl-loss-type",
        "low_var_kl",
        "--ref-load",
        checkpoint,
        "--optimizer",
        "adam",
        "--lr",
        2e-2,
        "--lr-decay-style",
        "constant",
        "--use-dynamic-batch-size",
        "--max-tokens-per-gpu",
        1024,
        "--data-pad-size-multiplier",
        16,
        "--sglang-server-concurrency",
        16,
    ]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {
        "SLIME_RUN_DIR": str(tmp_path / "logs")
    }
    run = subprocess.run(
        [sys.executable, "-m", "slime.train", *map(str, flags)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    text = run.stdout + run.stderr
    assert run.returncode == 0, text[-6000:]
    [gap] = re.findall(r"rollout 1/1 \| reward .* \| gap ([\d.]+) ", text)
    # Float32 on both sides, weights cross as bf16: 8 mantissa bits move a log-prob by some thousandths.
    assert float(gap) < 0.05, gap
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text().strip() == "0"
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf-0")
    start = AutoModelForCausalLM.from_pretrained(checkpoint)
    moved = sum(
        (a.float() - b.float()).abs().max().item() > 0 for a, b in zip(exported.parameters(), start.parameters(), strict=True)
    )
    assert moved == len(list(start.parameters())), "every parameter was trained and exported"
