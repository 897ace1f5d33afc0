"""The weight table: counts of the released model, both directions for every family, and exact inverses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model.reference import FAMILIES, make_reference

from slime.model.coverage import unnamed_mtp
from slime.model.hf_config import HfConfig, read_hf_config
from slime.model.hf_io import SafetensorsReader
from slime.model.layout import merge, shard, shard_shape, unmerge, unshard
from slime.model.names import NameTable
from slime_plugins.mbridge.deepseek_v32 import name_table

GLM52 = {
    "model_type": "glm_moe_dsa",
    "vocab_size": 154880,
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 2048,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "head_dim": 192,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "index_topk": 2048,
    "index_head_dim": 128,
    "index_n_heads": 32,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "num_nextn_predict_layers": 1,
    "n_group": 1,
    "topk_group": 1,
    "rms_norm_eps": 1e-5,
    "rope_interleave": True,
    "indexer_rope_interleave": True,
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
}


@pytest.fixture(scope="module")
def table() -> NameTable:
    return NameTable.for_model(GLM52)


def test_the_744b_model_has_the_released_counts(table: NameTable) -> None:
    assert len(table.hf_names()) == 59_585
    assert len(table.hf_names(fp8=True)) == 118_629
    assert table.num_parameters(mtp=False) == 743_377_000_704
    assert table.num_parameters(mtp=True) == 9_952_920_320


def test_the_fp8_checkpoint_has_the_released_bytes(table: NameTable) -> None:
    """755,617,140,416 bytes: e4m3 elements, bf16 rest, float32 biases and scales (one per 128 x 128 tile)."""
    total = 0
    for entry in table.entries:
        for tensor in entry.hf:
            numbers = torch.Size(tensor.shape).numel()
            if tensor.fp8:
                rows, columns = tensor.shape
                total += numbers + 4 * (-(-rows // 128)) * (-(-columns // 128))
            else:
                total += numbers * (4 if entry.float32 else 2)
    assert total == 755_617_140_416


def test_indexers_are_on_the_computing_layers_and_the_mtp_layer(table: NameTable) -> None:
    owners = sorted({int(t.name.split(".")[2]) for e in table.entries for t in e.hf if t.name.endswith("indexer.wk.weight")})
    assert owners == [0, 1, 2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62, 66, 70, 74, 78]


def test_the_indexers_schedule_is_that_of_transformers() -> None:
    """By hand: with frequency 4, offset 3 layers 0, 1, 2, 6 compute; without an offset it is 2, so layers 0, 1, 5 do."""

    def computing(**values: object) -> list[int]:
        hf = HfConfig({**GLM52, "num_hidden_layers": 8, **values}, "x/config.json")
        return [layer for layer in range(8) if hf.runs_indexer(layer)]

    listed = ["full", "full", "shared", "full", "shared", "shared", "shared", "full"]
    assert computing() == [0, 1, 2, 6]
    assert computing(index_skip_topk_offset=None) == [0, 1, 5]
    assert computing(index_topk_freq=None, index_skip_topk_offset=None) == list(range(8))
    assert computing(index_topk_freq=None, indexer_types=listed) == [0, 1, 3, 7]
    assert computing(index_topk_freq=None, index_topk_pattern="FFSFSSSF") == [0, 1, 3, 7]
    for values, told in (
        ({"index_skip_topk_offset": 0}, "layer 0 would reuse the indices of an earlier layer"),
        ({"indexer_types": listed}, "names other layers than index_topk_freq 4 with index_skip_topk_offset 3"),
        ({"index_topk_freq": None, "indexer_types": listed[:7]}, "must say full or shared for each of the 8 layers"),
        ({"index_topk_freq": None, "indexer_types": ["full"] * 7 + ["half"]}, "must say full or shared"),
    ):
        with pytest.raises(ValueError, match=f"x/config.json: .*{told}"):
            computing(**values)


def test_what_an_engine_fuses_travels_together(table: NameTable) -> None:
    groups: dict[str, list[str]] = {}
    for entry in table.entries:
        if entry.together:
            groups.setdefault(entry.together, []).extend(tensor.name.split(".", 3)[3] for tensor in entry.hf)
    assert set(map(tuple, groups.values())) == {
        ("self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"),
        ("self_attn.indexer.wk.weight", "self_attn.indexer.weights_proj.weight"),
    }
    assert len(groups) == 79 + 22


def test_names_go_both_ways(table: NameTable) -> None:
    entry = table["decoder.layers.3.mlp.experts.linear_fc1.weight17"]
    assert [tensor.name for tensor in entry.hf] == [
        f"model.layers.3.mlp.experts.17.{half}_proj.weight" for half in ("gate", "up")
    ]
    assert table.by_hf("model.layers.3.mlp.experts.17.up_proj.weight") is entry
    assert (
        table["mtp.layers.0.transformer_layer.self_attention.wq_b.weight"].hf[0].name
        == "model.layers.78.self_attn.indexer.wq_b.weight"
    )
    assert table.by_hf("model.layers.3.self_attn.indexer.wq_b.weight") is None  # a shared layer
    with pytest.raises(ValueError, match="decoder.layers.99.input_layernorm.weight is not in the glm_moe_dsa weight table"):
        table["decoder.layers.99.input_layernorm.weight"]


def test_the_dsa_bridge_is_for_dsa_models() -> None:
    assert len(name_table(GLM52).hf_names()) == 59_585
    assert name_table({**GLM52, "model_type": "deepseek_v32"}).model_type == "deepseek_v32"
    with pytest.raises(ValueError, match="is a qwen3 model; this bridge is for deepseek_v32 and glm_moe_dsa"):
        name_table({**GLM52, "model_type": "qwen3"})


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(ValueError, match="is a mamba model: no weight-name table knows it"):
        NameTable.for_model({"model_type": "mamba"})
    with pytest.raises(ValueError, match="is a gpt_oss model: it needs attention sinks, .* which no layer here has"):
        NameTable.for_model({"model_type": "gpt_oss"})


def test_a_missing_field_is_named_with_its_file() -> None:
    with pytest.raises(ValueError, match="x/config.json has no 'kv_lora_rank'"):
        HfConfig({"model_type": "glm_moe_dsa"}, "x/config.json")["kv_lora_rank"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_transformers_checkpoint_is_in_the_table_once(family: str, tmp_path: Path) -> None:
    make_reference(family, tmp_path)
    reader, table = SafetensorsReader(tmp_path), NameTable.for_model(read_hf_config(tmp_path))
    assert sorted(reader.names()) == sorted(table.hf_names())
    for entry in table.entries:
        pieces = [reader.raw(tensor.name) for tensor in entry.hf]
        whole = merge(entry, pieces)
        assert tuple(whole.shape) == entry.shape, entry.name
        assert all(torch.equal(a, b) for a, b in zip(unmerge(entry, whole), pieces, strict=True)), entry.name
        # 2 divides everything in these models.
        for size in (1, 2):
            padded = 128 if entry.split == "vocab" else None
            parts = [shard(entry, whole, rank, size, padded_vocab=padded) for rank in range(size)]
            assert all(tuple(part.shape) == shard_shape(entry, size, padded_vocab=padded) for part in parts), entry.name
            assert torch.equal(unshard(entry, parts), whole), entry.name


def test_kimi_and_mimo_are_named_as_the_models_that_they_extend() -> None:
    """Kimi-K2's layers are DeepSeek-V3's, MiMo's are Qwen2's; only MiMo's multi-token-prediction layer is its own."""
    kimi = {**GLM52, "model_type": "kimi_k2", "num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 2}
    assert NameTable.for_model(kimi).entries == NameTable.for_model({**kimi, "model_type": "deepseek_v3"}).entries
    mimo = {
        "model_type": "mimo", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "attention_bias": True,
        "num_nextn_predict_layers": 1,
    }  # fmt: skip
    table = NameTable.for_model(mimo)
    assert table.entries == NameTable.for_model({**mimo, "model_type": "qwen2"}, with_mtp=False).entries
    layer = {f"model.mtp_layers.0.{name}.weight" for name in ("token_layernorm", "input_proj", "self_attn.q_proj")}
    assert unnamed_mtp(table, layer | set(table.hf_names())) == layer


def test_query_groups_lie_together_in_linear_qkv() -> None:
    """By hand: 2 groups of 2 query heads, width 1; heads q0 q1 | k0 | v0 | q2 q3 | k1 | v1."""
    config = {
        "model_type": "qwen3",
        "vocab_size": 8,
        "hidden_size": 1,
        "intermediate_size": 2,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 1,
    }
    entry = NameTable.for_model(config)["decoder.layers.0.self_attention.linear_qkv.weight"]
    q, k, v = torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[10.0], [11]]), torch.tensor([[20.0], [21]])
    assert merge(entry, [q, k, v]).flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_gate_and_up_are_cut_separately() -> None:
    """By hand: rank 0 of 2 holds the first half of gate and the first half of up."""
    config = {
        "model_type": "qwen3",
        "vocab_size": 8,
        "hidden_size": 1,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 1,
    }
    entry = NameTable.for_model(config)["decoder.layers.0.mlp.linear_fc1.weight"]
    whole = torch.arange(8.0)[:, None]
    assert shard(entry, whole, 0, 2).flatten().tolist() == [0, 1, 4, 5]
    assert shard(entry, whole, 1, 2).flatten().tolist() == [2, 3, 6, 7]
    with pytest.raises(ValueError, match="4 rows cannot be split over 3 ranks"):
        shard(entry, whole, 0, 3)
