"""A rank's tensors as a bucket of a plan has them: what SGLang's loader does not copy there never arrived."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from slime.model.hf_config import HfConfig
from slime.model.names import NameTable
from slime.weights.serving import Receiver
from slime.weights.shares import Shares, borders
from slime.weights.wire import Format

GARBAGE = 0xFF
"""Every byte of it: NaN in bf16, float32 and e4m3."""
SCALE = "_scale_inv"


def with_holes(
    named: Sequence[tuple[str, torch.Tensor]], hf: HfConfig, receiver: Receiver, rank: int
) -> tuple[list[tuple[str, torch.Tensor]], Counter[str]]:
    """(the same tensors, garbage wherever the rank loads nothing; by name how many weights are not, without scales)."""
    table, form = NameTable.for_model(hf), Format.of(hf)
    shares, found, weights = Shares([receiver], hf, form), [], Counter()
    for name, tensor in named:
        entry = table.by_hf(name.removesuffix(SCALE))
        [count] = shares.of(entry)
        axis, block = 1 if entry.split == "columns" else 0, form.block if name.endswith(SCALE) else 1
        ends = borders(entry, tensor.shape[axis] * block, count) if count > 1 else [0, tensor.shape[axis] * block]
        start, stop = ends[rank % count] // block, ends[rank % count + 1] // block
        holed = torch.empty_like(tensor)
        holed.view(torch.uint8).fill_(GARBAGE)
        holed.narrow(axis, start, stop - start).copy_(tensor.narrow(axis, start, stop - start))
        found.append((name, holed))
        if not name.endswith(SCALE):
            weights[name] += (stop - start) * tensor.numel() // tensor.shape[axis]
    return found, weights
