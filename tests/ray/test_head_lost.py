"""What a node that is left says of a head that is gone: which node, in which phase, what to do; once."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from slime.ray import head_lost

WAITS = "12:00:0{0} DEBUG slime.ray.standstill: waits for: {1}\n"


@pytest.mark.parametrize(
    ("waits", "phase"),
    [
        (["starting the trainer", "training"], "training"),
        (["training", "fleet resume_memory"], "handing the devices to the engines"),
        ([], "starting"),
    ],
)
def test_the_last_word_names_node_phase_and_remedy_and_one_node_speaks(waits: list[str], phase: str, tmp_path: Path):
    (launched := tmp_path / ".launched").write_text("a-launch\n")
    (log := tmp_path / "driver.log").write_text("".join(WAITS.format(at, what) for at, what in enumerate(waits)))
    (tmp_path / "console.log").write_text("12:00:00 [driver] before\n")
    for file in (launched, log):  # the head's clock is an hour behind that of the nodes which are left
        os.utime(file, (time.time() - 3600, time.time() - 3600))
    for _ in range(2):  # as two nodes would
        assert head_lost.main(["10.0.0.1", str(tmp_path)]) == 0
    before, told = (tmp_path / "console.log").read_text().splitlines()
    assert before.endswith("before") and not (tmp_path / ".launched").exists()
    assert re.fullmatch(
        rf"\d\d:\d\d:\d\d \[.+\] node 10\.0\.0\.1 is gone or out of reach, and with it Ray's head, {phase}: bring it back or "
        "replace it, and run the same command again; it resumes from the last checkpoint",
        told,
    )


def test_the_log_of_a_run_before_tells_no_phase(tmp_path: Path):
    (log := tmp_path / "driver.log").write_text(WAITS.format(0, "training"))
    os.utime(log, (1000, 1000))
    assert ", training: " in head_lost.last_word("10.0.0.1", tmp_path, launched=999)
    assert ", starting: " in head_lost.last_word("10.0.0.1", tmp_path, launched=1001)
