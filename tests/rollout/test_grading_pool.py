"""Workers that grade, and threads that run a user's graders: real processes, real blocking code."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rollout_helpers import make_config

from slime.rollout.grading.pool import GradingError, Pool
from slime.rollout.grading.question import Question
from slime.rollout.rm_hub import async_rm
from slime.rollout.rm_hub.own_code import OwnCode
from slime.types.sample import Sample

ROOT = Path(__file__).resolve().parents[2]


def question(grader="f1", response="a cat", label="cat", **values) -> Question:
    return Question(grader, response, label, values)


@pytest.fixture
def pool():
    made = Pool(2)
    yield made
    made.close()


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def test_a_worker_that_gives_no_verdict_is_ended_and_the_next_question_gets_another(pool):
    assert pool.grade_now(question(), 60) == 1.0
    worker = pool._idle.queue[0]
    long = question(response="a cat " * 4_000_000)  # 24 MB, which a worker has not read in a hundredth of a second
    with pytest.raises(GradingError, match=r"f1 gave no verdict within 0.01 s \(--rm-timeout\)") as caught:
        pool.grade_now(long, 0.01)
    assert caught.value.reason == "timeout"
    assert pool.grade_now(question(), 60) == 1.0 and pool._idle.queue[0].pid != worker.pid


def test_a_worker_that_was_stopped_is_told_and_ended_and_another_one_is_asked(pool, caplog):
    assert pool.grade_now(question(), 60) == 1.0
    worker = pool._idle.queue[0]
    os.kill(worker.pid, signal.SIGSTOP)
    while not stopped(worker.pid):
        pass
    assert pool.grade_now(question(), 2.0) == 1.0, "the answer is not to blame"
    assert [line.startswith(f"a grader (pid {worker.pid}) is stopped (SIGSTOP") for line in caplog.messages] == [True]
    assert [idle.pid != worker.pid for idle in pool._idle.queue] == [True]


def test_workers_that_died_while_they_were_idle_are_not_the_next_questions_fault(pool):
    async def many():
        return await asyncio.gather(*(pool.grade(question(), 60) for _ in range(20)))

    asyncio.run(many())
    for number in (signal.SIGTERM, signal.SIGKILL):
        for worker in pool._idle.queue:
            os.kill(worker.pid, number)
        assert asyncio.run(many()) == [1.0] * 20


def test_an_answer_of_which_two_workers_die_is_an_error_with_a_name_and_the_next_question_gets_another(pool, monkeypatch):
    fork = pool._fork

    def doomed():
        worker = fork()
        os.kill(worker.pid, signal.SIGKILL)
        return worker

    with monkeypatch.context() as patch:
        patch.setattr(pool, "_fork", doomed)
        with pytest.raises(GradingError, match="two processes of grader f1 died of an answer; too little memory?") as caught:
            pool.grade_now(question(), 60)
    assert caught.value.reason == "worker_died"
    pool._nursery.kill()
    pool._nursery.wait()
    assert pool.grade_now(question(), 60) == 1.0


def test_a_question_that_cannot_be_graded_is_the_users_mistake_and_no_verdict(pool):
    with pytest.raises(ValueError, match="no label to grade against"):
        pool.grade_now(question(label=None), 60)
    assert pool._idle.qsize() == 1


def test_two_questions_are_graded_at_a_time_and_no_more_processes_are_started(pool):
    async def many():
        return await asyncio.gather(*(pool.grade(question(), 60) for _ in range(200)))

    assert asyncio.run(many()) == [1.0] * 200
    assert 1 <= pool._idle.qsize() <= 2


def test_workers_end_with_a_process_that_was_killed():
    code = (
        "import os, signal, time\n"
        "from slime.rollout.grading.pool import Pool\nfrom slime.rollout.grading.question import Question\n"
        "pool = Pool(1)\npool.grade_now(Question('f1', 'a', 'a', {}), 60)\n"
        "print(pool._nursery.pid, pool._idle.queue[0].pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, f"{pids} live on"


def test_the_first_verdict_waits_for_no_library_that_it_does_not_need():
    code = (
        "import sys\nimport slime.rollout.rm_hub, slime.rollout.grading.registry as registry\n"
        "from slime.rollout.grading.question import Question\n"
        "assert registry.verdict(Question('math', r'\\boxed{1 1/2}', '1.5', {})) == 1\n"
        "print([name for name in ('torch', 'transformers', 'ray', 'sympy', 'math_verify') if name in sys.modules])\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# ------------------------------------------------------------------------------------------------------- own functions

held = threading.Event()
loops: list[asyncio.AbstractEventLoop] = []


async def blocks(args, sample, **kwargs):
    held.wait(60)
    return 1.0


async def looks_up(args, sample, **kwargs):
    return sample.metadata["gold"]


async def waits(args, sample, **kwargs):
    loops.append(asyncio.get_running_loop())
    await asyncio.sleep(0.01)
    return float(sample.index)


def test_an_own_grader_that_blocks_leaves_the_callers_loop_free_and_is_named_with_its_line():
    held.clear()
    args = make_config(custom_rm_path=f"{__name__}.blocks", rm_timeout=0.3).args

    async def grade():
        grading = asyncio.create_task(async_rm(args, Sample()))
        turns = 0
        while not grading.done():
            await asyncio.sleep(0)
            turns += 1
        assert turns > 10
        await grading

    with pytest.raises(
        GradingError, match=r"blocks gave no reward within 0.3 s .* blocked at .*test_grading_pool.py:\d+ in blocks"
    ):
        asyncio.run(grade())
    held.set()


async def leaves(args, sample, **kwargs):
    if sample.label == "task":
        asyncio.get_running_loop().call_soon(sys.exit, 3)
        return 1.0
    raise {"exit": SystemExit, "interrupt": KeyboardInterrupt, "cancelled": asyncio.CancelledError}[sample.label](3)


@pytest.mark.parametrize(
    "label, kind", [("exit", "SystemExit"), ("interrupt", "KeyboardInterrupt"), ("cancelled", "CancelledError")]
)
def test_a_grader_that_leaves_ends_its_own_grading_and_no_other(label, kind):
    async def ask():
        runner = OwnCode(1)
        for word in (label, "task", label):
            call = runner.run(lambda word=word: leaves(None, Sample(index=0, label=word)), name="leaves", seconds=20)
            if word == "task":
                assert await call == 1.0
                continue
            with pytest.raises(GradingError, match=rf"{kind}: 3 \(.*test_grading_pool.py:\d+ in leaves") as caught:
                await call
            assert caught.value.reason == kind

    asyncio.run(asyncio.wait_for(ask(), 60))


def test_blocking_own_graders_run_side_by_side(monkeypatch):
    monkeypatch.setattr("slime.rollout.rm_hub.own_code.PATIENCE_SECONDS", 0.05)
    runner, together = OwnCode(3), threading.Barrier(3)

    async def meets():  # returns only when three are inside at once
        together.wait(60)
        return True

    async def all_three():
        return await asyncio.gather(*(runner.run(meets, name="meets", seconds=60) for _ in range(3)))

    assert asyncio.run(all_three()) == [True] * 3


def test_own_graders_that_wait_share_one_loop_as_their_clients_expect():
    args = make_config(custom_rm_path=f"{__name__}.waits").args

    async def many():
        return await asyncio.gather(*(async_rm(args, Sample(index=i)) for i in range(50)))

    assert asyncio.run(many()) == [float(i) for i in range(50)]
    assert len(loops) == 50 and len(set(loops)) == 1
