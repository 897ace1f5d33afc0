"""SwiGLU experts over tokens sorted by expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_swiglu(x: Tensor, tokens_per_expert: Tensor, w1: Tensor, w2: Tensor, probs: Tensor | None = None) -> Tensor:
    """Rows of x through their expert's SwiGLU: probs * (silu(x @ gate.T) * (x @ up.T)) @ w2.T.

    x [n, hidden] sorted by expert; tokens_per_expert [E] int64, on the CPU or x's device, sums to n; w1 [E, 2f, hidden],
    the f gate rows first; w2 [E, hidden, f]; probs [n] routing weights or None -> [n, hidden] in x's dtype.
    The activation is float32 and the routing weight is applied to it (f columns, not hidden), then rounded once to x's dtype.
    An expert may have 0 tokens and n may be 0: gradients of w1 and w2 are zeros there, not None.
    """
    if w1.shape[1] != 2 * w2.shape[2] or w1.shape[2] != x.shape[1] or w2.shape[1] != x.shape[1] or len(w1) != len(w2):
        raise ValueError(
            f"want x [n, h], w1 [E, 2f, h], w2 [E, h, f]; got {tuple(x.shape)}, {tuple(w1.shape)}, {tuple(w2.shape)}"
        )
    if not tokens_per_expert.is_cuda and int(tokens_per_expert.sum()) != x.shape[0]:
        # On a GPU rows beyond the last expert's would come back as they lay in memory. Counts that lie there are not read.
        raise ValueError(f"tokens_per_expert sums to {int(tokens_per_expert.sum())}, x has {x.shape[0]} rows")
    if x.is_cuda and x.dtype == torch.bfloat16 and x.shape[0] > 0:
        return _grouped(x, tokens_per_expert, w1, w2, probs)
    return _looped(x, tokens_per_expert, w1, w2, probs)


def _looped(x: Tensor, tokens_per_expert: Tensor, w1: Tensor, w2: Tensor, probs: Tensor | None) -> Tensor:
    counts = tokens_per_expert.tolist()
    all_probs = [None] * len(counts) if probs is None else probs.split(counts)
    # unbind, not w1[e]: the backward of indexing would write a gradient of the size of all experts for each expert.
    outs = [
        F.linear(_swiglu(F.linear(rows, gate_up), p), down)
        for rows, gate_up, down, p in zip(x.split(counts), w1.unbind(), w2.unbind(), all_probs, strict=True)
    ]
    return torch.cat(outs)


def _grouped(x: Tensor, tokens_per_expert: Tensor, w1: Tensor, w2: Tensor, probs: Tensor | None) -> Tensor:
    offsets = tokens_per_expert.to(x.device, non_blocking=True).cumsum(0).to(torch.int32)
    gate_up = grouped_mm(x, w1.transpose(1, 2), offs=offsets)
    from slime.ops.triton_kernels import WeightedSwiGLU

    return grouped_mm(WeightedSwiGLU.apply(gate_up, probs), w2.transpose(1, 2), offs=offsets)


def _swiglu(gate_up: Tensor, probs: Tensor | None) -> Tensor:
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    act = F.silu(gate) * up
    if probs is not None:
        act = act * probs.to(act.dtype)[:, None]
    return act.to(gate_up.dtype)


# torch 2.10 made the operator public.
grouped_mm = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm
