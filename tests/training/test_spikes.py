"""A step that jumps is skipped, named with its samples and counted; everybody agrees, also after a resume."""

from __future__ import annotations

import math

import pytest
import torch
from ranks import RankFailed, run_ranks
from tiny import config_for, plans, rollout, start

from slime.training.spikes import FEWEST, WINDOW, Spikes

STEADY = [4.0, 2.0, 3.0, 5.0, 1.0, 3.0, 4.0, 2.0]  # sorted 1 2 2 3 3 4 4 5, the median is 3


def judged(spikes: Spikes, norms: list[float]) -> list[bool]:
    out = []
    for norm in norms:
        out.append(spikes.judge({"gradient norm": norm}) is not None)
        if not out[-1]:
            spikes.accept({"gradient norm": norm})
    return out


def test_a_figure_above_the_factor_times_the_median_is_a_spike():
    spikes = Spikes(4.0)
    assert judged(spikes, STEADY) == [False] * FEWEST, "nothing is judged before there is a median"
    assert judged(spikes, [12.0, 12.1, 900.0]) == [False, True, True], "4 x 3 = 12, and the skipped ones move nothing"
    told = spikes.judge({"gradient norm": 30.0})
    assert told == "gradient norm 30 is 10 times 3, the median of the last 9 steps (--skip-spike 4)"
    assert spikes.judge({"gradient norm": 1.0, "loss": 10.0**9}) is None, "of the loss nothing is known"
    assert judged(Spikes(None), [*STEADY, 1e9]) == [False] * 9


def test_the_median_follows_the_run_and_a_resume_goes_on_with_it():
    spikes = Spikes(2.0)
    # A norm that doubles over 64 steps is no spike; the window has forgotten the first ones.
    rising = [2.0 ** (n / 64) for n in range(3 * WINDOW)]
    assert not any(judged(spikes, rising))
    resumed = Spikes(2.0)
    resumed.restore(spikes.state())
    # Steps 128 to 191: the middle two are 159 and 160.
    edge = 2.0 * (2 ** (159 / 64) + 2 ** (160 / 64)) / 2
    for one in (spikes, resumed):
        assert judged(one, [edge * 1.001]) == [True]
        assert one.judge({"gradient norm": edge * 0.999}) is None


def test_zeros_and_infinities_do_no_harm():
    spikes = Spikes(3.0)
    assert judged(spikes, [0.0] * FEWEST) == [False] * FEWEST
    assert "gradient norm 0.1 is not 0, the median of the last 8 steps" in spikes.judge({"gradient norm": 0.1})
    spikes.accept({"gradient norm": math.inf})
    assert len(spikes.state()["gradient norm"]) == FEWEST


def jumping(rank: int, folder, bad_rollouts: tuple[int, ...], changes: dict, save: str | None = None, split: int = -1):
    """Train 11 rollouts; in bad ones the last rank's gradients are 10,000 times too large. split: save, load before it."""
    config = config_for(folder, skip_spike=20.0, **changes, **({"save": save} if save else {}))
    factor = [1.0]

    def made(config):
        trainer = start(config)
        if rank == 1:
            layer = trainer.model[0].decoder.layers[-1]
            layer.mlp.linear_fc1.weight.register_hook(lambda gradient: gradient * factor[0])
        return trainer

    trainer, skipped, moved = made(config), [], []
    for rollout_id in range(11):
        if rollout_id == split:
            trainer.save(rollout_id - 1, data_state={})
            trainer = made(config_for(folder, skip_spike=20.0, **changes, save=save, load=save))
            trainer.load()
        factor[0] = 1e4 if rollout_id in bad_rollouts else 1.0
        batch = rollout(rollout_id)
        before = [weight.clone() for _, weight in trainer.named_weights()]
        report = trainer.train(batch, plans(batch, config, 2)).per_step[0]
        skipped.append(report["train/skipped_steps"])
        moved.append(any(not torch.equal(a, b) for a, (_, b) in zip(before, trainer.named_weights(), strict=True)))
    return skipped, moved, torch.cat([weight.flatten().clone() for _, weight in trainer.named_weights()])


@pytest.mark.slow
def test_ranks_skip_a_spike_together_and_a_resumed_run_skips_the_same(qwen3, tmp_path):
    # Rollout 4 is before the first judgement, and too large a step is what clipping is for.
    straight = run_ranks(2, jumping, qwen3, (4, 9), {})
    for skipped, moved, _ in straight:
        assert skipped == [0] * 9 + [1, 1] and moved == [True] * 9 + [False, True]
    resumed = run_ranks(2, jumping, qwen3, (4, 9), {}, str(tmp_path), 9)
    assert all(torch.equal(one[2], other[2]) for one, other in zip(straight, resumed, strict=True))
    assert [skipped for skipped, *_ in resumed] == [skipped for skipped, *_ in straight]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [dict(), dict(pipeline_model_parallel_size=2)], ids=["DP2", "PP2"])
def test_the_spike_after_the_last_allowed_one_ends_the_run_with_its_samples(qwen3, changes):
    with pytest.raises(RankFailed) as told:
        run_ranks(2, jumping, qwen3, (8, 9), {**changes, "max_skipped_steps": 1})
    message = str(told.value)
    assert "SpikedStep: rollout 10 step 1: gradient norm " in message
    assert "the median of the last 8 steps (--skip-spike 20); the largest loss of a micro-batch, " in message
    assert "(1 were skipped before, --max-skipped-steps); look at these samples, lower --lr or raise --skip-spike" in message
    # Rollout 10 has samples 900 to 907.
    (samples,) = {part.split("]")[0] for part in message.split("is that of samples [")[1:]}
    assert samples and all(900 <= int(one) < 908 for one in samples.split(", "))
    assert "weights are as before this step" in message
