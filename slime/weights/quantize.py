"""Which tensors travel as block FP8, decided by the serving checkpoint's own config."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slime.ops.fp8 import quantize_blockwise

# The linear layers of the released FP8 checkpoints (GLM-5.x, DeepSeek-V3.x, Qwen3), by the last parts of their names. A list of what is
# quantised, not of what is not: the exclusion list of zai-org/GLM-5.2-FP8 names `indexers_proj`, which no tensor is called, so taking
# it literally would quantise `indexer.weights_proj`.
_FP8_LINEAR = re.compile(
    r"\.(self_attn\.(q_proj|k_proj|v_proj|o_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|indexer\.wq_b|indexer\.wk)"
    r"|mlp\.(gate_proj|up_proj|down_proj|gate_up_proj)"
    r"|mlp\.shared_experts?\.(gate_proj|up_proj|down_proj)"
    r"|mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj))\.weight$"
)
# Routing picks experts by differences of a few bf16 units in the last place: rounding this bias would reorder them.
_KEPT_FLOAT32 = re.compile(r"\.e_score_correction_bias$")

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class WireFormat:
    """How tensors look on the way to the engine: the dtype of the serving checkpoint, and its FP8 block if it has one."""

    dtype: torch.dtype
    fp8_block: int | None
    kept: tuple[str, ...] = ()

    @staticmethod
    def of_checkpoint(hf_config: Mapping[str, object]) -> WireFormat:
        """From a checkpoint's config.json as a dict. Raises ValueError for a quantisation the engines' stream cannot carry."""
        dtype = _DTYPES[str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "bfloat16")]
        quantization = hf_config.get("quantization_config")
        if not quantization:
            return WireFormat(dtype, None)
        method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
        if method != "fp8" or quantization.get("fmt", "e4m3") != "e4m3" or not block or block[0] != block[1]:
            raise ValueError(
                f"the serving checkpoint is quantised as {dict(quantization)!r:.200}; weights can be sent as bf16, or as fp8 e4m3 in square "
                "blocks (quant_method fp8, weight_block_size [128, 128]). Serve the BF16 checkpoint by pointing --hf-checkpoint at it."
            )
        return WireFormat(dtype, int(block[0]), tuple(quantization.get("modules_to_not_convert") or ()))

    def is_fp8(self, name: str) -> bool:
        return self.fp8_block is not None and _FP8_LINEAR.search(name) is not None and name.removesuffix(".weight") not in self.kept

    def encode(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """One trained tensor as the one or two tensors an engine loads: `name`, and `name_scale_inv` where it is FP8."""
        if self.is_fp8(name):
            codes, scale_inv = quantize_blockwise(tensor, self.fp8_block)
            yield name, codes
            yield f"{name}_scale_inv", scale_inv
        else:
            yield name, tensor.to(torch.float32 if _KEPT_FLOAT32.search(name) else self.dtype)

    def encode_group(self, group: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        return [encoded for name, tensor in group for encoded in self.encode(name, tensor)]
