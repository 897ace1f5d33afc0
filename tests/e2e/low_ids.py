"""A reward that any model can learn within minutes: the share of response tokens from the first half of the vocabulary."""

from __future__ import annotations


async def reward(args, sample, **kwargs) -> float:
    words = sample.tokens[-sample.response_length :]
    return sum(word < args.vocab_size // 2 for word in words) / len(words)
