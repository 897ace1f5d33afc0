"""Sums and means over the samples of a flat token tensor."""

from __future__ import annotations

from torch import Tensor


def segment_sum(values: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """values [r], segments [r] int64 -> [num_segments]; a segment without tokens gives 0."""
    return values.new_zeros(num_segments).index_add(0, segments, values)


def segment_mean(values: Tensor, mask: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """Mean of the masked tokens of each sample [num_segments]; 0 where none is masked in."""
    count = segment_sum(mask, segments, num_segments)
    return segment_sum(values * mask, segments, num_segments) / count.clamp(min=1)
