"""Rotary position tables from an HF config's rope parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from slime.model.hf_config import HfConfig
from slime.model.stream import Stream


@dataclass(frozen=True)
class RopeTable:
    """width: rotated dimensions of a head. scaling: sorted items of the HF rope parameters, hashable."""

    width: int
    theta: float
    scaling: tuple[tuple[str, object], ...]
    max_positions: int

    @staticmethod
    def for_model(hf: HfConfig) -> RopeTable:
        width = hf["qk_rope_head_dim"] if hf.is_mla else int(hf.head_dim * hf.partial_rotary_factor)
        parameters = hf.rope_parameters
        kind = parameters["rope_type"]
        if kind not in ("default", "yarn", "llama3", "linear"):
            raise ValueError(f"{hf.source}: rope_type {kind!r} is not supported (default, yarn, llama3, linear)")
        scaling = tuple(
            sorted((key, value) for key, value in parameters.items() if isinstance(value, int | float | str | bool))
        )
        return RopeTable(width, hf.rope_theta, scaling, hf.get("max_position_embeddings", 4096))

    def cos_sin(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """float32 [t, width / 2] each, for the stream's local rows; computed once per micro-batch."""
        if self not in stream.tables:
            frequency, magnitude = self.frequencies()
            angle = stream.positions.float()[:, None] * frequency.to(stream.rows.device)
            stream.tables[self] = (angle.cos() * magnitude, angle.sin() * magnitude)
        return stream.tables[self]

    def frequencies(self) -> tuple[Tensor, float]:
        """(inverse frequencies float32 [width / 2], factor on cos and sin)."""
        parameters = dict(self.scaling)
        kind = parameters["rope_type"]
        plain = 1.0 / (self.theta ** (torch.arange(0, self.width, 2, dtype=torch.float32) / self.width))
        if kind == "default":
            return plain, 1.0
        factor = float(parameters["factor"])
        if kind == "linear":
            return plain / factor, 1.0
        if kind == "llama3":
            return _llama3(plain, factor, parameters), 1.0
        return self._yarn(plain, factor, parameters)

    def _yarn(self, plain: Tensor, factor: float, parameters: dict[str, object]) -> tuple[Tensor, float]:
        """YaRN: dimensions that turn often keep their frequency, slow ones are interpolated, a ramp in between."""
        original = int(parameters.get("original_max_position_embeddings") or self.max_positions)

        def dimension(turns: float) -> float:
            return self.width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low = max(math.floor(dimension(float(parameters.get("beta_fast", 32)))), 0)
        high = min(math.ceil(dimension(float(parameters.get("beta_slow", 1)))), self.width - 1)
        ramp = ((torch.arange(self.width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
        mixed = plain / factor * ramp + plain * (1 - ramp)
        mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
        if mscale and all_dim:
            return mixed, yarn_mscale(factor, float(mscale)) / yarn_mscale(factor, float(all_dim))
        return mixed, float(parameters.get("attention_factor") or yarn_mscale(factor, 1.0))

    def softmax_factor(self) -> float:
        """What YaRN multiplies MLA's softmax scale by (1 without YaRN or mscale_all_dim)."""
        parameters = dict(self.scaling)
        all_dim = float(parameters.get("mscale_all_dim", 0) or 0)
        if parameters["rope_type"] != "yarn" or not all_dim:
            return 1.0
        return yarn_mscale(float(parameters["factor"]), all_dim) ** 2


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 mscale ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(plain: Tensor, factor: float, parameters: dict[str, object]) -> Tensor:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, a linear blend in between."""
    original = float(parameters["original_max_position_embeddings"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    turns = original * plain / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / factor * (1 - blend) + plain * blend
