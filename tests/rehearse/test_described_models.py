"""The model that MODEL_ARGS describe, where no config.json is at hand: family and sizes as the release's own file has them."""

from __future__ import annotations

import pytest

from slime.config.command_line import parse_words
from slime.config.loader import starting_values
from slime.rehearse.known_models import described_config
from tests.rehearse.recipes import model_args

DESCRIBED: dict[str, dict[str, object]] = {
    "deepseek-v3": {
        "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "q_lora_rank": 1536, "n_routed_experts": 256,
        "first_k_dense_replace": 3, "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "moe_intermediate_size": 2048,
        "num_experts_per_tok": 8, "routed_scaling_factor": 2.5, "vocab_size": 129280, "tie_word_embeddings": False,
    },
    "moonlight": {
        "model_type": "deepseek_v3", "num_hidden_layers": 27, "q_lora_rank": None, "n_routed_experts": 64,
        "first_k_dense_replace": 1, "n_shared_experts": 2, "num_experts_per_tok": 6,
    },
    "glm4.5-355B-A32B": {
        "model_type": "glm4_moe", "num_hidden_layers": 92, "n_routed_experts": 160, "first_k_dense_replace": 3,
        "partial_rotary_factor": 0.5, "use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 2.5,
    },
    "glm4.5-106B-A12B": {"model_type": "glm4_moe", "num_hidden_layers": 46, "use_qk_norm": False, "n_shared_experts": 1},
    "llama3.2-3B": {
        "model_type": "llama", "tie_word_embeddings": True, "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
    },
    "qwen2.5-7B": {"model_type": "qwen2", "num_hidden_layers": 28, "num_key_value_heads": 4, "attention_bias": True},
    "glm4-9B": {"model_type": "glm4", "num_hidden_layers": 40, "partial_rotary_factor": 0.5},
    "qwen3-8B": {"model_type": "qwen3", "num_hidden_layers": 36, "num_attention_heads": 32, "head_dim": 128},
}  # fmt: skip


@pytest.mark.parametrize("script", DESCRIBED)
def test_model_args_describe_their_release(script: str) -> None:
    found, source = described_config(starting_values(parse_words(model_args(script), door="rehearse")))
    assert source == "the model that MODEL_ARGS describe"
    assert {name: found[name] for name in DESCRIBED[script]} == DESCRIBED[script]


@pytest.mark.parametrize(
    ("script", "words", "model_type", "layers"),
    [
        ("mimo-7B-rl", "--mtp-num-layers 1", "mimo", 1),
        ("mimo-7B-rl", "--sglang-speculative-algorithm EAGLE", "mimo", 1),
        ("qwen2.5-7B", "", "qwen2", None),
        ("glm4.5-355B-A32B", "--sglang-speculative-algorithm NEXTN", "glm4_moe", 1),
        ("deepseek-v3", "", "deepseek_v3", None),
    ],
)
def test_a_layer_to_draft_with_is_there_where_the_flags_need_one(script: str, words: str, model_type: str, layers) -> None:
    found, _ = described_config(starting_values(parse_words([*model_args(script), *words.split()], door="rehearse")))
    assert (found["model_type"], found.get("num_nextn_predict_layers")) == (model_type, layers)


def test_a_plain_model_without_biases_is_llamas() -> None:
    words = [word for word in model_args("qwen2.5-7B") if word != "--add-qkv-bias"]
    found, _ = described_config(starting_values(parse_words(words, door="rehearse")))
    assert found["model_type"] == "llama" and found["attention_bias"] is False
