"""A folder has one run at a time. Real processes; records of other machines are written by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from slime.observability import owner
from slime.observability.owner import RECORD, Owned, owned, take, this_process

HOLDER = """
import sys, time
from slime.observability.owner import owned
with owned(sys.argv[1], what="--save"):
    print("mine", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path, **environment: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | environment,
    )  # fmt: skip
    assert process.stdout.readline() == "mine\n"
    return process


def test_a_second_run_is_refused_with_who_has_the_folder_and_a_third_follows_the_end_of_the_first(tmp_path: Path):
    first = holder(tmp_path)
    with pytest.raises(Owned, match=rf"--save {tmp_path} belongs to another run, pid {first.pid} on .*\(kill {first.pid}\)"):
        with owned(tmp_path, what="--save"):
            raise AssertionError("two runs in one folder")
    first.communicate("")
    with owned(tmp_path, what="--save"):
        assert json.loads((tmp_path / RECORD).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == [], "nothing is left, also of the one that was refused"


def test_the_record_of_a_killed_run_does_not_count_but_that_of_its_children_does(tmp_path: Path):
    first = holder(tmp_path, SLIME_LAUNCH="a-launch")
    child = subprocess.Popen(["sleep", "100"], env=os.environ | {"SLIME_LAUNCH": "a-launch"})
    while not Path(f"/proc/{child.pid}/environ").read_bytes():  # it has no environment for a moment of its exec
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    with pytest.raises(
        Owned, match=rf"it has ended, but processes of it live: {child.pid}\); wait for it, end it \(kill {child.pid}\)"
    ):
        take(tmp_path, this_process(), what="--save")
    child.kill()
    child.wait()
    take(tmp_path, this_process(), what="--save")


def test_a_driver_shares_the_folder_that_its_launcher_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLIME_LAUNCH", "ours")
    take(tmp_path, this_process(), what="SAVE")
    driver = holder(tmp_path)
    driver.communicate("")
    assert driver.returncode == 0 and (tmp_path / RECORD).exists(), "the launcher's own record stays"


def test_a_process_number_that_was_used_again_is_another_process(tmp_path: Path):
    mine = this_process()
    (tmp_path / RECORD).write_text(json.dumps(asdict(replace(mine, ticks=mine.ticks - 1, launch="gone"))))
    take(tmp_path, mine, what="--save")


def record_from_afar(folder: Path, age: float) -> Path:
    """Of a run on another machine; age: of its last touch, in seconds by this machine's clock."""
    theirs = replace(this_process(), host="far", machine="another boot", launch="theirs", pid=1)
    (file := folder / RECORD).write_text(json.dumps(asdict(theirs)))
    stamp = file.stat().st_mtime - age
    os.utime(file, (stamp, stamp))
    return file


@pytest.mark.parametrize("ahead", [3600, -3600])
def test_a_machine_whose_clock_differs_by_an_hour_counts_while_its_record_is_touched_and_no_longer(
    tmp_path, ahead, monkeypatch
):
    """On a file system that stamps by the writer's clock."""
    monkeypatch.setattr(owner, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(owner, "WATCH_SECONDS", 1.0)
    file = record_from_afar(tmp_path, -ahead)
    toucher = threading.Timer(0.2, lambda: os.utime(file, (time.time() + ahead, time.time() + ahead)))
    toucher.start()
    off = f"{-ahead / 60:+.0f}".replace("+", r"\+")
    with pytest.raises(
        Owned, match=rf"pid 1 on far .*it said so just now, by a clock that is about {off} min off this machine"
    ):
        take(tmp_path, this_process(), what="--save")
    toucher.join()
    take(tmp_path, mine := this_process(), what="--save")
    assert owner.read(file) == mine


@pytest.mark.parametrize(("age", "counts"), [(5, True), (owner.STALE_SECONDS + 5, False)])
def test_another_machine_counts_while_its_record_is_touched(tmp_path: Path, age: float, counts: bool, monkeypatch):
    monkeypatch.setattr(owner, "WATCH_SECONDS", 0.1)
    file = record_from_afar(tmp_path, age)
    if counts:
        with pytest.raises(Owned, match=rf"pid 1 on far .*or remove {file} if it is gone"):
            take(tmp_path, this_process(), what="--save")
    else:
        take(tmp_path, this_process(), what="--save")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"pid": "x"}'])
def test_a_file_that_is_no_record_does_not_count(tmp_path: Path, content: str):
    (tmp_path / RECORD).write_text(content)
    take(tmp_path, this_process(), what="--save")


def test_of_many_at_once_one_gets_the_folder(tmp_path: Path):
    (tmp_path / RECORD).write_text(json.dumps(asdict(replace(this_process(), ticks=1, launch="gone"))))
    processes = [
        subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for _ in range(6)
    ]  # fmt: skip
    losers = [process for process in processes if process.stdout.readline() != "mine\n"]
    assert len(losers) == 5
    assert all("Owned: --save" in process.communicate("")[1] for process in losers)
    for process in processes:
        process.communicate("") if process not in losers else None


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--save .*/file/x cannot be written"):
        take(tmp_path / "file" / "x", this_process(), what="--save")
