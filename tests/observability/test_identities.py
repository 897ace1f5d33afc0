import math

import pytest

from slime.observability.identities import broken_identities, compare_norm, norm_path, save_norm

STEP = {"train/ppo_kl": 0.0, "train/pg_clipfrac": 0.0, "train/kl_loss": 0.0, "train/train_rollout_logprob_abs_diff": 0.02}
LATER = STEP | {"train/ppo_kl": 0.01, "train/pg_clipfrac": 0.2, "train/kl_loss": 0.3}
ROLLOUT = {"rollout/log_probs": -1.5, "rollout/ref_log_probs": -1.5}


def broken(rollout=ROLLOUT, steps=(STEP, LATER), *, first=True, check_kl=True, largest_gap=0.1) -> list[str]:
    return [
        line.split(" ", 1)[0]
        for line in broken_identities(rollout, steps, first=first, check_kl=check_kl, largest_gap=largest_gap)
    ]


def test_a_sound_rollout_breaks_nothing_and_only_first_steps_have_to_vanish():
    assert broken() == []
    assert broken(steps=(STEP | {"train/kl_loss": 0.3}, LATER), first=False) == []
    assert broken({}, ({"train/grad_norm": 1.0},)) == [], "supervised steps have none of the figures"


@pytest.mark.parametrize("name", ["train/ppo_kl", "train/pg_clipfrac", "train/kl_loss"])
def test_a_first_step_that_is_not_where_it_should_be_is_named(name):
    assert broken(steps=(STEP | {name: 1e-3}, LATER)) == [name]
    assert broken(steps=(STEP | {name: 1e-3}, LATER), check_kl=False) == []


def test_the_first_rollout_is_scored_by_the_reference():
    assert broken(ROLLOUT | {"rollout/ref_log_probs": -1.49}) == ["rollout/log_probs"]
    assert broken(ROLLOUT | {"rollout/ref_log_probs": -1.49}, first=False) == []


@pytest.mark.parametrize("gap", [0.11, math.nan])
def test_a_gap_between_trainer_and_engine_is_named_in_every_step(gap):
    assert broken(steps=(STEP, LATER | {"train/train_rollout_logprob_abs_diff": gap})) == [
        "train/train_rollout_logprob_abs_diff"
    ]
    assert broken(steps=(STEP, LATER | {"train/train_rollout_logprob_abs_diff": 0.11}), largest_gap=0.12) == []


def test_gradient_norms_are_held_to_one_percent(tmp_path):
    path = norm_path(str(tmp_path / "{role}" / "{rollout_id}-{step_id}"), rollout_id=3, step_id=1)
    assert path == tmp_path / "actor" / "3-1"
    assert "there is no" in compare_norm(path, 2.0)
    save_norm(path, 2.0)
    assert compare_norm(path, 2.019) is None and compare_norm(path, 1.981) is None
    assert "2.03" in compare_norm(path, 2.03) and "is 2" in compare_norm(path, 2.03)
    assert compare_norm(path, math.nan) is not None
