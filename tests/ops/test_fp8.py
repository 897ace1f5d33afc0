"""Block FP8 against arithmetic done tile by tile."""

import pytest
import torch

from slime.ops.fp8 import dequantize_blockwise, quantize_blockwise


def by_hand(weight, block):
    """Codes and scales one tile at a time, in float64 up to the division."""
    rows, cols = weight.shape
    codes = torch.empty(rows, cols, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // block), -(-cols // block))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            tile = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            amax = weight[tile].double().abs().max().item()
            scales[i, j] = amax / 448 if amax else 1.0
            codes[tile] = (weight[tile].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (576, 200), (130, 257), (5, 640)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_and_scales_are_those_of_each_tile_alone(shape, dtype):
    weight = (torch.randn(shape) * torch.logspace(-4, 3, shape[1])).to(dtype)
    codes, scales = quantize_blockwise(weight)
    want_codes, want_scales = by_hand(weight, 128)
    assert codes.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
    assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))
    torch.testing.assert_close(scales, want_scales, rtol=1e-6, atol=0)


def test_the_largest_entry_of_every_tile_restores_and_the_rest_within_half_a_step():
    weight = torch.randn(300, 300).to(torch.bfloat16)
    restored = dequantize_blockwise(*quantize_blockwise(weight), dtype=torch.float32)
    # e4m3 has 3 mantissa bits: relative half-step 1/16, plus half of the smallest step 2^-9 * scale near zero.
    bound = weight.float().abs() / 16 + 2**-10 * weight.float().abs().max() / 448
    assert ((restored - weight.float()).abs() <= bound).all()
    tile, restored_tile = weight[:128, :128].float().flatten(), restored[:128, :128].flatten()
    top = tile.abs().argmax()
    torch.testing.assert_close(restored_tile[top], tile[top], rtol=1e-6, atol=0)


def test_zero_tiles_restore_to_zeros_and_tiny_tiles_to_finite_numbers():
    weight = torch.zeros(256, 256)
    weight[128:, 128:] = 1e-40  # amax / 448 is subnormal
    codes, scales = quantize_blockwise(weight)
    assert scales[0, 0] == 1 and scales[0, 1] == 1 and scales[1, 1] > 0
    restored = dequantize_blockwise(codes, scales)
    assert torch.equal(restored[:128], torch.zeros(128, 256, dtype=torch.bfloat16))
    assert restored.isfinite().all()


def test_a_shard_cut_at_a_block_gives_the_bytes_of_the_whole():
    weight = torch.randn(384, 256)
    codes, scales = quantize_blockwise(weight)
    shard_codes, shard_scales = quantize_blockwise(weight[128:])
    assert torch.equal(codes[128:].view(torch.uint8), shard_codes.view(torch.uint8)) and torch.equal(scales[1:], shard_scales)


def test_not_a_matrix_and_wrong_scales_are_refused():
    with pytest.raises(ValueError, match="matrices"):
        quantize_blockwise(torch.zeros(2, 128, 128))
    codes, _ = quantize_blockwise(torch.ones(256, 256))
    with pytest.raises(ValueError, match="do not fit"):
        dequantize_blockwise(codes, torch.ones(1, 1))
