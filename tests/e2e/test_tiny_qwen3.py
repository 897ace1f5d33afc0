"""A dense model with grouped-query attention trains and serves through the same loop, without launcher and Ray job."""

import json
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    from tools.make_tiny_checkpoint import main as make_checkpoint

    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(["--preset", "qwen3", "--seed", "3", "--output", str(folder)])
    return next(path.parent for path in folder.rglob("config.json"))


def run(checkpoint: Path, tmp_path: Path, *more: object) -> subprocess.CompletedProcess:
    """One rollout of a whole run; logs of its servers are in tmp_path / "logs"."""
    from tools.make_arithmetic_data import main as make_data

    make_data(["--output", str(tmp_path), "--train", "64", "--eval", "8", "--max-operand", "4"])
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
        *more,
    ]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {
        "SLIME_RUN_DIR": str(tmp_path / "logs"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "rollout")]),
    }
    return subprocess.run(
        [sys.executable, "-m", "slime.train", *map(str, flags)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_a_wrong_function_of_the_trainers_ends_the_run_before_engines_come_up(checkpoint, tmp_path):
    ended = run(checkpoint, tmp_path, "--use-tis", "--custom-tis-function-path", "example_plugins.ranking.centred_ranks")
    text = ended.stdout + ended.stderr
    said = "--custom-tis-function-path example_plugins.ranking.centred_ranks: found centred_ranks(args, samples) (missing"
    assert ended.returncode == 1 and said in text and "expected fn(*, args, pg_loss, train_log_probs" in text, text[-3000:]
    assert not list((tmp_path / "logs").rglob("*engine*")), "no engine was started"


def test_a_tiny_qwen3_trains_on_two_tensor_parallel_ranks_and_feeds_two_engines(checkpoint, tmp_path):
    """With plugins as they are written for slime: one generates through the router by `post`, one weighs the loss."""
    plugins = ROOT / "tests" / "rollout" / "example_plugins"
    ended = run(
        checkpoint, tmp_path,
        "--custom-generate-function-path", "example_plugins.calculator.generate",
        "--custom-tis-function-path", "example_plugins.mismatch.importance",
        "--custom-config-path", plugins / "mismatch.yaml",
        "--use-opd", "--opd-type", "megatron", "--opd-teacher-load", checkpoint,
    )  # fmt: skip
    text = ended.stdout + ended.stderr
    assert ended.returncode == 0, text[-6000:]
    metrics = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    [dropped] = [row["train/mis_dropped"] for row in metrics if "train/mis_dropped" in row]
    assert 0 <= dropped < 0.1, "trainer and engine nearly agree, so hardly a token leaves [1/2, 2]"
    [divergence] = [row["rollout/opd_reverse_kl"] for row in metrics if "rollout/opd_reverse_kl" in row]
    assert divergence == 0, "the teacher has the weights that the student begins with"
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


def test_ppo_raises_the_reward_and_its_critic_learns_what_to_expect(checkpoint, tmp_path):
    """Twelve rollouts, the first for the critic alone; the reward is the share of words from half the vocabulary."""
    ended = run(
        checkpoint, tmp_path,
        "--advantage-estimator", "ppo", "--normalize-advantages", "--lr", 4e-3, "--critic-lr", 4e-3,
        "--num-critic-only-steps", 1,
        "--rm-type", "none", "--custom-rm-path", "tests.e2e.low_ids.reward",
        "--num-rollout", 12, "--rollout-batch-size", 16, "--global-batch-size", 64, "--save-interval", 12,
    )  # fmt: skip
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-6000:]
    metrics = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]

    def values(name: str) -> list[float]:
        return [row[name] for row in metrics if name in row]

    rewards, losses = values("rollout/raw_reward"), values("train/critic-value_loss")
    assert len(rewards) == len(losses) == 12 and len(values("train/pg_loss")) == 11
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1, rewards
    assert sum(losses[-3:]) < sum(losses[:3]) / 2, losses
    for folder in (tmp_path / "run", tmp_path / "run" / "critic"):
        assert (folder / "latest_checkpointed_iteration.txt").read_text().strip() == "11"
