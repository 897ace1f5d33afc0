"""Estimators of KL(policy || reference) from one sampled token each (Schulman, http://joschu.net/blog/kl-approx.html)."""

from __future__ import annotations

import torch
from torch import Tensor

KL_KINDS = ("k1", "k2", "k3", "low_var_kl")
LOW_VAR_LIMIT = 10.0
"""low_var_kl is k3 clamped to this; one token at e^20 would otherwise own the step."""

LARGEST_EXPONENT = 80.0


def approx_kl(log_probs: Tensor, ref_log_probs: Tensor, kind: str, *, importance_log_ratio: Tensor | None = None) -> Tensor:
    """Per token, with d = log_probs - ref_log_probs: k1 = d, k2 = d^2 / 2, k3 = e^-d - 1 + d, low_var_kl = k3 within +-10.

    `importance_log_ratio` (log pi - log of the sampling policy) makes the estimate unbiased for samples of another policy
    (DeepSeek-V3.2, arXiv 2512.02556): the value is multiplied by e^ratio. All of one shape; differentiable in log_probs.
    """
    delta = log_probs.float() - ref_log_probs.float()
    if kind == "k1":
        value = delta
    elif kind == "k2":
        value = delta.square() / 2
    elif kind in ("k3", "low_var_kl"):
        # Bounded, because e^89 is no float32 and its gradient nan, also where the clamp below hides the value.
        value = torch.expm1((-delta).clamp(max=LARGEST_EXPONENT)) + delta
    else:
        raise ValueError(f"--kl-loss-type {kind!r} is none of {', '.join(KL_KINDS)}")
    if importance_log_ratio is not None:
        value = value * importance_log_ratio.exp()
    return value.clamp(-LOW_VAR_LIMIT, LOW_VAR_LIMIT) if kind == "low_var_kl" else value
