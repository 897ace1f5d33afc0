"""The import path that users' training functions know. Context parallelism ends before they are called.

Every tensor that a function of the user's gets is a sample's whole response, equal on all context-parallel ranks. So gathering
gives it back, and the slice of a rank is all of it.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["all_gather_with_cp", "slice_log_prob_with_cp"]


def all_gather_with_cp(tensor: Tensor, total_length: int, response_length: int) -> Tensor:
    """The whole response [response_length], which `tensor` is. Raises ValueError when it is something else."""
    return _whole(tensor, response_length)


def slice_log_prob_with_cp(log_prob: Tensor, total_length: int, response_length: int) -> Tensor:
    """This rank's part of a response [response_length]: all of it."""
    return _whole(log_prob, response_length)


def _whole(tensor: Tensor, response_length: int) -> Tensor:
    if len(tensor) != response_length:
        raise ValueError(f"expected a whole response of {response_length} tokens, got {len(tensor)}")
    return tensor
