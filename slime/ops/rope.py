"""Rotary position embedding of some of a head's dimensions."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, first: int = 0) -> Tensor:
    """Turn dimensions first ... first + 2 pairs of x [t, heads, d] by the angles of cos and sin [t, pairs]; the rest passes.

    interleaved: pairs are (2i, 2i+1) and stay where they are; otherwise (i, i + pairs). At least float32 inside, rounded once
    to x's dtype. Gradient to x only.
    """
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32):
        from slime.ops.triton_kernels import Rotation

        return Rotation.apply(x, cos, sin, interleaved, first)
    width = 2 * cos.shape[-1]
    before, turned, after = x.split([first, width, x.shape[-1] - first - width], dim=-1)
    turned = turned.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = cos[:, None, :], sin[:, None, :]
    if interleaved:
        even, odd = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    else:
        even, odd = turned.chunk(2, dim=-1)
        turned = torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return torch.cat([before, turned.to(x.dtype), after], dim=-1)
