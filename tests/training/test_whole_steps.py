"""One whole step, from samples or from another's rollout to the gradient, against plain formulas on transformers' log-probs."""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_objectives import check_against, hf_log_probs, mean, plain_mean, second, step_of
from tiny import config_for, gradients, plans, rollout, start

from slime.model.build import padded_vocab_size
from slime.model.hf_config import read_hf_config
from slime.model.hf_io import SafetensorsReader, load_hf
from slime.model.names import NameTable
from slime.rollout.to_batch import make_rollout_batch
from slime.types import Sample

__all__ = ["second"]  # a fixture
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("estimator", "buffer"), [("rloo", None), ("grpo", 18)], ids=["rloo", "grpo with overlong shaping"])
def test_a_step_on_what_becomes_of_rewards_within_their_groups(qwen3, estimator, buffer):
    """From samples of unequal groups to the gradient. DAPO's equation 13 case by case, of at most 24 tokens; then each reward
    less the others' mean (RLOO), or less the mean of all and over their deviation (GRPO)."""
    made = rollout(seed=31)
    rewards = np.random.default_rng(31).normal(size=len(made)).round(3)
    groups = [range(5), range(5, 8)]
    changes = dict(advantage_estimator=estimator)
    if buffer is not None:
        changes |= dict(overlong_buffer_len=buffer, overlong_penalty_factor=0.5, rollout_max_response_len=24)
    samples = [
        Sample(
            index=row, tokens=made.tokens[row].tolist(), response_length=int(made.response_lengths[row]), reward=rewards[row],
            loss_mask=made.loss_masks[row].astype(int).tolist(), rollout_log_probs=made.rollout_log_probs[row].tolist(),
            status=Sample.Status.COMPLETED,
        )
        for row in range(len(made))
    ]  # fmt: skip
    grouped = [[samples[row] for row in rows] for rows in groups]
    batch = make_rollout_batch(grouped, rollout_id=0, config=config_for(qwen3, **changes))

    def shaped(row: int) -> float:
        length, free = int(made.response_lengths[row]), 24 - (buffer or 0)
        if buffer is None or length <= free:
            return float(rewards[row])
        return float(rewards[row]) + 0.5 * ((free - length) / buffer if length <= 24 else -1.0)

    assert buffer is None or sum(shaped(row) != rewards[row] for row in range(8)) in range(3, 8), "some are too long, some not"
    advantages = {}
    for rows in groups:
        values = [shaped(row) for row in rows]
        for row, own in zip(rows, values, strict=True):
            others = (sum(values) - own) / (len(values) - 1)
            scaled = (own - statistics.fmean(values)) / (statistics.stdev(values) + 1e-6)
            advantages[row] = own - others if estimator == "rloo" else scaled
    report, grads = run_ranks(1, step_of, qwen3, changes, batch)[0]
    model, log_probs, _ = hf_log_probs(qwen3, batch)
    loss = mean(batch, [-advantages[row] * (lp - lp.detach()).exp() for row, lp in enumerate(log_probs)])
    check_against(qwen3, batch, report, grads, (model, loss))


def step_on_anothers_rollout(rank: int, folder, writer, batch) -> tuple:
    """The weights of `writer` are sent as version 1; then those of `folder` are in their place, as if trained."""
    config = config_for(writer, clip_grad=0.0, keep_old_actor=True)
    trainer = start(config)
    trainer.note_sent(1)
    hf = read_hf_config(folder)
    load_hf(
        trainer.pipeline.chunks, NameTable.for_model(hf), SafetensorsReader(folder), trainer.ranks,
        padded_vocab=padded_vocab_size(config, hf),
    )  # fmt: skip
    trainer.optimizer.reload_model_params()
    return trainer.train(batch, plans(batch, config, 1)), gradients(trainer)


def test_with_keep_old_actor_a_step_is_measured_against_the_weights_that_wrote_its_rollout(qwen3, second):
    """Two models of transformers: ratio = the trained one's probability over the writer's, clipped as PPO does."""
    batch = replace(rollout(seed=32), weight_versions=(("1",),) * 8)
    report, grads = run_ranks(1, step_on_anothers_rollout, second, qwen3, batch)[0]
    model, log_probs, _ = hf_log_probs(second, batch)
    with torch.no_grad():
        old = hf_log_probs(qwen3, batch)[1]
    gaps = [lp - before for lp, before in zip(log_probs, old, strict=True)]
    assert max(float(gap.detach().abs().max()) for gap in gaps) > 1, "the two are far apart"
    losses = [
        torch.maximum(-gap.exp() * float(a), -gap.exp().clamp(0.8, 1.28) * float(a))
        for gap, a in zip(gaps, batch.rewards, strict=True)
    ]
    check_against(second, batch, report, grads, (model, mean(batch, losses)))
    assert report.metrics["rollout/log_probs"] == pytest.approx(plain_mean(batch, old), rel=1e-5)
