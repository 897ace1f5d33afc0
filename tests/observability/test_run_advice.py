"""Each piece of advice at the figures that call for it, and not at those beside them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from slime.observability import advice
from slime.observability.advice import Advisor, Seen, all_truncated, equal_rewards, full_disk, growing_gap
from slime.types import RolloutBatch


def rewarded(*rows: tuple[float, float, float | None]) -> list[Seen]:
    return [Seen(number, (low, high), spread) for number, (low, high, spread) in enumerate(rows, 1)]


def test_rewards_that_are_all_equal():
    told = equal_rewards(rewarded((0, 1, 1), (0, 0, 0), (0, 0, 0), (0, 0, 0)))
    assert told.startswith("every reward of rollouts 2 to 4 is 0, which teaches nothing: read some answers (--save-debug")
    assert equal_rewards(rewarded((0, 0, 0), (0, 0, 0))) is None, "two may be chance"
    assert equal_rewards(rewarded((0, 0, 0), (0, 0.5, 0.5), (0, 0, 0))) is None
    assert equal_rewards(rewarded((0, 1, None), (0, 1, None), (0, 1, None))) is None, "one sample each"
    told = equal_rewards(rewarded((0, 1, 0), (0, 1, 0), (0, 1, 0)))
    assert told.startswith("in rollouts 1 to 3 the rewards of each prompt's samples are equal")
    assert "every reward" not in equal_rewards(rewarded((0, 0, 0), (1, 1, 0), (0, 0, 0))), "not the same in all three"
    assert equal_rewards([Seen(n) for n in range(5)]) is None, "nothing is graded"


@pytest.mark.parametrize(
    ("gaps", "told"),
    [
        ([0.02] * 5 + [0.05] * 4, False),  # nine rollouts
        ([0.02] * 5 + [0.05] * 5, True),
        ([0.02] * 5 + [0.04] * 5, False),  # twice is not more than twice
        ([0.002] * 5 + [0.019] * 5, False),  # nine times, of nothing
        ([0.02] * 20 + [0.9, 0.9], False),  # the median of the last five is not moved by two
        ([0.02, 0.02, 0.02, 0.5, 0.5] + [0.06] * 5, True),
        ([0.1] * 5 + [0.01] * 5, False),
    ],
)
def test_a_gap_that_grows(gaps, told):
    line = growing_gap([Seen(number, gap=gap) for number, gap in enumerate(gaps, 1)])
    assert (line is not None) == told
    if told:
        assert f"was 0.02 in rollouts 1 to 5 and is {gaps[-1]:g} in 6 to 10: compare weights" in line


def test_answers_that_all_end_at_the_limit():
    cut = [Seen(number, truncated=share) for number, share in enumerate((0.5, 1.0, 1.0, 0.995), 1)]
    assert "rollouts 2 to 4 all ended at the length limit, --rollout-max-response-len 64: raise it" in all_truncated(
        cut, limit=64
    )
    assert all_truncated(cut[:3], limit=64) is None
    assert all_truncated([*cut, Seen(5, truncated=0.9)], limit=64) is None


GB = 10**9


@pytest.mark.parametrize(
    ("free", "need", "to_save", "told"),
    [
        ([100, 98, 96, 94], 80, 7, False),  # 94 - 7 x 2 = 80
        ([100, 98, 96, 94], 80, 8, True),
        ([79], 80, 3, True),
        ([100, 60, 58, 96, 94], 70, 12, False),  # a save (40) and what it removed (-38) do not count: 94 - 12 x 2 = 70
        ([100, 90], None, 3, False),
        ([10], 80, None, False),
    ],
)
def test_a_disk_that_will_be_full(free, need, to_save, told):
    seen = [Seen(number, free_bytes=gigabytes * GB) for number, gigabytes in enumerate(free, 1)]
    line = full_disk(seen, save="/save", need_bytes=need and need * GB, rollouts_to_save=to_save)
    assert (line is not None) == told
    if told and len(free) > 1:
        assert "--save /save will be full at the next save, after rollout 12: a checkpoint takes 80.000 GB, 94.000" in line
        assert "2.000 GB go with each rollout" in line


def test_when_the_next_save_is():
    after = [advice._rollouts_to_save(rollout_id, 4, 10) for rollout_id in range(10)]
    assert after == [3, 2, 1, 4, 3, 2, 1, 2, 1, None], "after rollouts 4 and 8, and the last"
    assert advice._rollouts_to_save(0, None, 10) is None


def batch(rollout_id: int, rewards: list[float]) -> RolloutBatch:
    n = len(rewards)
    ones = np.ones(n, np.int64)
    return RolloutBatch(
        rollout_id, tuple(np.arange(3) for _ in rewards), ones * 2, tuple(np.ones(2, np.float32) for _ in rewards),
        np.zeros(n, np.float32), np.array(rewards, np.float32), np.arange(n) // 2, np.arange(n), np.arange(n), np.ones(n, bool),
    )  # fmt: skip


def test_each_line_is_told_once_in_a_run(tmp_path: Path, monkeypatch):
    config = SimpleNamespace(
        algorithm=SimpleNamespace(loss_type="policy_loss"), rollout=SimpleNamespace(rollout_max_response_len=2),
        checkpoint=SimpleNamespace(save=str(tmp_path), save_interval=4),
    )  # fmt: skip
    (tmp_path / "iter_0000003").mkdir()
    (tmp_path / "iter_0000003" / "weights").write_bytes(bytes(3000))
    monkeypatch.setattr(advice.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2999))
    advisor = Advisor(config)
    told = [
        advisor.after(batch(n, [0, 0, 1, 1]), [{"train/train_rollout_logprob_abs_diff": 0.01}], num_rollout=9) for n in range(6)
    ]
    assert [[line.split(" ")[0] for line in lines] for lines in told] == [["the"], [], ["in", "the"], [], [], []]
    assert "a checkpoint takes 0.000 GB" in told[0][0] and "all ended at the length limit" in told[2][1]
