"""Entropy of the next-token distribution, whole vocabulary on one device; `slime.ops.vocab_logprob` is its split form."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """[..., v] -> [...] in nats, float32: -sum p log p; a logit of -inf has p = 0 and adds nothing."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return -torch.where(log_p.isneginf(), 0.0, log_p.exp() * log_p).sum(-1)
