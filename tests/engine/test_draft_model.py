"""What a trainer with --enable-mtp-training streams is what SGLang's draft model of GLM-5.2 loads, each tensor in one place."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from engine.reference import restore_fp8
from engine.stock_glm import FRESH, load_on_ranks
from model.parity import build
from ranks import run_ranks

from slime.model.export import export_weights
from slime.model.hf_config import read_hf_config
from slime.model.names import NameTable
from slime.weights.buckets import fill_buckets, unpack_bucket
from slime.weights.quantize import WireFormat
from tools.make_tiny_checkpoint import GlmSize, Preset, write_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed"),
]

LAYERS, EXPERTS = 4, 4
# SGLang wants whole FP8 blocks of 128 in experts, and where it joins matrices.
SIZE = GlmSize(
    num_hidden_layers=LAYERS, intermediate_size=128, moe_intermediate_size=128, q_lora_rank=128, n_routed_experts=EXPERTS
)
SHARED_WITH_THE_TARGET = {"model.embed_tokens.weight", "lm_head.weight"}
KV_SCALES = {f"model.decoder.self_attn.{kind}.{which}_scale" for kind in ("attn_mqa", "attn_mha") for which in "kv"}

Named = dict[str, torch.Tensor]


def stream(rank: int, weights: str, served: str, into: Path) -> None:
    """The updates of one sync, small ones: a list of lists of (name, tensor)."""
    chunks, ranks, *_ = build(rank, 1, weights, mtp=True)
    hf = read_hf_config(served)
    wire = WireFormat.of_checkpoint(hf)
    groups = (wire.encode_group(group) for group in export_weights(chunks, NameTable.for_model(hf), ranks) if group)
    buckets = fill_buckets(groups, limit_bytes=100_000)
    torch.save([[(name, tensor.clone()) for name, tensor in unpack_bucket(bucket)] for bucket in buckets], into)


CASES = {"FP8 as on CUDA": ("fp8", True), "FP8, key and gates apart": ("fp8", False), "BF16 as on CUDA": ("bf16", True)}
"""(serving checkpoint, indexer's key and gate projections are one matrix)"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list, Named]]:
    """Case -> (updates, what the draft model holds after them); one process loads them all, since SGLang imports slowly."""
    folder, words = tmp_path_factory.mktemp("draft"), []
    for kind in ("bf16", "fp8"):
        write_checkpoint(folder / kind, Preset("glm", SIZE, 1 << 20), seed=0, fp8=kind == "fp8")
        run_ranks(1, stream, str(folder / "bf16"), str(folder / kind), folder / f"{kind}.pt")
    for number, (kind, fused) in enumerate(CASES.values()):
        words += [str(folder / kind), "draft", str(int(fused)), str(folder / f"{kind}.pt"), str(folder / f"held-{number}.pt")]
    load_on_ranks(folder, "recipe", [words])
    return {
        case: (torch.load(folder / f"{kind}.pt"), torch.load(folder / f"held-{number}.pt"))
        for number, (case, (kind, _)) in enumerate(CASES.items())
    }


def wanted(sent: Named, *, fused: bool, fp8: bool) -> tuple[Named, list[str]]:
    """(what each of the draft model's parameters must hold, the tensors it is made of): written down from its forward."""
    used: list[str] = []

    def take(*names: str) -> torch.Tensor:
        full = [f"model.layers.{LAYERS}.{name}" for name in names]
        used.extend(full)
        return torch.cat([sent[name] for name in full]) if len(full) > 1 else sent[full[0]]

    result = {}
    for suffix in ("weight", "weight_scale_inv") if fp8 else ("weight",):

        def joined(into: str, *names: str, suffix: str = suffix) -> None:
            result[f"model.decoder.{into}.{suffix}"] = take(*(f"{name}.{suffix}" for name in names))

        joined("self_attn.fused_qkv_a_proj_with_mqa", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
        for name in ("q_b_proj", "kv_b_proj", "o_proj", "indexer.wq_b"):
            joined(f"self_attn.{name}", f"self_attn.{name}")
        joined("mlp.shared_experts.gate_up_proj", "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
        joined("mlp.shared_experts.down_proj", "mlp.shared_experts.down_proj")
        for into, names in (("w13", ("gate_proj", "up_proj")), ("w2", ("down_proj",))):
            result[f"model.decoder.mlp.experts.{into}_{suffix}"] = torch.stack(
                [take(*(f"mlp.experts.{expert}.{name}.{suffix}" for name in names)) for expert in range(EXPERTS)]
            )
        if not fused:
            joined("self_attn.indexer.wk", "self_attn.indexer.wk")
    indexer = "self_attn.indexer"
    gates = take(f"{indexer}.weights_proj.weight")
    if fused:
        key = take(f"{indexer}.wk.weight")
        key = restore_fp8(key, take(f"{indexer}.wk.weight_scale_inv")) if fp8 else key
        result[f"model.decoder.{indexer}.wk_weights_proj.weight"] = torch.cat([key.to(torch.bfloat16), gates])
    else:
        result[f"model.decoder.{indexer}.weights_proj.weight"] = gates
    norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm")
    for name in (*(f"{norm}.weight" for norm in norms), f"{indexer}.k_norm.weight", f"{indexer}.k_norm.bias",
                 "mlp.gate.weight", "mlp.gate.e_score_correction_bias"):  # fmt: skip
        result[f"model.decoder.{name}"] = take(name)
    for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"):
        result[f"model.{name}"] = take(name)
    return result, used


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_of_the_layer_goes_into_one_parameter_and_none_stays_as_it_was(case, loaded):
    (kind, fused), (buckets, held) = CASES[case], loaded[case]
    sent = {name: tensor for bucket in buckets for name, tensor in bucket}
    assert len(buckets) > 5 and len(sent) == sum(map(len, buckets))
    expected, used = wanted(sent, fused=fused, fp8=kind == "fp8")
    assert sorted(used) == sorted(name for name in sent if name.startswith(f"model.layers.{LAYERS}."))
    untouched = {name for name, tensor in held.items() if (tensor.reshape(-1).view(torch.uint8) == FRESH).all()}
    assert untouched == SHARED_WITH_THE_TARGET | (KV_SCALES & held.keys())
    assert held.keys() - untouched == expected.keys()
    for name, tensor in expected.items():
        assert held[name].shape == tensor.shape, name
        assert torch.equal(held[name].float(), tensor.to(held[name].dtype).float()), name
