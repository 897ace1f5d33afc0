"""No field of config.json, and no flag about the model, is taken in vain: used, of the assumed value, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slime.config import ConfigError, parse
from slime.config.facts import Facts
from slime.config.hf_config import HfConfig
from slime.config.hf_fields import FAMILIES, faults

ROOT = Path(__file__).parents[2]
PLAIN = {
    "vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "hidden_act": "silu", "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "transformers_version": "4.51.0",
    "bos_token_id": 1, "eos_token_id": [2, 3], "initializer_range": 0.02, "attention_dropout": 0.0,
}  # fmt: skip
QWEN3 = {**PLAIN, "model_type": "qwen3", "head_dim": 32, "num_key_value_heads": 2, "attention_bias": False,
         "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28}  # fmt: skip
QWEN3_MOE = {**QWEN3, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
             "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}  # fmt: skip
DEEPSEEK = {
    **PLAIN, "model_type": "deepseek_v3", "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "routed_scaling_factor": 2.5, "kv_lora_rank": 32, "q_lora_rank": 64, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "first_k_dense_replace": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "attention_bias": False,
}  # fmt: skip
GLM = {**DEEPSEEK, "model_type": "glm_moe_dsa", "index_topk": 16, "index_n_heads": 16, "index_head_dim": 128}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def said(base: dict, **more: object) -> str:
    return "\n".join(faults(HfConfig({**base, **more}, "x/config.json")))


def test_released_models_are_known_to_their_last_field() -> None:
    for name, raw in json.loads((ROOT / "slime/rehearse/known_models.json").read_text()).items():
        assert said(raw) == "", name
    for base in (QWEN3, QWEN3_MOE, DEEPSEEK, GLM):
        assert said(base) == ""
    assert said(QWEN3, num_nextn_predict_layers=0) == said(DEEPSEEK, num_nextn_predict_layers=1) == ""
    assert "num_nextn_predict_layers is 1, and what is trained here has 0" in said(QWEN3, num_nextn_predict_layers=1)
    assert said(QWEN3, rope_scaling=YARN) == said(GLM, quantization_config=FP8) == said(DEEPSEEK, q_lora_rank=None) == ""
    unsaid = {name: value for name, value in FP8.items() if name not in ("fmt", "activation_scheme")}
    assert said(GLM, quantization_config=unsaid) == "", "codes are e4m3 and activations dynamic where nothing is said"


@pytest.mark.parametrize("base", [QWEN3, QWEN3_MOE, DEEPSEEK, GLM], ids=lambda base: base["model_type"])
def test_an_unknown_field_is_refused_with_the_nearest_known_one(base: dict) -> None:
    assert "x/config.json: num_hiden_layers 4 is not known for" in said(base, num_hiden_layers=4)
    assert "did you mean num_hidden_layers?" in said(base, num_hiden_layers=4)
    assert "remove it from config.json" in said(base, attention_sinks=True)
    assert said(base, attention_sinks=None) == ""
    assert "hidden_act is 'gelu', and what is trained here has 'silu'" in said(base, hidden_act="gelu")
    assert "attention_bias is True" in said(base, attention_bias=True)
    assert "attention_dropout is 0.1" in said(base, attention_dropout=0.1)


@pytest.mark.parametrize(
    ("base", "more", "told"),
    [
        (GLM, {"norm_topk_prob": False}, "norm_topk_prob is False, and what is trained here has True"),
        (DEEPSEEK, {"norm_topk_prob": False}, "norm_topk_prob is False, and what is trained here has True"),
        (QWEN3_MOE, {"norm_topk_prob": None}, "norm_topk_prob is false"),
        (GLM, {"num_experts_per_tok": 1}, "num_experts_per_tok is 1, and a single expert's weight is not normalised"),
        (QWEN3_MOE, {"num_experts_per_tok": 1}, "num_experts_per_tok is 1"),
        (DEEPSEEK, {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        (DEEPSEEK, {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        (DEEPSEEK, {"n_group": 4, "topk_group": 2}, "only two experts per chosen group"),
        (DEEPSEEK, {"qk_head_dim": 96}, "qk_head_dim 96 is not the sum of qk_nope_head_dim 32 and qk_rope_head_dim 16"),
        (GLM, {"index_topk": None}, "index_topk is missing"),
        (GLM, {"mlp_layer_types": ["sparse"] * 4}, "mlp_layer_types has 0 dense layers, first_k_dense_replace"),
        (QWEN3, {"torch_dtype": "float64"}, "torch_dtype is 'float64', and what is trained here has 'bfloat16' or 'float16'"),
        (GLM, {"dtype": "int8"}, "dtype is 'int8'"),
        (QWEN3, {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window is True"),
        (QWEN3, {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "layer_types is 'sliding_attention'"),
        ({**QWEN3, "model_type": "llama"}, {"sliding_window": 64}, "sliding_window is 64, and what is trained"),
        (QWEN3, {"rope_scaling": {**YARN, "truncate": False}}, "rope_scaling: truncate is False"),
        (QWEN3, {"rope_scaling": {**YARN, "beta_fats": 3}}, "beta_fats 3 is not known for yarn positions; did you"),
        (QWEN3, {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope' is not supported"),
        (QWEN3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, and what is trained here has 1.0"),
        (QWEN3, {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}}, "a qwen3 model turns whole heads"),
        (QWEN3, {"rope_scaling": {**YARN, "factor": "four"}}, "rope_scaling: factor is 'four', no number"),
        (QWEN3, {"rope_scaling": {"type": "linear"}}, "linear positions need a factor"),
        (QWEN3, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}, "rope_parameters say 5e+06"),
        (QWEN3, {"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN}, "differ; remove one"),
        (GLM, {"quantization_config": {**FP8, "weight_block_size": [128, 64]}}, "[128, 64]; blocks must be"),
        (GLM, {"quantization_config": {**FP8, "weight_block_size": None}}, "weight_block_size is None; blocks must be square"),
        (GLM, {"quantization_config": {**FP8, "fmt": "e5m2"}}, "fmt is 'e5m2', and e4m3 is read"),
        (GLM, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method is 'gptq'; weights in BF16"),
        (PLAIN, {"model_type": "qwen3_next"}, "x/config.json is a qwen3_next model: it needs gated delta attention"),
        (PLAIN, {"model_type": "gpt_oss"}, "is a gpt_oss model: it needs attention sinks"),
        (PLAIN, {}, "x/config.json is a None model"),
    ],
)  # fmt: skip
def test_what_would_be_computed_otherwise_is_refused_by_name(base: dict, more: dict, told: str) -> None:
    assert told in said(base, **more)


DENSE = """--num-layers 4 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 256 --group-query-attention
--num-query-groups 2 --kv-channels 32 --normalization RMSNorm --swiglu
--disable-bias-linear --qk-layernorm --untie-embeddings-and-output-weights
--rotary-base 10000""".split()
MOE = [*DENSE, *"--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 64".split()]
LATENT = """--num-layers 4 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 256 --normalization RMSNorm --swiglu
--disable-bias-linear --qk-layernorm --untie-embeddings-and-output-weights --rotary-base 10000 --multi-latent-attention
--q-lora-rank 64 --kv-lora-rank 32 --qk-head-dim 32 --qk-pos-emb-head-dim 16 --v-head-dim 32 --num-experts 8 --moe-router-topk 2
--moe-ffn-hidden-size 64 --moe-shared-expert-intermediate-size 64 --moe-layer-freq [0]+[1]*3 --moe-router-score-function sigmoid
--moe-router-pre-softmax --moe-router-enable-expert-bias --moe-router-topk-scaling-factor 2.5""".split()


def flags_say(words: list[str], hf: dict) -> str:
    try:
        parse([*words, "--hf-checkpoint", "/hf"], door="convert", facts=Facts(hf_config=hf))
    except ConfigError as wrong:
        return str(wrong)
    return ""


def test_flags_of_the_same_model_are_taken() -> None:
    assert flags_say(DENSE, QWEN3) == flags_say(MOE, QWEN3_MOE) == flags_say(LATENT, DEEPSEEK) == ""
    stretched = {**DEEPSEEK, "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}}
    words = "--rotary-scaling-factor 4 --mscale 0.7 --mscale-all-dim 0.7 --beta-fast 32 --rope-type yarn".split()
    assert flags_say([*LATENT, *words], stretched) == ""


@pytest.mark.parametrize(
    ("words", "more", "hf"),
    [
        (MOE, "--moe-router-score-function sigmoid", QWEN3_MOE),
        (MOE, "--moe-router-pre-softmax", QWEN3_MOE),
        (MOE, "--moe-router-topk-scaling-factor 2.5", QWEN3_MOE),
        (MOE, "--moe-router-enable-expert-bias", QWEN3_MOE),
        (MOE, "--moe-router-num-groups 4", QWEN3_MOE),
        (MOE, "--moe-shared-expert-intermediate-size 64", QWEN3_MOE),
        ([*LATENT, "--moe-router-group-topk", "1"], "--moe-router-num-groups 4", DEEPSEEK),
        (LATENT, "--mscale 0.7", DEEPSEEK),
        (LATENT, "--mscale-all-dim 0.7", DEEPSEEK),
        (LATENT, "--beta-fast 16", DEEPSEEK),
        (LATENT, "--beta-slow 2", DEEPSEEK),
        (LATENT, "--rope-type spiral", DEEPSEEK),
        (DENSE, "--window-size 64,0", QWEN3),
        (DENSE, "--position-embedding-type yarn", QWEN3),
        (DENSE, "--apply-layernorm-1p", QWEN3),
        (DENSE, "--softmax-scale 0.5", QWEN3),
        (DENSE, "--softmax-type learnable", QWEN3),
        (DENSE, "--qk-clip", QWEN3),
        (DENSE, "--qk-clip-threshold 50", QWEN3),
        (DENSE, "--qk-l2-norm", QWEN3),
        (DENSE, "--no-rope-freq 4", QWEN3),
        (DENSE, "--rotary-interleaved", QWEN3),
        (DENSE, "--add-qkv-bias", QWEN3),
        (DENSE, "--rotary-percent 0.5", QWEN3),
        (DENSE, "--kv-lora-rank 16", QWEN3),
        (DENSE, "--attention-output-gate", QWEN3),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_flag_that_would_make_another_model_is_refused_by_name(words: list[str], more: str, hf: dict) -> None:
    message = flags_say([*words, *more.split()], hf)
    assert message and all(flag in message for flag in more.split() if flag.startswith("--"))


def test_an_empty_or_mistyped_config_is_one_line() -> None:
    assert "has no 'num_hidden_layers'" in flags_say([*DENSE, "--vocab-size", "8"], {"model_type": "qwen3"})
    told = flags_say(DENSE, {**QWEN3, "rope_scaling": 3, "num_hidden_layers": "four"})
    assert (
        "num_hidden_layers is 'four', it must be a whole number" in told and "rope_scaling is 3, it must be an object" in told
    )


def test_every_family_is_on_the_page_of_models() -> None:
    page = (ROOT / "docs/en/advanced/checkpoints.md").read_text()
    assert [family for family in FAMILIES if f"`{family}`" not in page] == []
