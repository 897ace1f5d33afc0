"""The distance between an engine's log-probs and a trainer's, with what the engine chose and without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from engine.reference import sample_of
from ranks import run_ranks
from training.tiny import config_for, plans, start

from slime.types import RolloutBatch
from slime.types.kept_words import KeptWords


def batch_of(model, prompts: list[list[int]], answers: list[dict]) -> RolloutBatch:
    """One sample per prompt with all that its answer says, of half good and half bad rewards."""
    samples = [sample_of(model, tokens, [answer]) for tokens, answer in zip(prompts, answers, strict=True)]
    n = len(samples)
    said = [answer["meta_info"]["output_token_logprobs"] for answer in answers]
    rewards = np.array([row % 2 for row in range(n)], np.float32)
    return RolloutBatch(
        rollout_id=0,
        tokens=tuple(np.array(sample.tokens) for sample in samples),
        response_lengths=np.array([sample.response_length for sample in samples]),
        loss_masks=tuple(np.ones(sample.response_length, np.float32) for sample in samples),
        rewards=rewards - rewards.mean(),
        raw_rewards=rewards,
        groups=np.zeros(n, np.int64),
        trajectories=np.arange(n),
        sample_ids=np.arange(n),
        truncated=np.ones(n, bool),
        rollout_log_probs=tuple(np.array([item[0] for item in items], np.float32) for items in said),
        routed_experts=tuple(sample.rollout_routed_experts for sample in samples),
        kept_words=_kept_words(samples),
        indexer_topk=tuple(sample.rollout_indexer_topk for sample in samples),
    )


def _kept_words(samples) -> tuple[KeptWords, ...] | None:
    if samples[0].rollout_top_p_token_ids is None:
        return None
    return tuple(KeptWords(sample.rollout_top_p_token_ids, sample.rollout_top_p_token_offsets) for sample in samples)


def gap(checkpoint: Path, batch: RolloutBatch, **replays: bool) -> float:
    """Mean |log-prob of the trainer - of the engine| over response tokens, the trainer on the weights of `checkpoint`."""

    def step(rank: int) -> float:
        longest = max(len(tokens) for tokens in batch.tokens)
        rules = {"global_batch_size": len(batch), "max_tokens_per_gpu": 2 * longest, "rollout_temperature": 1.0}
        config = config_for(checkpoint, **rules, **replays)
        report = start(config).train(batch, plans(batch, config, 1))
        return report.per_step[0]["train/train_rollout_logprob_abs_diff"]

    return run_ranks(1, step)[0]
