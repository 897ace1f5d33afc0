"""Which tensors travel as block FP8, decided by the serving checkpoint's own config."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slime.model.hf_config import HfConfig
from slime.model.names import NameTable
from slime.ops.fp8 import quantize_blockwise
from slime.weights.wire import Format

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class WireFormat:
    """How tensors look on the way to the engine: the dtype of the serving checkpoint, and its FP8 block if it has one."""

    dtype: torch.dtype
    fp8_block: int | None
    fp8_names: frozenset[str]
    float32_names: frozenset[str]
    """Router biases: routing picks experts by differences of a few bf16 units in the last place."""

    @staticmethod
    def of_checkpoint(hf_config: HfConfig) -> WireFormat:
        """From the serving checkpoint's config. Raises ValueError for a quantisation that the stream cannot carry.

        The names come from the model's table and not from the checkpoint's own list of what is left out: the one of
        zai-org/GLM-5.2-FP8 names `indexers_proj`, which no tensor is called.
        """
        table = NameTable.for_model(hf_config)
        form = Format.of(hf_config)
        dtype = _DTYPES[form.dtype]
        float32_names = frozenset(tensor.name for entry in table.entries if entry.float32 for tensor in entry.hf)
        quantization = hf_config.get("quantization_config")
        if not quantization:
            return WireFormat(dtype, None, frozenset(), float32_names)
        method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
        if method != "fp8" or quantization.get("fmt", "e4m3") != "e4m3" or not block or block[0] != block[1]:
            raise ValueError(
                f"the serving checkpoint is quantised as {dict(quantization)!r:.200}; weights can be sent as bf16, or as "
                "fp8 e4m3 in square blocks (quant_method fp8, weight_block_size [128, 128]). Serve the BF16 checkpoint by "
                "pointing --hf-checkpoint at it."
            )
        fp8_names = frozenset(tensor.name for tensor in table.hf_tensors() if form.is_fp8(tensor))
        return WireFormat(dtype, int(block[0]), fp8_names, float32_names)

    def encode(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """One trained tensor as the one or two tensors an engine loads: `name`, and `name_scale_inv` where it is FP8."""
        if name in self.fp8_names:
            codes, scale_inv = quantize_blockwise(tensor, self.fp8_block)
            yield name, codes
            yield f"{name}_scale_inv", scale_inv
        else:
            yield name, tensor.to(torch.float32 if name in self.float32_names else self.dtype)

    def encode_group(self, group: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        return [encoded for name, tensor in group for encoded in self.encode(name, tensor)]
