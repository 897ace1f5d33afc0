"""A grading that breaks: counted by reason, shown with the user's own line, never scored 0, not the end of the run.

Against a router on loopback and with a user's graders in threads, as in a run.
"""

from __future__ import annotations

import asyncio
import logging

import pytest

from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.rollout.sglang_rollout import generate_rollout
from slime.rollout.to_batch import make_rollout_batch
from slime.rollout.ungraded import keep_ungraded
from slime.types.sample import Sample, Status


@pytest.fixture
def run(rollout_config, runtime_args):
    """(**config values) -> (output, config)."""

    def one(**values):
        config = rollout_config(**values)
        args = runtime_args(config)
        return generate_rollout(args, 0, RolloutDataSourceWithBuffer(args)), config

    return one


async def third_of_four_hangs(args, sample, **kwargs):
    if sample.index % 4 == 2:
        await asyncio.sleep(600)
    return float(sample.index % 4)


async def wants_gold(args, sample, **kwargs):
    return float(sample.metadata["gold"])


def test_a_sample_whose_grading_timed_out_stays_in_its_group_with_the_mean_and_trains_nothing(run):
    output, config = run(
        custom_rm_path=f"{__name__}.third_of_four_hangs", rm_timeout=0.5, n_samples_per_prompt=4, over_sampling_batch_size=4
    )
    assert [len(group) for group in output.samples] == [4, 4, 4, 4]
    assert output.metrics["rollout/failed_samples/grading_timeout"] == 4.0
    assert "rollout/dynamic_filter/drop_failed" not in output.metrics
    rewards = [[sample.reward for sample in group] for group in output.samples]
    assert rewards == [[0.0, 1.0, 4 / 3, 3.0]] * 4  # (0 + 1 + 3) / 3
    masked = [[sample.remove_sample for sample in group] for group in output.samples]
    assert masked == [[False, False, True, False]] * 4
    assert "within 0.5 s (--rm-timeout)" in output.samples[0][2].metadata["error"]
    batch = make_rollout_batch(output.samples, rollout_id=0, config=config)
    trained = [float(mask.sum()) > 0 for mask in batch.loss_masks]
    assert trained == [True, True, False, True] * 4
    # Its reward is the mean of its group, so it moves nobody's: the centred rewards of the others sum to 0 without it.
    assert batch.rewards[2] == pytest.approx(0.0, abs=1e-6)
    assert batch.rewards[[0, 1, 3]].sum() == pytest.approx(0.0, abs=1e-5)


def test_a_grader_that_always_breaks_ends_the_run_with_the_users_line_said_once(run, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError) as caught:
        run(custom_rm_path=f"{__name__}.wants_gold")
    line = next(number for number, text in enumerate(open(__file__), 1) if 'metadata["gold"]' in text)
    where = f"KeyError: 'gold' ({__file__}:{line} in wants_gold: return float(sample.metadata[\"gold\"]))"
    assert str(caught.value).endswith(where) and str(caught.value).count("gold'") == 1
    assert "samples by reason: grading_KeyError" in str(caught.value)
    assert sum("sample" in record.message and "gold" in record.message for record in caplog.records) == 1


def graded(reward) -> Sample:
    return Sample(reward=reward, status=Status.COMPLETED)


def ungraded() -> Sample:
    return Sample(status=Status.FAILED, metadata={"ungraded": {"reason": "timeout", "status": "truncated"}})


def test_an_ungraded_sample_of_mappings_gets_their_means_and_the_reason_for_words():
    group = [graded({"score": 1.0, "acc": True, "pred": "3"}), graded({"score": -1.0, "acc": False, "pred": "4"}), ungraded()]
    keep_ungraded(group)
    assert group[2].reward == {"score": 0.0, "acc": 0.5, "pred": "timeout"}
    assert group[2].status is Status.TRUNCATED and group[2].remove_sample


@pytest.mark.parametrize(
    "group",
    [
        [graded(1.0), ungraded()],
        [ungraded(), ungraded()],
        [graded(1.0), graded(0.0), ungraded(), Sample(status=Status.FAILED)],
    ],
    ids=["only half was graded", "none was graded", "another sample failed for another reason"],
)
def test_a_group_of_which_too_little_is_known_fails_as_a_whole(group):
    before = [(sample.status, sample.reward) for sample in group]
    keep_ungraded(group)
    assert [(sample.status, sample.reward) for sample in group] == before
