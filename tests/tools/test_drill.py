"""Drills: what is drawn, what the judge says of transcripts written by hand, what is seen of real processes, the table."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tools.drills.draw import FAULTS, PHASES, PICKED_ALONE, PROCESSES, draw, exists, pick
from tools.drills.faults import inflict, memory_groups
from tools.drills.following import phase_of
from tools.drills.judge import ENDS_WITHIN, Line, Observed, judge
from tools.drills.scene import MARK, Scene, Seen, by_role, forks_of, look
from tools.drills.table import Row, counts, markdown, read


@pytest.mark.parametrize("seed", range(20))
def test_the_first_drills_of_a_seed_have_every_process_fault_and_phase(seed):
    first = [draw(seed, number) for number in range(len(PROCESSES))]
    assert sorted(one.process for one in first) == sorted(PROCESSES)
    assert {one.fault for one in first} == set(FAULTS) and {one.phase for one in first} == set(PHASES)
    many = [*first, *(draw(seed, number) for number in range(12, 60))]
    assert all(exists(one.process, one.phase) for one in many)


def test_a_drill_is_a_function_of_seed_and_number():
    assert [draw(3, number) for number in range(30)] == [draw(3, number) for number in range(30)]
    assert draw(3, 20) != draw(4, 20)
    assert len({(one.process, one.fault, one.phase) for one in (draw(1, number) for number in range(200))}) > 100
    with pytest.raises(AssertionError, match="numbered from 0"):
        draw(1, -1)


def test_without_engines_only_what_is_there_is_drawn():
    drawn = [draw(5, number, engines=False) for number in range(200)]
    assert {one.phase for one in drawn} == {"start", "train", "save"} and not any(one.tolerant for one in drawn)
    assert {one.process for one in drawn} == {"launcher", "head", "raylet", "driver", "rollout", "trainer", "writer"}


def test_any_drill_can_be_picked_and_one_that_there_is_not_is_refused():
    one = pick("writer", "kill", "save", tolerant=False)
    assert (one.seed, one.process, one.fault, one.phase, one.tolerant) == (0, "writer", "kill", "save", False)
    faults = (*FAULTS, *PICKED_ALONE)
    numbers = [pick(p, f, h, tolerant=True).number for p in PROCESSES for f in faults for h in PHASES if exists(p, h)]
    # 12 processes x 5 faults x 7 phases, less 6 phases of the writer and the start of three others.
    assert sorted(numbers) == list(range(5 * (12 * 7 - 6 - 3)))
    assert pick("trainer", "stop", "train", tolerant=True).number == 230, "as in every table so far"
    with pytest.raises(ValueError, match="no drill writer kill train"):
        pick("writer", "kill", "train", tolerant=True)
    with pytest.raises(ValueError, match="no drill writer kill train"):
        pick("trainer", "kill", "train", tolerant=True, beside=("writer", "kill"))
    both = pick("scheduler", "kill", "generate", tolerant=True, beside=("router", "stop"))
    assert str(both).endswith(": kill of scheduler with stop of router in generate")


NAMED = (
    "07:41:20 [driver] the run stopped: trainer rank 1 (pid 4242 on 10.0.0.7) was killed by signal 9 (SIGKILL), while training"
)


def observed(
    *lines: tuple[float, str], process="trainer", status=1, ended_at=130.0, went_on=False, left=(), label="", pid=4242
):
    told = [Line(at, text) for at, text in lines]
    return Observed(process, pid, label, 100.0, told, ended_at, status, went_on, left)


def test_an_end_that_is_named_and_clean_is_what_is_promised():
    verdict = judge(observed((99.0, "07:41:19 [driver] rollout 1/2"), (104.0, NAMED)))
    assert (verdict.outcome, verdict.faults) == ("named", ())
    assert (verdict.seconds_to_cause, verdict.seconds_to_end) == (4.0, 30.0)
    assert verdict.cause == NAMED


@pytest.mark.parametrize(
    ("line", "process", "label"),
    [
        ("(said before) " + NAMED, "trainer", ""),
        ("07:41:20 [driver] the run stopped: trainer rank 0 (pid 4241 on 10.0.0.7) was killed by signal 9", "trainer", ""),
        ("07:41:20 [driver] trainer rank 1 (pid 4242 on 10.0.0.7) is at 814", "trainer", ""),
        ("07:41:20 [rollout] engine default-decode-1 was killed by signal 9 (SIGKILL)", "rollout", ""),
        ("07:41:20 ERROR slime.ray.run: generating rollout 2 died", "rollout", ""),
        ("07:41:20 [driver] engine default-prefill-0 was killed by signal 9 (SIGKILL)", "scheduler", "default-decode-1"),
        ("07:41:20 [router] ready", "router", ""),
        ("[launch] Ray itself ended, and the job with it; its last lines are above", "raylet", ""),
    ],
)
def test_a_line_that_names_somebody_else_or_nothing_that_happened_is_no_cause(line, process, label):
    at = 99.0 if line.startswith("(said") else 104.0
    verdict = judge(observed((at, line), process=process, label=label))
    assert (verdict.outcome, verdict.cause, verdict.seconds_to_cause) == ("unnamed", "", None)
    assert verdict.faults == (f"no line names {process} and what happened to it",)


@pytest.mark.parametrize(
    ("line", "process", "label"),
    [
        ("07:41:20 [driver] the run stopped: rollout (pid 4242 on 10.0.0.7) was killed by signal 15 (SIGTERM)", "rollout", ""),
        ("engine default-decode-1 was killed by signal 9 (SIGKILL); its log ...", "scheduler", "default-decode-1"),
        ("engine default-prefill-0 cannot be asked: its actor on 10.0.0.7 exited with 1", "engine-actor", "default-prefill-0"),
        ("[launch] error: Ray itself ended, and the job with it: gcs_server [exit code=-9]", "head", ""),
        ("07:41:20 [driver] router was killed by signal 9 (SIGKILL)", "router", ""),
        (
            "02:04:00 [rollout] default-prefill-0, default-decode-1 died and nobody can take its place: ending all requests",
            "scheduler",
            "default-prefill-0",
        ),
        ("OSError: the process that wrote __0_0.distcp ended with exit code -9 before the file was whole", "writer", ""),
        ("07:41:20 [driver] stopped from outside (SIGTERM): ending engines and trainer", "launcher", ""),
        ("  trainer rank 0 (pid 4242 on 10.0.0.7): is stopped (SIGSTOP, or a debugger)", "trainer", ""),
        (
            "  engine default-decode-1: its actor (pid 4242 on 10.0.0.7) is stopped (SIGSTOP, or",
            "engine-actor",
            "default-decode-1",
        ),
        ("[launch] the job's driver (pid 4242) is stopped (SIGSTOP, or a debugger; kill -CONT 4242 there lets", "driver", ""),
    ],
)
def test_lines_that_do_name_it(line, process, label):
    assert judge(observed((104.0, line), process=process, label=label)).outcome == "named"


def test_of_two_faults_at_once_either_may_be_named():
    stopped = (104.0, "07:41:20 WARNING x: the router (pid 77) is stopped (SIGSTOP, or a debugger; kill -CONT 77 there lets")
    assert judge(observed(stopped, process="scheduler", label="default-decode-1")).outcome == "unnamed"
    both = replace(observed(stopped, process="scheduler", label="default-decode-1"), beside=("router", 77, ""))
    assert judge(both).outcome == "named"
    assert judge(replace(both, lines=[Line(104.0, "engine default-decode-1 was killed by signal 9")])).outcome == "named"
    assert judge(replace(both, lines=[Line(104.0, "a grader (pid 5) is stopped (SIGSTOP")])).outcome == "unnamed"


def test_what_is_left_behind_fails_a_named_end_and_a_survivor_alike():
    left = ("process 77 sglang::scheduler", "/dev/shm/sglang_loads_1.shm")
    for went_on, status, outcome in ((False, 1, "named"), (True, 0, "survived")):
        verdict = judge(observed((104.0, NAMED), went_on=went_on, status=status, left=left))
        assert verdict.outcome == outcome
        assert verdict.faults == ("left behind: process 77 sglang::scheduler, /dev/shm/sglang_loads_1.shm",)


def test_a_survivor_need_not_say_anything_and_status_0_with_work_undone_is_no_survival():
    assert judge(observed(went_on=True, status=None, ended_at=None)).outcome == "survived"
    assert judge(observed((104.0, NAMED), status=0)).faults == ("ended with status 0 and work undone",)
    assert judge(observed((104.0, NAMED), status=1, went_on=True)).outcome == "named", (
        "it ended: what it did before is no survival"
    )


@pytest.mark.parametrize("ended_at", [None, 100.0 + ENDS_WITHIN + 1])
def test_a_run_that_neither_goes_on_nor_ends_in_time_hangs(ended_at):
    verdict = judge(observed((104.0, NAMED), status=None if ended_at is None else 1, ended_at=ended_at))
    assert verdict.outcome == "hung" and verdict.faults == ("neither went on nor ended within 300 s",)


@pytest.mark.parametrize(
    ("waits", "phase"),
    [
        ("generating rollout 3", "generate"),
        ("evaluating after rollout 3", "evaluate"),
        ("fleet release_memory None", "hand-over"),
        ("waking the trainer", "hand-over"),
        ("training", "train"),
        ("saving rollout 3", "save"),
        ("sending weights v4", "sync"),
        ("fleet pause", "sync"),
        ("loading the checkpoint", "start"),
        ("state 3", None),
    ],
)
def test_the_drivers_log_says_which_phase_begins(waits, phase):
    assert phase_of(f"07:41:20 DEBUG slime.ray.standstill: waits for: {waits}") == phase
    assert phase_of(f"07:41:20 INFO slime.train: {waits}") is None


def test_processes_are_told_apart_by_command_line_title_and_parent():
    rows = {
        1: ("/x/ray/core/src/ray/gcs/gcs_server", "--log_dir=/tmp"),
        2: ("/x/ray/core/src/ray/raylet/raylet", "--raylet_socket_name=/tmp"),
        3: ("/x/python", "-m", "slime.train", "--colocate"),
        4: ("/bin/sh", "-c", "/x/python -m slime.train --colocate"),
        5: ("ray::RolloutActor.generate",),
        6: ("ray::TrainActor.train",),
        7: ("ray::TrainActor.save",),
        8: ("python", "-P", "/x/nursery.py", "61"),
        9: ("python", "-P", "/x/nursery.py", "61"),
        10: ("sglang::scheduler",),
        11: ("ray::EngineActor",),
        12: ("sglang::router",),
        13: ("sglang::detokenizer",),
    }
    parents = {7: 6, 8: 5, 9: 8, 10: 11, 6: 2}
    roles = by_role({pid: Seen(pid, pid, parents.get(pid, 0), "S", words) for pid, words in rows.items()})
    found = {role: [seen.pid for seen in some] for role, some in roles.items()}
    assert found == {
        "head": [1], "raylet": [2], "driver": [3], "rollout": [5], "trainer": [6], "writer": [7], "nursery": [8], "grader": [9],
        "scheduler": [10], "engine-actor": [11], "router": [12],
    }  # fmt: skip


SLEEPER = """
import mmap, os, subprocess, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.write(file, b"x" * 4096)
kept = mmap.mmap(file, 4096)
# A child that has wiped the mark from its environment, as Ray's agents do.
child = subprocess.Popen(["sleep", "60"], env={}, start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""


def test_what_a_launch_leaves_behind_is_seen_also_of_a_child_that_hides(tmp_path: Path):
    shared = Path(f"/dev/shm/drill-test-{os.getpid()}")
    (tmp_path / ".slime-owner").touch()
    sleeper = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(shared)], env=os.environ | {MARK: "m"}, stdout=subprocess.PIPE, text=True
    )
    child = int(sleeper.stdout.readline())
    try:
        scene = Scene(sleeper.pid, "m")
        assert {sleeper.pid, child} == set(scene.update(maps=True))
        assert Scene(sleeper.pid, "another").update() == {}
        sleeper.kill()
        sleeper.wait()
        assert scene.left([tmp_path], None) == [f"process {child} sleep 60", str(shared), str(tmp_path / ".slime-owner")]
    finally:
        shared.unlink(missing_ok=True)
        os.kill(child, signal.SIGKILL)
    (tmp_path / ".slime-owner").unlink()
    deadline = time.monotonic() + 10
    while (left := scene.left([tmp_path], None)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def test_a_fork_is_found_by_its_parent_and_other_children_are_not():
    code = "import os, subprocess, time; subprocess.Popen(['sleep', '60']); n = os.fork()"
    code += "\nif n: print(n, flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        fork = int(parent.stdout.readline())
        seen = look()
        try:
            assert [one.pid for one in forks_of([seen[parent.pid]])] == [fork]
        finally:
            for one in (seen[pid] for pid in seen if seen[pid].parent == parent.pid):
                os.kill(one.pid, signal.SIGKILL)
            parent.kill()


HOLDS = "import sys, time\nprint('up', flush=True)\nsys.stdin.readline()\nbytearray(1 << 28)\nprint('has it', flush=True)"


def test_a_process_short_of_memory_cannot_take_more_until_it_is_undone():
    def asks(*, undone: bool, hard: int = resource.RLIM_INFINITY) -> str:
        with subprocess.Popen(
            [sys.executable, "-c", HOLDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            process.stdout.readline()
            resource.prlimit(process.pid, resource.RLIMIT_AS, (hard, hard))
            undo = inflict("memory", process.pid, stop_seconds=0)
            assert resource.prlimit(process.pid, resource.RLIMIT_AS)[1] == hard, "what a grader has: nobody may raise it"
            if undone:
                undo()
            out, error = process.communicate("\n")
        return out + error

    assert "MemoryError" in asks(undone=False)
    assert "MemoryError" in asks(undone=False, hard=1 << 33)
    assert asks(undone=True) == asks(undone=True, hard=1 << 33) == "has it\n"


TOUCHES = HOLDS.replace("bytearray(1 << 28)", "x = bytearray(b'x') * (1 << 26)")


@pytest.mark.skipif(memory_groups() is None, reason="no cgroups whose memory this user may limit")
def test_a_process_in_a_group_without_memory_is_killed_by_the_kernel_when_it_takes_more():
    def asks(*, undone: bool) -> tuple[int, str]:
        with subprocess.Popen(
            [sys.executable, "-c", TOUCHES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            process.stdout.readline()
            undo = inflict("oom", process.pid, stop_seconds=0)
            if undone:
                undo()
            out, _ = process.communicate("\n")
        if not undone:
            undo()
        return process.returncode, out

    assert asks(undone=False) == (-signal.SIGKILL, "")
    assert asks(undone=True) == (0, "has it\n")
    assert list(memory_groups().glob("slime-drill-*")) == []


def test_a_stopped_process_goes_on_after_the_time_and_nobody_else_is_woken():
    with subprocess.Popen(["sleep", "60"]) as process:

        def state() -> str:
            return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]

        try:
            undo = inflict("stop", process.pid, stop_seconds=0.2)
            deadline = time.monotonic() + 10
            while state() == "T" and time.monotonic() < deadline:
                time.sleep(0.02)
            assert state() != "T"
            undo()
            with pytest.raises(ValueError, match="no fault 'burn'"):
                inflict("burn", process.pid, stop_seconds=0)
        finally:
            process.kill()


def row(number: int, outcome: str, *, cause: float | None = None, end: float | None = None, **other) -> Row:
    given = dict(left=(), faults=(), resumed=True, exact=None) | other
    return Row(1, number, "router", "kill", "sync", True, outcome, "", cause, end, **given)


def test_the_table_counts_and_names_the_longest():
    rows = [
        row(0, "survived", cause=99.0, end=130.0),
        row(1, "named", cause=4.0, end=30.0, exact=True),
        row(2, "named", cause=7.4, end=20.0, left=["process 7 x"], resumed=False),
        row(3, "unnamed", end=200.0, exact=False),
    ]
    assert counts(rows) == {
        "drawn": 4, "survived": 1, "named": 2, "unnamed": 1, "hung": 0, "leaked": 1, "not resumed": 1, "not equal": 1,
    }  # fmt: skip
    text = markdown(rows)
    assert "Longest time from a fault to the named cause: 7 s (1/2, kill of router in sync)." in text
    assert "Longest time from a fault to the end of the run: 200 s (1/3, kill of router in sync)." in text
    assert "| 1/2 | kill | router | sync | yes | named | 7 s | 20 s | **no** | - | process 7 x |" in text
    assert "| 1/0 | kill | router | sync | yes | survived | 99 s | - |" in text, "it ended with its last rollout"


def test_a_drill_with_flags_of_its_own_is_another_one_and_says_them(tmp_path: Path):
    rows = [row(0, "named"), replace(row(0, "survived"), flags="--snapshot-interval 1")]
    file = tmp_path / "drills.jsonl"
    file.write_text("".join(json.dumps(asdict(one)) + "\n" for one in rows))
    assert [(one.outcome, one.flags) for one in read(file)] == [("named", ""), ("survived", "--snapshot-interval 1")]
    assert "| 1/0 `--snapshot-interval 1` | kill | router |" in markdown(read(file))


def test_a_drill_with_a_second_fault_is_another_one_and_names_both(tmp_path: Path):
    file = tmp_path / "drills.jsonl"
    rows = [row(0, "named"), replace(row(0, "survived"), second="stop of trainer")]
    file.write_text("".join(json.dumps(asdict(one)) + "\n" for one in rows))
    assert [(one.outcome, one.second) for one in read(file)] == [("named", ""), ("survived", "stop of trainer")]
    assert "| 1/0 | kill | router, stop of trainer | sync |" in markdown(read(file))


def test_a_drill_that_was_made_again_counts_once(tmp_path: Path):
    file = tmp_path / "drills.jsonl"
    file.write_text("".join(json.dumps(asdict(one)) + "\n" for one in (row(1, "hung"), row(0, "survived"), row(1, "named"))))
    assert [(one.number, one.outcome) for one in read(file)] == [(0, "survived"), (1, "named")]
