"""Rewards by rank within the group (the share of longer answers), a filter that wants a spread, a normalisation of its own."""

import numpy as np

from slime.rollout.filter_hub.base_types import DynamicFilterOutput


async def by_length(args, samples, **kwargs):
    assert isinstance(samples, list)
    lengths = np.array([len(sample.response) for sample in samples])
    return (lengths[:, None] < lengths).sum(1) / max(1, len(samples) - 1)


def wants_a_spread(args, samples, **kwargs):
    rewards = np.array([sample.get_reward_value(args) for sample in samples])
    return DynamicFilterOutput(keep=np.ptp(rewards) > 0, reason="flat")


def centred_ranks(args, samples):
    raw = np.array([sample.get_reward_value(args) for sample in samples], dtype=np.float32)
    return raw, raw - raw.mean()
