"""From one reward per sample to one advantage per response token. Per sample: 1-D tensors over its response, [R]."""

from __future__ import annotations

import torch
from torch import Tensor

from slime.algorithms.importance import bounded_log_ratio

WHITEN_EPS = 1e-8


def broadcast_reward(reward: float, length: int) -> Tensor:
    """GRPO, GSPO, CISPO, RLOO: every token has its sample's (group-normalised) reward (arXiv 2402.03300, 4.1.2). [R]"""
    return torch.full((length,), float(reward), dtype=torch.float32)


def reinforce_plus_plus(reward: float, kl: Tensor, mask: Tensor, *, kl_coef: float, gamma: float) -> Tensor:
    """REINFORCE++ (arXiv 2501.03262): discounted sum of a token's own and later token rewards.

    A token reward is -kl_coef * kl on trained tokens, plus the sample's reward on its last trained token. kl, mask [R] -> [R].

    Raises ValueError where no token is trained: the reward would have no place.
    """
    trained = torch.nonzero(mask > 0)
    if not len(trained):
        raise ValueError(
            "REINFORCE++ puts the reward on the last trained token, but this sample trains none; filter such samples"
        )
    token_rewards = -kl_coef * kl * mask
    token_rewards[int(trained[-1])] += reward
    returns = torch.empty_like(token_rewards)
    running = token_rewards.new_zeros(())
    for index in range(len(token_rewards) - 1, -1, -1):
        running = token_rewards[index] + gamma * running
        returns[index] = running
    return returns


def reinforce_plus_plus_baseline(reward: float, kl: Tensor, *, kl_coef: float) -> Tensor:
    """REINFORCE++ with a group baseline (arXiv 2501.03262): the group-centred reward minus this token's KL penalty. [R]"""
    return reward - kl_coef * kl


def distilled(advantages: Tensor, log_probs: Tensor, teacher_log_probs: Tensor, *, coef: float) -> Tensor:
    """On-policy distillation: subtract coef times the per-token reverse KL (https://thinkingmachines.ai/blog/
    on-policy-distillation). All [R]."""
    return advantages - coef * reverse_kl(log_probs, teacher_log_probs)


def reverse_kl(log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """log student - log teacher of the student's own tokens [R]: its mean is KL(student || teacher). Within +-20, as every
    log-ratio, so that a token which is impossible for the teacher is no infinite advantage."""
    return bounded_log_ratio(log_probs - teacher_log_probs)


def masked_moments(values: Tensor, mask: Tensor) -> Tensor:
    """[count, sum, sum of squares] of the masked values in float64, ready to be summed over ranks. values, mask [any]."""
    wide, keep = values.double(), mask.double()
    return torch.stack([keep.sum(), (wide * keep).sum(), (wide.square() * keep).sum()])


def whitened(values: Tensor, moments: Tensor) -> Tensor:
    """(values - mean) / sqrt(unbiased variance + 1e-8), from the moments of the whole batch (all ranks, trained tokens).

    Raises ValueError where the batch has no trained token.
    """
    count, total, squares = moments.tolist()
    if count == 0:
        raise ValueError("--normalize-advantages: no token of this rollout is trained (all loss masks are 0)")
    mean = total / count
    variance = max(squares - count * mean * mean, 0.0) / max(count - 1, 1)
    return ((values.double() - mean) / (variance + WHITEN_EPS) ** 0.5).to(values.dtype)
