"""What /proc tells of a process that has ended, checked against processes that end in known ways."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slime.ray.fates import Process, _stat, death, process_in, read_fate, stopped_below
from slime.ray.keeper import keep
from tools.drills.faults import inflict, memory_groups


def ended(command: list[str], number: int | None = None) -> str | None:
    """The fate of a child of ours that has ended and was not waited for yet."""
    child = subprocess.Popen(command)
    process = Process("here", child.pid, _stat(child.pid)[-1])
    if number is None:
        assert os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT) is not None
    else:
        os.kill(child.pid, number)
        os.waitid(os.P_PID, child.pid, (os.WSTOPPED if number == signal.SIGSTOP else os.WEXITED) | os.WNOWAIT)
    fate = read_fate(process)
    child.kill()
    child.wait()
    assert read_fate(process) == "is gone"
    return fate


def test_exit_codes_and_signals_are_told():
    assert ended(["sh", "-c", "exit 3"]) == "exited with 3"
    assert ended(["sleep", "100"], signal.SIGTERM) == "was killed by signal 15 (SIGTERM)"
    killed = ended(["sleep", "100"], signal.SIGKILL)
    assert killed.startswith("was killed by signal 9 (SIGKILL)") and "memory" in killed


@pytest.mark.skipif(memory_groups() is None or not os.access("/dev/kmsg", os.R_OK), reason="no cgroups or no kernel's log here")
def test_a_process_that_the_kernel_killed_for_want_of_memory_is_told_so():
    eats = "import sys; print('up', flush=True); sys.stdin.readline(); bytearray(b'x') * (1 << 26)"
    with subprocess.Popen([sys.executable, "-c", eats], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        child.stdout.readline()
        undo, process = inflict("oom", child.pid, stop_seconds=0), Process("here", child.pid, _stat(child.pid)[-1])
        child.stdin.write("\n")
        child.stdin.flush()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert read_fate(process) == "was killed by signal 9 (SIGKILL) by the kernel, because memory had run out"
        since = ["python", "-m", "slime.observability.memory_kills"]
        told = subprocess.run([*since, "60"], capture_output=True, text=True, check=True).stdout
        assert re.fullmatch(
            rf"; meanwhile the kernel has killed .*\b{child.pid} \(python\).* here, because memory had run out", told
        )
        assert subprocess.run([*since, "0"], capture_output=True, text=True, check=True).stdout == ""
    undo()
    assert read_fate(process) == "was killed by the kernel, because memory had run out", "also once nobody has its status"


def test_a_stopped_process_is_told_with_what_lets_it_go_on():
    assert ended(["sleep", "100"], signal.SIGSTOP).startswith("is stopped (SIGSTOP, or a debugger; kill -CONT ")


def test_a_stopped_descendant_is_told_to_whoever_asks_after_the_one_that_waits_for_it():
    with subprocess.Popen(["sh", "-c", "(sleep 97; true) & wait"]) as waits:
        children = Path(f"/proc/{waits.pid}/task/{waits.pid}/children")
        try:
            while not (child := children.read_text().split()):
                pass
            assert stopped_below(waits.pid) == []
            os.kill(int(child[0]), signal.SIGSTOP)
            os.kill(waits.pid, signal.SIGSTOP)  # itself is told by its own fate
            (line,) = stopped_below(waits.pid)
            assert (
                line
                == f"its process {child[0]} (sh) is stopped (SIGSTOP, or a debugger; kill -CONT {child[0]} there lets it go on)"
            )
        finally:
            os.kill(int(child[0]), signal.SIGKILL)
            waits.kill()


def test_a_process_that_runs_has_no_fate_and_a_later_one_of_its_number_is_not_taken_for_it():
    pid = os.getpid()
    born = _stat(pid)[-1]
    assert read_fate(Process("here", pid, born)) is None and read_fate(Process("here", pid)) is None
    assert read_fate(Process("here", pid, born + 1)) == "is gone"
    assert 0 < time.clock_gettime(time.CLOCK_BOOTTIME) - born / os.sysconf("SC_CLK_TCK") < 86400


@pytest.mark.parametrize(
    "text, process",
    [
        (
            "The actor died.\n\tclass_name: A\n\tpid: 9432\n\tnamespace: x\n\tip: 10.0.0.7\nIt is dead.",
            Process("10.0.0.7", 9432),
        ),
        ("The actor died because its node has died. Node Id: 3", None),
    ],
)
def test_the_process_is_read_from_rays_words(text, process):
    assert process_in(RuntimeError(text)) == process


def test_rays_memory_monitor_is_told_as_the_cause():
    """In the words with which Ray 2.60 ends an actor's call, as a run with RAY_memory_usage_threshold=0.02 shows them."""
    error = RuntimeError(
        "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7)\nwas 2.00GB"
    )
    assert death(error, None) == (
        "was killed by Ray's memory monitor: 1 worker(s) were killed due to the node running low on memory. "
        "Memory on the node (IP: 10.0.0.7) was 2.00GB"
    )


def test_a_worker_that_heard_sigterm_is_told_by_rays_words_for_it_leaves_with_1():
    said = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: RolloutActor\n\tactor_id: "
        f"{'38eeb7ac' * 4}\n\tpid: 25181\n\tnamespace: a21a75c4-8dc4-4792-862b-d18a148a4443\n\tip: 192.0.2.2\n"
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
        "exits unexpectedly by a signal. SystemExit is raised (sys.exit is called). Exit code: 1. "
        "The process receives a SIGTERM."
    )
    assert death(RuntimeError(said), None) == "was ended by a SIGTERM that somebody sent"


@pytest.mark.parametrize("script, status", [("exit 3", 3 << 8), ("kill -9 $$", 9), ("kill -15 $$", 15)])
def test_a_keeper_writes_how_the_process_ended_although_it_is_not_its_parent(tmp_path, script, status):
    note = tmp_path / "note"
    child = subprocess.Popen(["sh", "-c", f"read line; {script}"], stdin=subprocess.PIPE)
    keep(child.pid, str(note))
    deadline = time.monotonic() + 60
    while not any(_waits_on_a_pidfd(pid) for pid in os.listdir("/proc") if str(note) in _command(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.stdin.write(b"go\n")
    child.stdin.close()
    while not note.exists() and time.monotonic() < deadline:
        time.sleep(0.01)  # the child stays a zombie: nobody has waited for it yet
    assert note.read_text() == str(status)
    child.wait()


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _waits_on_a_pidfd(pid: str) -> bool:
    try:
        return any("pidfd" in os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:  # it was opening its files
        return False
