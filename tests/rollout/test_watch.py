"""Who says that a rollout or an evaluation does not move, also when the event loop is what stands still."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest
from rollout_helpers import sum_in

from slime.rollout import watch
from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.rollout.sglang_rollout import generate_rollout
from slime.types.sample import Sample, Status


def test_silence_is_said_once_a_minute_with_how_many_wait_for_what_and_since_when(monkeypatch, caplog):
    start = time.mktime((2026, 1, 2, 10, 20, 0, 0, 0, -1))
    now = [start]
    monkeypatch.setattr(watch.time, "time", lambda: now[0])
    caplog.set_level("INFO")
    groups = [[Sample(), Sample()], [Sample(), Sample()]]
    silence = watch.Silence("rollout 3")

    def said(seconds, groups, num_back=0):
        caplog.clear()
        now[0] = start + seconds
        silence.look(groups, num_back=num_back)
        return [record.getMessage() for record in caplog.records]

    line = (
        "rollout 3: no sample has ended for 60 s: {} samples of 2 prompts are waiting since {} "
        "({} for an engine, {} for a grader)"
    )
    assert said(0, groups) == said(55, groups) == []
    assert said(60, groups) == [line.format(4, "10:20:00", 4, 0)]
    assert said(90, groups) == [] and len(said(120, groups)) == 1
    groups[0][0].status, groups[0][0].reward = Status.COMPLETED, 1.0  # one sample has ended: that is progress
    groups[0][1].status = Status.TRUNCATED
    assert said(130, groups) == said(185, groups) == []
    assert said(190, groups) == [line.format(3, "10:22:10", 2, 1)]
    assert said(251, groups, num_back=1) == [] and said(300, groups, num_back=1) == []


class Listener(logging.Handler):
    def __init__(self):
        super().__init__(logging.INFO)
        self.lines, self._more = [], threading.Condition()

    def emit(self, record):
        with self._more:
            self.lines.append(record.getMessage())
            self._more.notify_all()

    def first(self, text: str) -> str:
        """The first line that holds `text`, waited for."""
        with self._more:
            assert self._more.wait_for(lambda: any(text in line for line in self.lines), timeout=60), self.lines
        return next(line for line in self.lines if text in line)


@pytest.fixture
def heard(monkeypatch):
    """What the watch says, with a look every 20 ms and silence after 100 ms."""
    monkeypatch.setattr(watch, "_SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(watch, "_LOOK_SECONDS", 0.02)
    listener = Listener()
    watch.logger.addHandler(listener)
    level = watch.logger.level
    watch.logger.setLevel(logging.INFO)
    yield listener
    watch.logger.setLevel(level)
    watch.logger.removeHandler(listener)


@pytest.mark.parametrize("kind", ["rollout", "evaluation"])
def test_what_waits_for_engines_says_so_and_ends_well(heard, rollout_config, runtime_args, router, prompt_file, kind):
    from slime.config import EvalDataset

    common = {"input_key": "prompt", "label_key": "label", "apply_chat_template": True, "max_response_len": 6}
    datasets = (EvalDataset(name="sums", path=prompt_file + "@[:4]", n_samples_per_eval_prompt=2, **common),)
    args = runtime_args(rollout_config(datasets=datasets))
    # Nobody is answered before the silence was said, so nothing here depends on how long that takes.
    router.answer = lambda text, payload: (
        heard.first("no sample has ended") and (f"\\boxed{{{sum_in(text)}}}<|endoftext|>", "stop")
    )
    source = RolloutDataSourceWithBuffer(args)
    output = generate_rollout(args, 4, source, evaluation=kind == "evaluation")
    if kind == "evaluation":
        assert output.data["sums"]["rewards"] == [1] * 8
        line = "evaluation sums: no sample has ended for 0 s: 8 samples of 8 prompts are waiting since"
    else:
        assert len(output.samples) == 4
        line = "rollout 5: no sample has ended for 0 s: 8 samples of 4 prompts are waiting since"
    assert heard.first("no sample has ended").startswith(line)


def blocking(heard) -> str:
    return heard.first("event loop has stood still")  # holds the loop until the watch has spoken


def test_an_event_loop_that_stands_still_is_told_with_the_lines_it_stands_in(heard):
    async def rollout() -> str:
        with watch.Watch(lambda: ([[Sample(reward=1.0, status=Status.COMPLETED)]], 0)):
            return blocking(heard)

    told = asyncio.run(rollout())
    assert "blocking (" in told and "test_watch.py:" in told


def test_the_watch_outlives_an_exception_and_tells_it_once(heard):
    looks = threading.Semaphore(0)

    def waiting():
        looks.release()
        raise RuntimeError("dictionary changed size during iteration")

    async def rollout() -> None:
        with watch.Watch(waiting):
            for _ in range(5):
                await asyncio.to_thread(looks.acquire)

    asyncio.run(rollout())
    assert [line for line in heard.lines if "failed" in line] == [
        "looking after the rollout failed (RuntimeError: dictionary changed size during iteration); looking goes on"
    ]
