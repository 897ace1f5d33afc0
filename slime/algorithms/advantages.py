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

    kl, mask [R] -> [R]. Raises ValueError as `token_rewards` does.
    """
    rewards = token_rewards(reward, kl, mask, kl_coef=kl_coef)
    returns = torch.empty_like(rewards)
    running = rewards.new_zeros(())
    for index in range(len(rewards) - 1, -1, -1):
        running = rewards[index] + gamma * running
        returns[index] = running
    return returns


def reinforce_plus_plus_baseline(reward: float, kl: Tensor, *, kl_coef: float) -> Tensor:
    """REINFORCE++ with a group baseline (arXiv 2501.03262): the group-centred reward minus this token's KL penalty. [R]"""
    return reward - kl_coef * kl


def token_rewards(reward: float, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """-kl_coef * kl on trained tokens, plus the sample's reward on the last of them. kl, mask [R] -> [R].

    Raises ValueError where no token is trained: the reward would have no place.
    """
    trained = torch.nonzero(mask > 0)
    if not len(trained):
        raise ValueError("the reward belongs to the last trained token, but this sample trains none; filter such samples")
    rewards = torch.where(mask > 0, -kl_coef * kl, torch.zeros_like(kl))
    rewards[int(trained[-1])] += reward
    return rewards


def generalized(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lambd: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv 1506.02438, eq. 16): -> (advantages, returns = advantages + values), each [R].

    rewards, values, mask [R]: of every token, the value of what stood before it. Trained tokens are the steps; what an
    environment said between two of them is part of the next state, and gets 0. Nothing is expected after the last one.
    """
    steps = torch.nonzero(mask > 0).flatten()
    # Plain numbers: a loop over 65,536 tensors of one element would take seconds.
    reward, value = rewards[steps].tolist(), values[steps].tolist()
    found, following, running = [0.0] * len(value), 0.0, 0.0
    for index in range(len(value) - 1, -1, -1):
        surprise = reward[index] + gamma * following - value[index]
        running = surprise + gamma * lambd * running
        found[index], following = running, value[index]
    advantages = torch.zeros_like(values, dtype=torch.float32)
    advantages[steps] = torch.tensor(found, dtype=torch.float32)
    return advantages, advantages + values * (mask > 0)


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
