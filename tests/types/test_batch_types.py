from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from slime.types import RolloutBatch, StepPlan


def a_batch(**changes):
    values = dict(
        rollout_id=3,
        tokens=(np.arange(5), np.arange(4)),
        response_lengths=np.array([2, 3]),
        loss_masks=(np.ones(2, np.float32), np.array([1, 0, 1], np.float32)),
        rewards=np.array([0.5, -0.5], np.float32),
        raw_rewards=np.array([1.0, 0.0], np.float32),
        groups=np.array([0, 0]),
        trajectories=np.array([0, 1]),
        sample_ids=np.array([40, 41]),
        truncated=np.array([False, True]),
    )
    return RolloutBatch(**{**values, **changes})


def test_lengths_and_mask_sums_are_counted():
    batch = a_batch()
    assert batch.total_lengths.tolist() == [5, 4] and batch.mask_sums.tolist() == [2.0, 2.0] and len(batch) == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(rewards=np.zeros(3, np.float32)), r"column rewards has shape \(3,\), but there are 2 samples"),
        (dict(loss_masks=(np.ones(2), np.ones(2))), r"row 1 \(sample 41\): loss_masks has shape \(2,\).*3 tokens"),
        (dict(rollout_log_probs=(np.ones(2),)), "column rollout_log_probs has 1 rows"),
        (dict(response_lengths=np.array([5, 3])), r"row 0 \(sample 40\).*at least one prompt token"),
    ],
)
def test_a_wrong_length_names_column_and_row(changes, message):
    with pytest.raises(ValueError, match=message):
        a_batch(**changes)


def test_a_plan_refuses_uneven_ranks_duplicates_and_strays():
    weight = np.array([0.5, 0.5])
    StepPlan(0, (((0,),), ((1,),)), weight, 2, 2.0)
    with pytest.raises(ValueError, match=r"\[1, 2\] micro-batches"):
        StepPlan(0, (((0,),), ((1,), ())), weight, 2, 2.0)
    with pytest.raises(ValueError, match=r"samples \[0\] are planned more than once"):
        StepPlan(0, (((0,),), ((0, 1),)), weight, 2, 2.0)
    with pytest.raises(ValueError, match=r"samples \[1\] have a loss weight but are on no rank"):
        StepPlan(0, (((0,),),), weight, 1, 1.0)


def test_the_words_of_a_rollout_worker_load_no_torch():
    code = "import sys, slime.types; slime.types.RolloutBatch; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
