"""The page that a run begins with says what was built, number by number."""

from __future__ import annotations

import json
import re

import pytest
from ranks import run_ranks
from safetensors import safe_open
from tiny import config_for, plans, rollout, start

from slime.training import memory
from slime.training.share import share_of
from slime.training.start_page import start_page

pytestmark = pytest.mark.slow

LAYOUT = dict(
    tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=6,
    expert_model_parallel_size=2, expert_tensor_parallel_size=1, data_pad_size_multiplier=4, max_tokens_per_gpu=50,
)  # fmt: skip


def build(rank: int, folder, changes: dict, world: int):
    """(share, page, bytes of gradients and optimizer as they lie in memory after a step)."""
    config = config_for(folder, **changes)
    trainer = start(config)
    share, batch = share_of(trainer), rollout()
    trainer.train(batch, plans(batch, config, world))
    real = {"gradients": sum(tensor.nbytes for tensor in memory.gradient_tensors(trainer).values())}
    # Step counts are single numbers.
    real["optimizer"] = sum(tensor.nbytes for tensor in memory.step_tensors(trainer).values() if tensor.numel() > 1)
    return share, start_page([share], config), real


def numbers_in(folder) -> int:
    """Of the files that transformers wrote, without the routers' biases, which are buffers."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys() if not name.endswith("e_score_correction_bias"))


def test_counts_are_those_of_the_files_and_bytes_those_in_memory(glm):
    results = run_ranks(4, build, glm, LAYOUT, 4)
    shares = [share for share, *_ in results]
    config = json.loads((glm / "config.json").read_text())
    layers, hidden, inner, experts = 5, config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
    assert (hidden, inner, experts) == (48, 32, 8)
    assert sum(share.owned for share in shares) == numbers_in(glm)
    assert sum(share.owned_experts for share in shares) == layers * experts * 3 * hidden * inner == 184_320
    # Stage 0 has layers 4 to 6 with experts, stage 1 has 7 and 8; half of the experts on each rank.
    assert [share.expert_parameters for share in shares] == [3 * 4 * 3 * 48 * 32] * 2 + [2 * 4 * 3 * 48 * 32] * 2
    assert [share.chunks for share in shares] == [((1, 2, 3, 4, 5, 6),)] * 2 + [((7, 8),)] * 2
    assert [(share.has_embedding, share.has_head) for share in shares] == [(True, False)] * 2 + [(False, True)] * 2
    for share, _, real in results:
        assert share.weight_bytes == 4 * share.parameters
        assert share.gradient_bytes == real["gradients"]
        assert 0 <= share.gradient_bytes - 4 * share.trained < 4096, "fp32, and the padding of a bucket"
        assert share.optimizer_bytes == real["optimizer"] == 8 * share.trained, "two moments; no replica to share them with"


def test_a_bf16_model_has_main_parameters_and_replicas_share_the_state(qwen3):
    results = run_ranks(2, build, qwen3, dict(params_dtype="bf16"), 2)
    (first, _, real), (second, _, also) = results
    assert first.weight_bytes == 2 * first.parameters and first.parameters == numbers_in(qwen3) == first.owned
    assert second.owned == 0, "its copy is counted on the first rank"
    assert (first.optimizer_bytes, second.optimizer_bytes) == (real["optimizer"], also["optimizer"])
    assert first.optimizer_bytes + second.optimizer_bytes == 12 * first.trained


def test_the_page_is_readable(glm):
    shares = [share for share, *_ in run_ranks(4, build, glm, LAYOUT, 4)]
    page = start_page(shares, config_for(glm, **LAYOUT))
    assert page[0] == ("trainer: 4 ranks = TP 2 x CP 1 x PP 2 x DP 1; experts: expert-TP 1 x EP 2 x PP 2 x DP 1")
    assert page[1] == f"model: {numbers_in(glm):,} parameters, 184,320 of them routed experts"
    assert page[2] == (
        "micro-batch: up to 50 tokens, 56 rows on each rank, 28 in each tensor-parallel slice; padded to multiples of 8; "
        "a longer sample is alone in its own"
    )
    assert page[3].split() == [
        "stage", "layers", "parameters", "on", "a", "rank", "trained", "weights", "gradients", "optimizer"
    ]  # fmt: skip
    assert page[4].startswith("    0  1-6, embedding") and page[5].startswith("    1  7-8, output")
    stages = [int(re.split(r"\s{2,}", line.strip())[2].replace(",", "")) for line in page[4:6]]
    assert sum(stages) == numbers_in(glm)
