"""Answers with a long tail, and a reward that any policy learns: what a schedule is worth is seen without a good model.

Named by --custom-generate-function-path long_tail.generate and --custom-rm-path long_tail.reward.
"""

from __future__ import annotations

TAIL = 8
"""One of so many answers is as long as it may be; the others are that much shorter."""


async def reward(args, sample, **kwargs) -> float:
    """The share of tokens from the first half of the vocabulary."""
    words = sample.tokens[-sample.response_length :]
    return sum(word < args.vocab_size // 2 for word in words) / len(words)


async def generate(args, sample, sampling_params):
    from slime.rollout.sglang_rollout import generate as one

    most = sampling_params["max_new_tokens"]
    return await one(args, sample, sampling_params | {"max_new_tokens": most if sample.index % TAIL == 0 else most // TAIL})
