"""The CPU model's loader on a skeleton of its parameters; no SGLang, no forward pass."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from engine.reference import restore_fp8
from torch import nn

from slime.engine.host_models.loading import WeightLoader
from slime.ops.fp8 import quantize_blockwise

EXPERTS, WIDTH, HIDDEN, HEADS_OUT = 4, 6, 8, 200


class Skeleton(nn.Module):
    """One layer with each way of being split, on one of two ranks."""

    def __init__(self, rank: int, ranks: int):
        super().__init__()
        self.dims = SimpleNamespace(layers=1, rank=rank, ranks=ranks, experts=EXPERTS // ranks)
        layer, mlp, attention = nn.Module(), nn.Module(), nn.Module()
        attention.kv_b_proj = nn.Linear(HIDDEN, HEADS_OUT // ranks, bias=False)
        attention.o_proj = nn.Linear(HEADS_OUT // ranks, HIDDEN, bias=False)
        attention.q_a_proj = nn.Linear(HIDDEN, HEADS_OUT, bias=False)
        mlp.gate_up = nn.Parameter(torch.empty(EXPERTS // ranks, 2 * WIDTH, HIDDEN))
        mlp.down = nn.Parameter(torch.empty(HIDDEN, EXPERTS // ranks, WIDTH))
        layer.self_attn, layer.mlp = attention, mlp
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([layer])
        self.loader = WeightLoader(self, {"quantization_config": {"weight_block_size": [128, 128]}})


def full_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.layers.0.self_attn.kv_b_proj.weight": (HEADS_OUT, HIDDEN),
        "model.layers.0.self_attn.o_proj.weight": (HIDDEN, HEADS_OUT),
        "model.layers.0.self_attn.q_a_proj.weight": (HEADS_OUT, HIDDEN),
    }
    for expert in range(EXPERTS):
        for name, shape in (("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH))):
            shapes[f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight"] = shape
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_gets_its_rows_columns_and_whole_experts(rank):
    weights, model = full_weights(), Skeleton(rank, 2)
    model.loader.load(reversed(list(weights.items())))
    layer, half = model.model.layers[0], HEADS_OUT // 2
    mine = slice(rank * half, (rank + 1) * half)
    assert torch.equal(layer.self_attn.kv_b_proj.weight, weights["model.layers.0.self_attn.kv_b_proj.weight"][mine])
    assert torch.equal(layer.self_attn.o_proj.weight, weights["model.layers.0.self_attn.o_proj.weight"][:, mine])
    assert torch.equal(layer.self_attn.q_a_proj.weight, weights["model.layers.0.self_attn.q_a_proj.weight"])
    for local in range(2):
        expert = f"model.layers.0.mlp.experts.{2 * rank + local}."
        assert torch.equal(layer.mlp.gate_up[local, :WIDTH], weights[f"{expert}gate_proj.weight"])
        assert torch.equal(layer.mlp.gate_up[local, WIDTH:], weights[f"{expert}up_proj.weight"])
        assert torch.equal(layer.mlp.down[:, local], weights[f"{expert}down_proj.weight"])


@pytest.mark.parametrize("scale_first", [False, True])
def test_fp8_is_restored_before_it_is_cut_because_tiles_straddle_ranks(scale_first):
    """200 rows over 2 ranks: rank 1 starts at row 100, inside the first 128-row tile."""
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    weights, model = full_weights(), Skeleton(1, 2)
    weights[name][:128] *= 50  # the two tiles get very different scales
    model.loader.load(weights.items())
    codes, scale = quantize_blockwise(weights[name])
    pair = [(name, codes), (f"{name}_scale_inv", scale)]
    assert model.loader.load(reversed(pair) if scale_first else pair) == {name}
    assert torch.equal(model.model.layers[0].self_attn.kv_b_proj.weight, restore_fp8(codes, scale)[100:])


def test_fused_experts_equal_single_ones():
    weights, single, fused = full_weights(), Skeleton(1, 2), Skeleton(1, 2)
    single.loader.load(weights.items())
    prefix = "model.layers.0.mlp.experts."
    part = lambda e, w: weights[f"{prefix}{e}.{w}_proj.weight"]  # noqa: E731
    rest = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
    rest[f"{prefix}gate_up_proj"] = torch.stack([torch.cat((part(e, "gate"), part(e, "up"))) for e in range(EXPERTS)])
    rest[f"{prefix}down_proj"] = torch.stack([part(e, "down") for e in range(EXPERTS)])
    fused.loader.load(rest.items())
    assert torch.equal(single.model.layers[0].mlp.gate_up, fused.model.layers[0].mlp.gate_up)
    assert torch.equal(single.model.layers[0].mlp.down, fused.model.layers[0].mlp.down)


def test_a_subset_leaves_everything_else_alone_and_the_mtp_layer_is_skipped():
    weights, model = full_weights(), Skeleton(0, 2)
    model.loader.load(weights.items())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    loaded = model.loader.load(
        [
            ("model.layers.0.self_attn.q_a_proj.weight", torch.ones(HEADS_OUT, HIDDEN)),
            ("model.layers.1.eh_proj.weight", torch.ones(3)),
        ]
    )
    assert loaded == {"model.layers.0.self_attn.q_a_proj.weight"}
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert changed == ["model.layers.0.self_attn.q_a_proj.weight"]


def test_what_does_not_fit_is_named():
    weights, model = full_weights(), Skeleton(0, 2)
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    incomplete = {key: tensor for key, tensor in weights.items() if key != name}
    with pytest.raises(ValueError, match="left 1 parameters empty or NaN, first .*kv_b_proj"):
        model.loader.load(incomplete.items())
    model.loader.load(weights.items())
    codes, scale = quantize_blockwise(weights[name])
    with pytest.raises(ValueError, match="1 FP8 weights came without scale and 0 scales without weight .*kv_b_proj"):
        model.loader.load([(name, codes)])
    with pytest.raises(ValueError, match="0 FP8 weights came without scale and 1 scales without weight"):
        model.loader.load([(f"{name}_scale_inv", scale)])
    with pytest.raises(ValueError, match="the model has no tensor 'model.layers.0.self_attn.nonsense.weight'"):
        model.loader.load([("model.layers.0.self_attn.nonsense.weight", torch.ones(1))])
    with pytest.raises(ValueError, match=r"kv_b_proj.weight has shape \(7, 8\); this rank's share of it must be \(100, 8\)"):
        model.loader.load([(name, torch.ones(7, HIDDEN))])
