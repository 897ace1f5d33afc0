"""Checkpoint names into the parameters of `glm_moe_dsa`: any subset, any order, BF16/FP32 or block FP8."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slime.ops.fp8 import dequantize_blockwise

if TYPE_CHECKING:
    from slime.engine.host_models.glm_moe_dsa import SlimeGlmMoeDsaForCausalLM

SCALE = "_scale_inv"
LAYER = re.compile(r"model\.layers\.(\d+)\.")
EXPERT = re.compile(r"(model\.layers\.\d+\.mlp)\.experts\.(?:(\d+)\.)?(gate_proj|up_proj|down_proj|gate_up_proj)(?:\.weight)?$")
# The axis along which a matrix is split over tensor-parallel ranks; everything else is whole on every rank.
SPLIT_AXIS = {"q_b_proj": 0, "kv_b_proj": 0, "o_proj": 1, "gate_proj": 0, "up_proj": 0, "down_proj": 1}


class WeightLoader:
    """Copies tensors into place name by name; nothing derived is kept, so a bucket of an update may hold any of them."""

    def __init__(self, model: SlimeGlmMoeDsaForCausalLM, source: dict[str, Any]):
        self.model = model
        self.dims = model.dims
        self.block = int((source.get("quantization_config") or {}).get("weight_block_size", [128])[0])
        self.complete = False
        # A parameter that the checkpoint did not fill would answer with whatever the memory held.
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
            parameter.requires_grad_(False)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Returns the names that were copied. An FP8 weight and its scale must come in the same call, in either order.

        Raises ValueError for a name that the model does not have, a wrong shape, an FP8 weight without scale, and after
        the first call (the checkpoint) for a parameter that stayed empty. Names of the MTP layer are skipped: this
        engine does not speculate.
        """
        loaded: set[str] = set()
        codes: dict[str, Tensor] = {}
        scales: dict[str, Tensor] = {}
        for name, tensor in weights:
            if self._belongs_to_mtp(name):
                continue
            if name.endswith(SCALE):
                scales[name.removesuffix(SCALE)] = tensor
            elif tensor.element_size() == 1:
                codes[name] = tensor
            else:
                self._copy(name, tensor)
                loaded.add(name)
                continue
            base = name.removesuffix(SCALE)
            if base in codes and base in scales:
                self._copy(base, self._restore(codes.pop(base), scales.pop(base)))
                loaded.add(base)
        if codes or scales:
            raise ValueError(
                f"{len(codes)} FP8 weights came without scale and {len(scales)} scales without weight in one load call, "
                f"first {sorted([*codes, *scales])[0]!r}: send a weight and its {SCALE[1:]} in the same bucket"
            )
        if not self.complete:
            self._require_complete()
        return loaded

    def _belongs_to_mtp(self, name: str) -> bool:
        layer = LAYER.match(name)
        return layer is not None and int(layer[1]) >= self.dims.layers

    def _restore(self, codes: Tensor, scale: Tensor) -> Tensor:
        """FP8 -> float32; a fused [experts, out, in] tensor is restored expert by expert."""
        if codes.dim() == 3:
            return torch.stack([self._restore(*pair) for pair in zip(codes, scale, strict=True)])
        return dequantize_blockwise(codes, scale, self.block, torch.float32)

    def _copy(self, name: str, tensor: Tensor) -> None:
        expert = EXPERT.match(name)
        if expert is None:
            target, part = self.view(name), self._shard(name, tensor)
        else:
            target, part = self.view(name), self._expert_shard(expert, tensor)
            if target is None:
                return
        if target.shape != part.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; this rank's share of it must be {tuple(target.shape)}")
        target.copy_(part)

    def view(self, name: str) -> Tensor | None:
        """The storage behind a checkpoint name on this rank; None when its expert lives on another rank."""
        expert = EXPERT.match(name)
        try:
            if expert is None:
                return self.model.get_parameter(name).data
            experts = self.model.get_submodule(expert[1])
            gate_up, down = experts.gate_up.data, experts.down.data.transpose(0, 1)
        except AttributeError as error:
            raise ValueError(f"the model has no tensor {name!r} ({error})") from None
        which = expert[3]
        if expert[2] is None:
            return down if which == "down_proj" else gate_up
        local = int(expert[2]) - self.dims.rank * self.dims.experts
        if not 0 <= local < self.dims.experts:
            return None
        gate, up = gate_up[local].chunk(2)
        return {"down_proj": down[local], "gate_proj": gate, "up_proj": up}[which]

    def _shard(self, name: str, tensor: Tensor) -> Tensor:
        module = name.split(".")[-2] if "." in name else name
        if self.dims.ranks == 1 or module not in SPLIT_AXIS:
            return tensor
        return tensor.chunk(self.dims.ranks, SPLIT_AXIS[module])[self.dims.rank]

    def _expert_shard(self, expert: re.Match, tensor: Tensor) -> Tensor:
        """Whole experts: a 2-D tensor is one of them, a fused 3-D tensor holds all."""
        if expert[2] is not None:
            return tensor
        return tensor.chunk(self.dims.ranks, 0)[self.dims.rank]

    def _require_complete(self) -> None:
        empty = [name for name, parameter in self.model.named_parameters() if parameter.isnan().any()]
        if empty:
            raise ValueError(f"the checkpoint left {len(empty)} parameters empty or NaN, first {empty[:3]}")
        self.complete = True
