"""Tensors of a Hugging Face checkpoint, BF16 or block FP8: of a format that is known, or refused by file and name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slime.model.hf_config import read_hf_config
from slime.model.hf_headers import stored_tensors
from slime.model.names import HfTensor
from slime.ops.fp8 import dequantize_blockwise, scale_shape

_FLOATS = ("BF16", "F16", "F32")
_SCALES = ("F32", "BF16", "F16", "F8_E8M0")


class SafetensorsReader:
    """All tensors of a checkpoint folder by name, whichever file they are in; files are opened once and read lazily.

    Raises ValueError, naming the file, for a folder whose headers or index are not whole.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is not a folder; --hf-checkpoint wants a Hugging Face checkpoint")
        self._stored = stored_tensors(self.folder)
        self._open: dict[str, object] = {}
        self._quantization = _quantization(self.folder)
        self._block = tuple(self._quantization.get("weight_block_size") or (128, 128))

    @property
    def block(self) -> int:
        """Rows and columns of the tile that has one FP8 scale."""
        return int(self._block[0])

    @property
    def promises_fp8(self) -> bool:
        """config.json says that matrices are FP8."""
        return self._quantization.get("quant_method") == "fp8"

    def names(self) -> list[str]:
        return list(self._stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def is_fp8(self, name: str) -> bool:
        return self._stored[name].dtype.startswith("F8")

    def raw(self, name: str) -> Tensor:
        """As stored."""
        if name not in self._stored:
            raise ValueError(f"{self.folder} has no tensor {name}")
        file = self._stored[name].file
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            return self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as torn:
            raise ValueError(f"{self.folder / file}: {name} cannot be read ({torn}); download the file again") from None

    def read(self, tensor: HfTensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """De-quantised to `dtype` when stored as FP8, as stored otherwise.

        Raises ValueError naming file and tensor for a format that is not known (see `fault`) and for NaN or infinite values.
        """
        if tensor.name in self and (wrong := self.fault(tensor)):
            raise ValueError(f"{self.folder}/{wrong}")
        values = self.raw(tensor.name)
        if self.is_fp8(tensor.name):
            values = dequantize_blockwise(values, self._scales(tensor.scale_name), self.block, dtype)
        # The extremes are NaN where any value is, and cost no memory.
        if values.numel() and not all(extreme.isfinite() for extreme in torch.aminmax(values)):
            file = self.folder / self._stored[tensor.name].file
            raise ValueError(f"{file}: {tensor.name} holds NaN or infinite values; is the file damaged?")
        return values

    def fault(self, tensor: HfTensor) -> str | None:
        """Why a stored tensor cannot be taken, with its file; None when it can. Reads nothing: headers and config decide."""
        stored, scale = self._stored[tensor.name], self._stored.get(tensor.scale_name)
        where = f"{stored.file}: {tensor.name}"
        if stored.dtype in _FLOATS:
            beside = f"{where} is {stored.dtype} and has a scale beside it, {tensor.scale_name}; which of them is true?"
            return beside if scale else None
        if stored.dtype != "F8_E4M3":
            return f"{where} is {stored.dtype}; BF16, F16, F32 and F8_E4M3 with block scales are read: take such a release"
        if not tensor.fp8:
            return f"{where} is F8_E4M3, and this model's is never quantised; take a release with it in BF16"
        if not self._quantization:
            return f"{where} is FP8, and config.json has no quantization_config that says in which blocks; add the release's"
        if scale is None:
            return f"{where} is FP8, but {tensor.scale_name} is missing"
        return self._scale_fault(tensor, f"{scale.file}: {tensor.scale_name}")

    def _scale_fault(self, tensor: HfTensor, where: str) -> str | None:
        scale = self._stored[tensor.scale_name]
        if len(self._block) != 2 or self._block[0] != self._block[1]:
            return f"{where}: config.json says weight_block_size {list(self._block)}; blocks must be square, as [128, 128]"
        if scale.dtype not in _SCALES and not (scale.dtype == "U8" and self._exponents):
            bytes_of_what = "which config.json does not call exponents (scale_fmt ue8m0)"
            said = bytes_of_what if scale.dtype == "U8" else "no type of a scale"
            return f"{where} is {scale.dtype}, {said}; scales can be {', '.join(_SCALES)}"
        wanted = scale_shape(tensor.shape, self.block)
        if scale.shape != wanted:
            weight = f"{tensor.name} {list(tensor.shape)} in blocks of {self.block}"
            return f"{where} has shape {list(scale.shape)}, {weight} needs {list(wanted)}"
        return None

    @property
    def _exponents(self) -> bool:
        """Bytes are exponents: the scale is 2 ** (byte - 127)."""
        return self._quantization.get("scale_fmt") == "ue8m0"

    def _scales(self, name: str) -> Tensor:
        """float32."""
        scales = self.raw(name)
        return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()


def _quantization(folder: Path) -> Mapping[str, Any]:
    return read_hf_config(folder).get("quantization_config", {}) if (folder / "config.json").is_file() else {}
