"""The tiny checkpoints are what they say: GLM-5.2's layout, loadable by transformers, FP8 close to BF16, a tokenizer that
round-trips."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from slime.ops.fp8 import dequantize_blockwise
from tools import make_tiny_checkpoint as tool
from tools.tiny_tokenizer import WORDS

ROOT = Path(tool.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tool.main(["--preset", "cpu", "--output", str(folder), "--seed", "3"])
    return folder / "bf16", folder / "fp8"


def tensors_of(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for file_name in sorted(set(index["weight_map"].values())):
        with safe_open(folder / file_name, "pt") as file:
            for name in file.keys():
                assert index["weight_map"][name] == file_name
                found[name] = file.get_tensor(name)
    assert found.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())
    return found


def test_the_fp8_twin_restores_to_the_bf16_weights_and_keeps_the_rest(pair):
    bf16, fp8 = map(tensors_of, pair)
    scales = {name for name in fp8 if name.endswith("weight_scale_inv")}
    assert fp8.keys() - scales == bf16.keys()
    quantised = {name for name in bf16 if fp8[name].dtype == torch.float8_e4m3fn}
    assert scales == {name.removesuffix("weight") + "weight_scale_inv" for name in quantised}
    for name, weight in bf16.items():
        if name not in quantised:
            assert torch.equal(fp8[name], weight), name
            continue
        scale = fp8[name.removesuffix("weight") + "weight_scale_inv"]
        assert scale.dtype == torch.float32 and scale.shape == tuple(-(-n // 128) for n in weight.shape)
        restored = dequantize_blockwise(fp8[name], scale, dtype=torch.float32)
        # e4m3 keeps 3 bits after the leading one: a relative error of 2^-4, and 2^-10 of the tile's largest for tiny values.
        bound = weight.float().abs() / 16 + weight.float().abs().max() / 1024
        assert ((restored - weight.float()).abs() <= bound).all(), name


def test_what_stays_in_bf16_is_what_the_release_keeps(pair):
    fp8 = tensors_of(pair[1])
    kept = {name.split(".", 3)[-1] if ".layers." in name else name for name, t in fp8.items() if t.dtype == torch.bfloat16}
    assert kept == {
        "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_a_layernorm.weight",
        "self_attn.kv_a_layernorm.weight", "self_attn.indexer.k_norm.weight", "self_attn.indexer.k_norm.bias",
        "self_attn.indexer.weights_proj.weight", "mlp.gate.weight", "eh_proj.weight", "enorm.weight", "hnorm.weight",
        "shared_head.norm.weight", "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight",
    }  # fmt: skip
    single = {name for name, t in fp8.items() if t.dtype == torch.float32 and not name.endswith("scale_inv")}
    assert single == {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in range(3, 9)}


def test_indexers_sit_on_computing_layers_and_the_mtp_layer_only(pair):
    names = tensors_of(pair[0])
    with_indexer = {int(name.split(".")[2]) for name in names if ".indexer." in name}
    assert with_indexer == {0, 1, 2, 6, 8}  # freq 4, offset 3; 8 is the MTP layer
    config = json.loads((pair[0] / "config.json").read_text())
    assert config["indexer_types"] == ["full", "full", "full", "shared", "shared", "shared", "full", "shared"]
    assert config["index_topk"] < 20 and config["rope_parameters"]["rope_theta"] == 8000000
    assert "quantization_config" not in config
    assert names["model.layers.3.mlp.experts.7.down_proj.weight"].shape == (128, 64)


def test_the_exclusion_list_has_the_releases_541_entries_at_78_layers():
    from dataclasses import replace

    size = replace(tool.PRESETS["cpu"].size, num_hidden_layers=78)
    specs = list(tool.glm_tensors(size, 320))
    listed = tool.quantization_config(specs)["modules_to_not_convert"]
    assert len(listed) == 541 and sum(name.endswith("indexers_proj") for name in listed) == 22
    assert tool.indexer_types(size).count("full") == 21


@pytest.mark.slow
def test_transformers_runs_it_and_an_untrained_model_knows_nothing(pair):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    assert type(model).__name__ == "GlmMoeDsaForCausalLM"
    written = tensors_of(pair[0])
    fused = model.state_dict()["model.layers.4.mlp.experts.gate_up_proj"][5]
    prefix = "model.layers.4.mlp.experts.5."
    parts = [written[prefix + "gate_proj.weight"], written[prefix + "up_proj.weight"]]
    assert torch.equal(fused, torch.cat(parts).float())
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    ids = torch.tensor([tokenizer.encode("[gMASK]<sop><|user|>What is the sum of 3 plus 4?<|assistant|>\\boxed{7}" * 3)])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert abs(loss - torch.tensor(320.0).log().item()) < 0.2


def test_the_tokenizer_round_trips_anything_and_makes_answers_short(pair):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    for text in ("\\boxed{17}", "héllo  wörld\n\t中文 🤖 12345", "<|user|>x<|assistant|>", " plus plus", "", "".join(WORDS)):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("\\boxed{17}<|endoftext|>", add_special_tokens=False)]
    assert pieces == ["\\boxed{", "1", "7", "}", "<|endoftext|>"]
    config = json.loads((pair[0] / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"] == 320
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"])
    generation = json.loads((pair[0] / "generation_config.json").read_text())
    assert config["eos_token_id"] == generation["eos_token_id"] == stops
    assert tokenizer.pad_token_id == config["pad_token_id"] == stops[0]


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(pair, tmp_path):
    tool.main(["--preset", "cpu", "--output-bf16", str(tmp_path / "again"), "--seed", "3", "--max-shard-bytes", "300000"])
    tool.main(["--preset", "cpu", "--output-bf16", str(tmp_path / "other"), "--seed", "4"])
    first, again, other = (tensors_of(folder) for folder in (pair[0], tmp_path / "again", tmp_path / "other"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("name", ["thesis.txt", "config.json"])
def test_a_folder_that_the_tool_did_not_make_is_left_alone_a_real_checkpoint_too(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="was not made by this tool"):
        tool.main(["--preset", "qwen3", "--output-bf16", str(tmp_path)])
    assert (tmp_path / name).read_text() == "mine"


def test_an_earlier_folder_of_its_own_is_replaced(tmp_path):
    folder = tmp_path / "qwen3"
    tool.main(["--preset", "qwen3", "--output-bf16", str(folder), "--seed", "1"])
    first = tensors_of(folder)
    (folder / "left.txt").touch()
    tool.main(["--preset", "qwen3", "--output-bf16", str(folder), "--seed", "2"])
    assert not (folder / "left.txt").exists()
    assert not torch.equal(first["model.embed_tokens.weight"], tensors_of(folder)["model.embed_tokens.weight"])


def test_the_kernel_compatible_preset_has_the_dimensions_that_the_kernels_need():
    size = tool.PRESETS["h200"].size
    assert (size.num_attention_heads, size.kv_lora_rank, size.qk_rope_head_dim) == (64, 512, 64)
    assert (size.index_topk, size.index_head_dim, size.index_n_heads) == (2048, 128, 32)
    assert size.max_position_embeddings > 2 * size.index_topk
    shapes = {spec.name: spec.shape for spec in tool.glm_tensors(size, 320)}
    assert shapes["model.layers.0.self_attn.kv_b_proj.weight"] == (64 * (192 + 256), 512)


def test_the_command_line_wants_a_place_to_write():
    command = [sys.executable, str(ROOT / "tools" / "make_tiny_checkpoint.py"), "--preset", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "say where to write" in done.stderr


@pytest.mark.slow
def test_the_tiny_qwen3_loads_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    tool.main(["--preset", "qwen3", "--output-bf16", str(tmp_path / "q")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in tensors_of(tmp_path / "q").values())
