"""Block FP8: e4m3 codes with one float32 scale per tile, the layout of the DeepSeek-V3 and GLM-5.2 FP8 checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Below this a quotient amax / 448 is subnormal, which GPUs flush to zero: the tile would be divided by 0.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def scale_shape(shape: tuple[int, ...] | torch.Size, block: int = 128) -> tuple[int, int]:
    """[out, in] -> shape of its scale tensor, [ceil(out/block), ceil(in/block)]."""
    rows, cols = shape
    return -(-rows // block), -(-cols // block)


def quantize_blockwise(weight: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """FP8 e4m3 with one float32 scale per block x block tile; the last tile may be partial.

    weight [out, in] bf16 or fp32 -> (fp8 [out, in], scale_inv [ceil(out/block), ceil(in/block)]).
    scale_inv = amax / 448 (at least the smallest normal float32), codes = round_to_e4m3(weight / scale_inv).
    An all-zero tile gets scale 1, so it restores to exact zeros. Raises ValueError unless weight is 2-D.
    A tile's result depends on that tile alone: a shard cut at a multiple of `block` gives the same bytes as the whole matrix.
    Layout: `weight_scale_inv` of the DeepSeek-V3 checkpoints, which SGLang's FP8 loader reads.
    """
    if weight.dim() != 2:
        raise ValueError(f"block FP8 quantises matrices; got a tensor of shape {tuple(weight.shape)}")
    if weight.is_cuda:
        codes = torch.empty(weight.shape, dtype=FP8, device=weight.device)
        scale_inv = torch.empty(scale_shape(weight.shape, block), dtype=torch.float32, device=weight.device)
        quantize_blockwise_into(weight, codes, scale_inv, block)
        return codes, scale_inv
    return quantize_reference(weight, block)


def quantize_blockwise_into(weight: Tensor, codes: Tensor, scale_inv: Tensor, block: int = 128) -> None:
    """quantize_blockwise on CUDA with its results written where they travel from: one read of weight, one write.

    codes [out, in] e4m3 and scale_inv [ceil(out/block), ceil(in/block)] float32 are contiguous views of a flat bucket.
    Raises ValueError when a shape, dtype or layout does not fit.
    """
    quantize_many([(weight, codes, scale_inv)], block)


def quantize_many(matrices: Sequence[tuple[Tensor, Tensor, Tensor]], block: int = 128) -> None:
    """quantize_blockwise_into for many (weight, codes, scale_inv) of one device: a launch for each dtype of weights, and one
    for those that no vector load can take.

    A launch costs the host as much as a small matrix costs the device. Raises ValueError when a shape, dtype or layout does
    not fit; nothing is written then.
    """
    for weight, codes, scale_inv in matrices:
        _check_room(weight, codes, scale_inv, block)
    if matrices:
        from slime.ops import triton_kernels

        ready = [(w if w.stride(1) == 1 else w.contiguous(), codes, scale_inv) for w, codes, scale_inv in matrices if w.numel()]
        with torch.cuda.device(matrices[0][0].device):
            triton_kernels.quantize_blocks(ready, block, FP8_MAX, SMALLEST_SCALE)


def _check_room(weight: Tensor, codes: Tensor, scale_inv: Tensor, block: int) -> None:
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"want weights in one of {', '.join(map(str, WEIGHT_DTYPES))}; got {weight.dtype}")
    if codes.shape != weight.shape or codes.dtype != FP8 or not codes.is_contiguous():
        raise ValueError(f"want contiguous e4m3 codes of shape {tuple(weight.shape)}; got {codes.dtype} {tuple(codes.shape)}")
    want = scale_shape(weight.shape, block)
    if tuple(scale_inv.shape) != want or scale_inv.dtype != torch.float32 or not scale_inv.is_contiguous():
        raise ValueError(f"want contiguous float32 scales of shape {want}; got {scale_inv.dtype} {tuple(scale_inv.shape)}")


def quantize_reference(weight: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """quantize_blockwise in plain torch, on any device."""
    rows, cols = weight.shape
    tile_rows, tile_cols = scale_shape(weight.shape, block)
    padded = torch.zeros(tile_rows * block, tile_cols * block, dtype=torch.float32, device=weight.device)
    padded[:rows, :cols] = weight
    tiles = padded.view(tile_rows, block, tile_cols, block)
    amax = tiles.abs().amax(dim=(1, 3)) if padded.numel() else padded.new_zeros(tile_rows, tile_cols)
    # A tensor, not a number: CUDA divides by a number through its reciprocal, which rounds differently.
    scale_inv = torch.where(amax == 0, 1.0, (amax / torch.full_like(amax, FP8_MAX)).clamp_min(SMALLEST_SCALE))
    codes = (tiles / scale_inv[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return codes.view_as(padded)[:rows, :cols].contiguous(), scale_inv


def dequantize_blockwise(fp8: Tensor, scale_inv: Tensor, block: int = 128, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The inverse of quantize_blockwise: codes * scale in float32, rounded once to `dtype`.

    fp8 [out, in] e4m3, scale_inv [ceil(out/block), ceil(in/block)] -> [out, in]. Raises ValueError when the shapes disagree.
    """
    if fp8.dim() != 2 or tuple(scale_inv.shape) != scale_shape(fp8.shape, block):
        raise ValueError(f"codes {tuple(fp8.shape)} with block {block} do not fit scales {tuple(scale_inv.shape)}")
    rows, cols = fp8.shape
    scale = scale_inv.float().repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :cols]
    return (fp8.float() * scale).to(dtype)
