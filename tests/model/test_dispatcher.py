"""Tokens reach their experts as megatron-core's dispatcher sends them, and come back as it adds them."""

from __future__ import annotations

import pytest
import torch
from model.parity import build
from ranks import run_ranks

from slime.model.dispatcher import Dispatcher


def both_ways(rank: int, folder: str, layout: dict) -> list[list[torch.Tensor]]:
    """Output and gradients of one MoE layer by our dispatcher, then by the one that it was made from."""
    world = layout.get("ep", 1) * layout.get("tp", 1)
    chunks, *_ = build(rank, world, folder, **layout)
    layer = next(module for module in chunks[0].modules() if hasattr(module, "token_dispatcher"))
    assert type(layer.token_dispatcher) is Dispatcher
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(13, 1, layer.config.hidden_size, generator=generator).requires_grad_()
    direction, told = torch.randn(hidden.shape, generator=generator), []
    for kind in (Dispatcher, Dispatcher.__base__):
        layer.token_dispatcher.__class__ = kind
        out, _ = layer(hidden)
        told.append([out.detach(), *torch.autograd.grad(out, [hidden, *layer.experts.parameters()], direction)])
    return told


@pytest.mark.parametrize("layout", [{}, {"ep": 2}, {"tp": 2, "etp": 2}], ids=["alone", "EP2", "expert-TP2"])
def test_float32_rows_are_those_of_megatron_core_to_the_bit(glm, layout):
    world = layout.get("ep", 1) * layout.get("tp", 1)
    for ours, published in run_ranks(world, both_ways, glm, layout):
        assert len(ours) == 4
        for mine, theirs in zip(ours, published, strict=True):
            assert torch.equal(mine, theirs) and mine.abs().sum() > 0
