import pytest
import torch

from slime.model.hf_config import HfConfig
from slime.weights.buckets import fill_buckets, pack_bucket, unpack_bucket
from slime.weights.quantize import WireFormat

# The shape of zai-org/GLM-5.2-FP8's config.json: its exclusion list names `indexers_proj`, which no tensor is called.
GLM = {
    "model_type": "glm_moe_dsa", "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128,
    "num_hidden_layers": 8, "num_attention_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "first_k_dense_replace": 3, "q_lora_rank": 128, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "index_n_heads": 4, "index_head_dim": 128, "index_topk": 16, "index_topk_freq": 4,
    "index_skip_topk_offset": 3, "num_nextn_predict_layers": 1, "dtype": "bfloat16",
}  # fmt: skip
GLM_FP8 = GLM | {
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.indexers_proj"],
    },
}


def test_a_bucket_gives_back_every_tensor_bit_for_bit():
    generator = torch.Generator().manual_seed(3)
    named = [
        ("a", torch.randn(3, 5, generator=generator, dtype=torch.float32)),
        ("b", torch.randn(7, generator=generator).to(torch.bfloat16)),
        ("c", torch.randn(9, 2, generator=generator).to(torch.float8_e4m3fn)),
        ("empty", torch.empty(0, 4)),
        ("transposed", torch.arange(6.0).view(2, 3).t()),
    ]
    back = dict(unpack_bucket(pack_bucket(named)))
    assert list(back) == [name for name, _ in named]
    for name, tensor in named:
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert torch.equal(back[name].contiguous().view(torch.uint8).flatten(), tensor.contiguous().view(torch.uint8).flatten())


def test_buckets_respect_the_limit_and_never_split_a_group():
    # Groups of 40, 40, 40, 200, 40 bytes with a limit of 100: two fit, the third starts anew, the large one is alone.
    groups = [[(f"g{i}.{j}", torch.zeros(size // 8)) for j in range(2)] for i, size in enumerate((40, 40, 40, 200, 40))]
    buckets = list(fill_buckets(iter(groups), limit_bytes=100))
    assert [bucket.names for bucket in buckets] == [
        ("g0.0", "g0.1", "g1.0", "g1.1"),
        ("g2.0", "g2.1"),
        ("g3.0", "g3.1"),
        ("g4.0", "g4.1"),
    ]


def test_modules_that_stay_bf16_are_read_under_both_names_that_engines_know():
    name = "model.layers.0.self_attn.o_proj"
    for key in ("modules_to_not_convert", "ignored_layers"):
        section = GLM_FP8["quantization_config"] | {"modules_to_not_convert": None, key: [name]}
        fp8 = WireFormat.of_checkpoint(HfConfig(GLM | {"quantization_config": section})).fp8_names
        assert f"{name}.weight" not in fp8 and "model.layers.1.self_attn.o_proj.weight" in fp8


@pytest.mark.parametrize(
    ("said", "dtype"),
    [
        ({"dtype": "float32"}, torch.float32),
        ({"torch_dtype": "float32"}, torch.float32),
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, torch.bfloat16),
        ({}, torch.bfloat16),
    ],
)
def test_weights_travel_in_the_type_of_the_serving_checkpoint(said, dtype):
    plain = {name: value for name, value in GLM.items() if name not in ("dtype", "torch_dtype", "quantization_config")}
    assert WireFormat.of_checkpoint(HfConfig(plain | said)).dtype == dtype


def test_a_bucket_size_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="--update-weight-buffer-size is 0"):
        list(fill_buckets([], limit_bytes=0))


@pytest.mark.parametrize(
    ("name", "is_fp8"),
    [
        ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", True),
        ("model.layers.0.self_attn.indexer.wk.weight", True),
        ("model.layers.0.self_attn.indexer.weights_proj.weight", False),
        ("model.layers.5.mlp.experts.3.down_proj.weight", True),
        ("model.layers.5.mlp.shared_experts.gate_proj.weight", True),
        ("model.layers.5.mlp.gate.weight", False),
        ("model.layers.5.input_layernorm.weight", False),
        ("model.layers.8.eh_proj.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_the_released_fp8_checkpoint_decides_what_is_quantised(name, is_fp8):
    assert (name in WireFormat.of_checkpoint(HfConfig(GLM_FP8)).fp8_names) is is_fp8
    assert not WireFormat.of_checkpoint(HfConfig(GLM)).fp8_names


def test_an_encoded_weight_restores_within_half_a_step_of_e4m3():
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    (name, codes), (scale_name, scales) = WireFormat.of_checkpoint(HfConfig(GLM_FP8)).encode(
        "model.layers.0.self_attn.o_proj.weight", weight
    )
    assert (name, scale_name) == ("model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.o_proj.weight_scale_inv")
    assert scales.shape == (2, 3) and scales.dtype == torch.float32
    spread = scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    # e4m3 has 3 mantissa bits: a value is off by at most 1/16 of itself, or half the smallest step (2^-9 scaled) near zero.
    error = (codes.float() * spread - weight).abs()
    assert (error <= weight.abs() / 16 + spread * 2**-10 + 1e-7).all()


def test_the_router_bias_stays_float32_and_the_rest_takes_the_checkpoint_dtype():
    wire = WireFormat.of_checkpoint(HfConfig(GLM_FP8))
    [(_, bias)] = wire.encode("model.layers.3.mlp.gate.e_score_correction_bias", torch.tensor([1.0001]))
    [(_, norm)] = wire.encode("model.norm.weight", torch.tensor([1.0001]))
    assert bias.dtype == torch.float32 and bias.item() == torch.tensor(1.0001).item()
    assert norm.dtype == torch.bfloat16


def test_a_quantisation_that_cannot_be_sent_is_named():
    with pytest.raises(ValueError, match="compressed-tensors.*Serve the BF16 checkpoint"):
        WireFormat.of_checkpoint(HfConfig(GLM | {"quantization_config": {"quant_method": "compressed-tensors"}}))
