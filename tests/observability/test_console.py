"""What a person reads of a job, from what Ray's client printed around real runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slime.observability.console import readable

BEFORE = """\
2026-11-30 04:08:31,932\tINFO cli.py:42 -- \x1b[37mJob submission server address\x1b[39m: \x1b[1mhttp://127.0.0.1:42385\x1b[22m
2026-11-30 04:08:32,688\tSUCC cli.py:66 -- \x1b[32m--------------------------------------------------------\x1b[39m
2026-11-30 04:08:32,688\tSUCC cli.py:67 -- \x1b[32mJob 'slime-1' submitted successfully\x1b[39m
2026-11-30 04:08:32,688\tINFO cli.py:331 -- Query the logs of the job:
2026-11-30 04:08:32,482\tINFO job_manager.py:581 -- Runtime env is setting up.
Running entrypoint for job slime-1: python3 -m slime.train --num-layers 8
04:08:44 [driver] model: 2,499,456 parameters
\x1b[36m(TrainActor pid=14441)\x1b[0m 04:08:44 [trainer 0] load /x
\x1b[36m(RolloutActor pid=7, ip=10.0.0.2)\x1b[0m 04:08:45 [rollout] 8 prompts
\x1b[36m(RolloutActor pid=7, ip=10.0.0.2)\x1b[0m   its log ends with this
\x1b[36m(RolloutActor pid=7, ip=10.0.0.2)\x1b[0m a user's own print
"""
READ = ["04:08:44 [driver] model: 2,499,456 parameters", "04:08:44 [trainer 0] load /x", "04:08:45 [rollout] 8 prompts",
        "  its log ends with this", "(RolloutActor pid=7, ip=10.0.0.2) a user's own print"]  # fmt: skip
WELL = """\
2026-11-30 04:08:57,797\tINFO sdk.py:520 -- WebSocket closed for job slime-1 with close code 1000
2026-11-30 04:08:57,807\tSUCC cli.py:67 -- \x1b[32mJob 'slime-1' succeeded\x1b[39m
"""
BADLY = """\
04:09:00 [driver] the run stopped: KeyError: 'gold'
2026-11-30 04:09:01,807\tERR cli.py:74 -- \x1b[31m-----------------------------\x1b[39m
2026-11-30 04:09:01,807\tERR cli.py:75 -- \x1b[31mJob 'slime-1' failed\x1b[39m
2026-11-30 04:09:01,807\tERR cli.py:76 -- \x1b[31m-----------------------------\x1b[39m
2026-11-30 04:09:01,807\tINFO cli.py:89 -- Status message: Job entrypoint command failed with exit code 1, last available logs (truncated to 20,000 chars):
04:09:00 [driver] the run stopped: KeyError: 'gold'
"""  # noqa: E501
NEVER_BEGAN = """\
2026-11-30 04:09:01,807\tERR cli.py:75 -- Job 'slime-1' failed
2026-11-30 04:09:01,807\tERR cli.py:89 -- Status message: runtime_env setup failed: no such folder
"""


def test_a_person_reads_the_jobs_own_lines():
    assert list(readable((BEFORE + WELL).splitlines(keepends=True))) == READ


def test_a_failure_is_told_once():
    shown = list(readable((BEFORE + BADLY).splitlines(keepends=True)))
    assert shown == [*READ, "04:09:00 [driver] the run stopped: KeyError: 'gold'"]


LOST = """\
Traceback (most recent call last):
  File "/x y/.venv/bin/ray", line 8, in <module>
    sys.exit(main())
RuntimeError: WebSocket connection closed unexpectedly with close code 1006
"""


def test_a_client_that_lost_its_cluster_says_nothing_and_a_users_traceback_stays():
    theirs = ["Traceback (most recent call last):", '  File "/my/reward.py", line 3, in reward', "KeyError: 'gold'"]
    lines = [*(BEFORE + "\n".join(theirs) + "\n" + LOST).splitlines(keepends=True)]
    assert list(readable(lines)) == [*READ, *theirs]
    assert list(readable(theirs[:1])) == theirs[:1]


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (1, None),
        (2, None),
        (143, None),
        (137, "the job's driver (python -m slime.train) was killed by signal 9 (SIGKILL)"),
        (-9, "the job's driver (python -m slime.train) was killed by signal 9 (SIGKILL)"),
        (134, "the job's driver (python -m slime.train) was killed by signal 6 (SIGABRT)"),
    ],
)
def test_a_driver_that_was_killed_is_told_by_its_status_because_it_said_nothing_itself(status: int, told: str | None):
    lines = (BEFORE + BADLY.replace("exit code 1,", f"exit code {status},")).splitlines(keepends=True)
    assert list(readable(lines)) == [*READ, "04:09:00 [driver] the run stopped: KeyError: 'gold'", *([told] if told else [])]
    why = "; meanwhile the kernel has killed 4242 (python) here, because memory had run out"
    last = list(readable(lines, lambda: why))[-1]
    assert last.endswith(why) == (status in (137, -9)), "whoever was killed otherwise was not killed for memory"


def test_what_only_rays_client_knows_is_told():
    assert list(readable(NEVER_BEGAN.splitlines(keepends=True))) == ["Status message: runtime_env setup failed: no such folder"]


def test_the_file_has_all_of_it(tmp_path: Path):
    command = [sys.executable, "-m", "slime.observability.console", "--log", str(tmp_path / "run" / "console.log")]
    done = subprocess.run(command, input=BEFORE + BADLY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[: len(READ)] == READ
    assert (tmp_path / "run" / "console.log").read_text() == BEFORE + BADLY
