"""Supervised fine-tuning: the token loss is the negative log-likelihood."""

from __future__ import annotations

from torch import Tensor


def nll(log_probs: Tensor) -> Tensor:
    """-log_probs [r]; temperature is 1 and nothing is clipped. The caller masks and weights it like every token loss."""
    return -log_probs
