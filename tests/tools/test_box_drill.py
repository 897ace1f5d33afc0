"""How a drill of a box is judged: by transcripts written by hand, and by what is really left on a node."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tools import box_drill, box_fitness, box_layouts, cluster_box
from tools.box_drill import Row, left_on, says_all, table
from tools.drills import everything
from tools.drills.draw import PHASES
from tools.drills.everything import Part

ENDED = Row("die", "train", "train", "named", "node 10.98.0.2 is gone, ...", 9.4, 31.0, 2.2, [], 1, True)


@pytest.mark.parametrize(
    ("line", "whole"),
    [
        ("the run stopped: node 10.98.0.2 is gone, training: replace it, and run the same command again; it resumes", True),
        ("the run stopped: trainer rank 1 (pid 7 on 10.98.0.2) was killed by signal 9 (SIGKILL), while training", False),
        ("node 10.98.0.2 is gone: replace it, and run the same command again", False),
        ("node 10.98.0.1 is gone, training: replace it, and run the same command again", False),
    ],
)
def test_one_line_has_to_name_node_phase_and_remedy(line: str, whole: bool):
    assert says_all(line, ["10.98.0.2"]) is whole


def test_of_nodes_that_are_parted_all_have_to_be_named():
    line = "nodes 10.98.0.3, 10.98.0.4 are gone, training: bring them back or replace them, and run the same command again; it"
    assert says_all(line, ["10.98.0.3", "10.98.0.4"])
    assert not says_all(line.replace(", 10.98.0.4", ""), ["10.98.0.3", "10.98.0.4"])


def test_a_drill_fails_by_silence_by_what_stays_and_by_a_resume_from_elsewhere():
    assert not ENDED.failed
    for change in ({"outcome": "hung"}, {"outcome": "unnamed"}, {"left": ["node2: process x"]}, {"resumed": False}):
        assert replace(ENDED, **change).failed, change
    assert table([ENDED]).splitlines()[-1] == "| all processes of node 2 end | train | named | 9 s | 31 s | 2 s | yes |"


def test_one_command_runs_every_layout_misfit_fault_and_phase(tmp_path: Path):
    tool = [sys.executable, str(Path(box_drill.__file__))]
    said = subprocess.run([*tool, "all", str(tmp_path / "all"), "--dry"], capture_output=True, text=True, check=True).stdout
    lines = [line.partition(": ")[2].split() for line in said.splitlines()]
    assert {line[-1] for line in lines if line[1].endswith("/box_layouts.py")} == box_layouts.LAYOUTS.keys()
    assert {line[-1] for line in lines if line[1].endswith("/box_fitness.py")} == box_fitness.MISFITS.keys()
    drills = [word for line in lines if line[1].endswith("/box_drill.py") for word in line[4:] if "/" in word]
    assert sorted(drills) == sorted(f"{fault}/{phase}" for fault in box_drill.FAULTS for phase in PHASES)
    # Of each size of box one run more, which shows whether the last drill was resumed.
    assert [line[3:] for line in lines if "--nodes" in line] == [
        [f"{tmp_path}/all/drills-{n}", "--nodes", f"{n}"] for n in (2, 3, 4)
    ]
    assert not (tmp_path / "all").exists()


def test_all_goes_on_after_a_part_that_failed_and_ends_with_the_tables(tmp_path: Path, capfd):
    (tmp_path / "drills.jsonl").write_text(json.dumps(asdict(ENDED)) + "\n")
    codes = ("print('one')", "raise SystemExit(3)", "print('three')")
    done = [Part(f"part {number}", (sys.executable, "-c", code)) for number, code in enumerate(codes)]
    assert everything.run([*done[:2], replace(done[2], drills=tmp_path)]) == 1
    said = capfd.readouterr().out.splitlines()
    assert said[:4] == ["--- part 0", "one", "--- part 1", "--- part 2"]
    assert [line.split(" | ")[:2] for line in said if line.startswith("| part ")][1:] == [
        ["| part 0", "as wanted"], ["| part 1", "failed (status 3)"], ["| part 2", "as wanted"],
    ]  # fmt: skip
    assert said[-1] == "| all processes of node 2 end | train | named | 9 s | 31 s | 2 s | yes |"
    assert everything.run(done[:1]) == 0


@pytest.mark.skipif(cluster_box.why_not() is not None, reason=f"no cluster in a box: {cluster_box.why_not()}")
def test_what_is_left_on_a_living_node_is_found_and_a_dead_node_keeps_nothing():
    code = (
        "import socket, time; socket.socket(socket.AF_UNIX).bind('/tmp/slime-ray-x/a'); print('up', flush=True); time.sleep(99)"
    )
    with tempfile.TemporaryDirectory(prefix="bd-", dir="/tmp") as folder:
        box = cluster_box.make(Path(folder) / "box", 2)
        try:
            assert left_on(box) == []
            script = f'mkdir -p /tmp/slime-ray-x/tmp; touch /dev/shm/one; exec "{sys.executable}" -c "{code}"'
            on = subprocess.Popen(cluster_box.entering(box, 2, ["bash", "-c", script]), stdout=subprocess.PIPE, text=True)
            assert on.stdout.readline() == "up\n"
            found = left_on(box)
            assert [what.split(":")[0] for what in found] == ["node2"] * 4
            for what in ("process ", "dev/shm/one", "1 sockets in slime-ray-x", "slime-ray-x/tmp"):
                assert sum(what in one for one in found) == 1, (what, found)
            cluster_box.die(box, 2)
            assert left_on(box) == []
            on.wait(20)
        finally:
            cluster_box.remove(box.folder)


@pytest.mark.skipif(cluster_box.why_not() is not None, reason=f"no cluster in a box: {cluster_box.why_not()}")
def test_a_spare_takes_the_place_of_the_node_that_died_and_a_full_disk_is_full_for_every_node():
    def writes(box: cluster_box.Box, node: int) -> bool:
        script = f"head -c 1000000 /dev/zero > {box.folder}/base/{node}"
        return subprocess.run(cluster_box.entering(box, node, ["bash", "-c", script])).returncode == 0

    with tempfile.TemporaryDirectory(prefix="bd-", dir="/tmp") as scratch:
        folder = Path(scratch) / "box"
        (folder / "base").mkdir(parents=True)
        (folder / "base" / "kept").write_text("as it was")
        with box_drill.made(folder, 3, disk=True) as box:
            addresses = [node.address for node in box.nodes]
            assert box_drill.hosts(box) == addresses[:2], "the launch knows nothing of the third"
            for dead, then in ((2, [0, 2]), (3, [0, 1])):
                spare = box_drill.FAULTS["spare"]
                spare.do(cluster_box.load(folder), (dead,))
                spare.mend(cluster_box.load(folder), (dead,))
                assert box_drill.hosts(box) == [addresses[one] for one in then]
            assert (folder / "base" / "kept").read_text() == "as it was"
            full = box_drill.FAULTS["full"]
            full.do(cluster_box.load(folder), (2,))
            assert not writes(cluster_box.load(folder), 1) and not writes(cluster_box.load(folder), 3)
            full.mend(cluster_box.load(folder), (2,))
            assert all(writes(cluster_box.load(folder), one) for one in (1, 2, 3))
        assert [one.name for one in (folder / "base").iterdir()] == ["kept"]
