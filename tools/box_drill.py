"""Drills of a cluster in a box: nodes die, links are cut, flap or are slow, while the tiny launcher trains over its nodes.

    .venv/bin/python tools/box_drill.py run FOLDER die/train down/save      these, one after another (as root)
    .venv/bin/python tools/box_drill.py list                                what there is
    .venv/bin/python tools/box_drill.py table FOLDER                        what happened, as markdown
    .venv/bin/python tools/box_drill.py all FOLDER                          every drill, every layout and misfit; hours
    .venv/bin/python tools/box_drill.py all FOLDER --dry                    what that would run

A drill is FAULT/PHASE. All drills of a folder share one run, so they need as many nodes: each launch is the same command, and
resumes what the drill before it ended; `run` without drills is one that nobody disturbs. Judged are: one line that names the
node, the phase and what to do; the time until then and until the end; that no node keeps a process of the launch, a socket or
shared memory; and that the next launch goes on from the newest checkpoint. Every drill is a line of FOLDER/drills.jsonl, the
last of a name counts, and has a transcript in FOLDER/transcripts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import cluster_box  # noqa: E402
from tools.cluster_box import Box  # noqa: E402
from tools.drills.draw import PHASES  # noqa: E402
from tools.drills.following import Followed  # noqa: E402
from tools.drills.launch import newest  # noqa: E402
from tools.drills.scene import by_role, look_at  # noqa: E402

ENDS_WITHIN, CLEAN_WITHIN, READY_WITHIN = 240.0, 150.0, 480.0
"""Seconds: from the fault to the end of the launch; from there until no node keeps anything of it; and until a phase comes, of
which a node that was started anew waits three minutes for the record of the run before."""
FLAP_SECONDS, FLAPS, SLOW_MBIT = 6.0, 4, 4.0
LATE_MS, LOSS = 50.0, 0.01
DISK = "6g"
_SURVIVED_ROLLOUTS = 2
FLAGS = (
    "--rollout-batch-size", "2", "--n-samples-per-prompt", "2", "--n-samples-per-eval-prompt", "1",
    "--num-steps-per-rollout", "1",
    "--save-interval", "1", "--eval-interval", "1", "--skip-eval-before-train", "--num-rollout", "100000",
)  # fmt: skip
_REMEDY = "run the same command again"


@dataclass(frozen=True)
class Fault:
    what: str
    nodes: tuple[int, ...]
    """That it befalls; all have to be named. (): the second of those that the launch has."""
    do: Callable[[Box, tuple[int, ...]], object]
    mend: Callable[[Box, tuple[int, ...]], object]
    num_nodes: int = 2
    """Of the box."""
    survives: bool = False
    disk: bool = False
    """BASE_DIR has to be a disk of its own, of memory."""


def _die(box: Box, nodes: tuple[int, ...]) -> None:
    for node in nodes:
        box = cluster_box.die(box, node)


def _boot(box: Box, nodes: tuple[int, ...]) -> None:
    for node in nodes:
        box = box if box.node(node).init else cluster_box.boot(box, node)


def _down(box: Box, nodes: tuple[int, ...]) -> None:
    for node in nodes:
        cluster_box.set_link(box, node, "down")


def _up(box: Box, nodes: tuple[int, ...]) -> None:
    for node in nodes:
        cluster_box.set_link(box, node, "up")


def _flap(box: Box, nodes: tuple[int, ...]) -> None:
    _down(box, nodes)
    time.sleep(FLAP_SECONDS)
    _up(box, nodes)


def _flaps(box: Box, nodes: tuple[int, ...]) -> None:
    for _ in range(FLAPS):
        _flap(box, nodes)
        time.sleep(FLAP_SECONDS)


def _slow(box: Box, nodes: tuple[int, ...]) -> None:
    for node in nodes:
        cluster_box.slow(box, node, SLOW_MBIT)


def _late(box: Box, nodes: tuple[int, ...]) -> None:
    for node in nodes:
        box = cluster_box.delay(box, node, milliseconds=LATE_MS, loss=LOSS)


def _die_and_kill(box: Box, nodes: tuple[int, ...]) -> None:
    """A trainer rank of the first node, too."""
    _die(box, nodes)
    _kill_a_rank(box, 1)


def _down_and_kill(box: Box, nodes: tuple[int, ...]) -> None:
    _down(box, nodes)
    _kill_a_rank(box, 1)


def _kill_a_rank(box: Box, node: int) -> None:
    seen = {pid: one for pid in box.node(node).pids() if (one := look_at(pid)) is not None}
    ranks = by_role(seen)["trainer"]
    if ranks:  # at a start there may be none yet
        os.kill(ranks[0].pid, signal.SIGKILL)


def _die_and_fill(box: Box, nodes: tuple[int, ...]) -> None:
    """The disk that the nodes share has no room left, either."""
    used = shutil.disk_usage(box.folder / "base").used
    _call("mount", "-o", f"remount,size={used}", str(box.folder / "base"))
    _die(box, nodes)


def _boot_and_empty(box: Box, nodes: tuple[int, ...]) -> None:
    _call("mount", "-o", f"remount,size={DISK}", str(box.folder / "base"))
    _boot(box, nodes)


def _replace(box: Box, nodes: tuple[int, ...]) -> None:
    """The node that the launch had not takes the place of the one that died, which is the next one's spare."""
    (dead,) = nodes
    first, *_ = hosts(box)
    spare = next(node.address for node in box.nodes if node.address not in hosts(box))
    (box.folder / "hostfile").write_text(f"{first}\n{spare}\n")
    _boot(box, (dead,))


def hosts(box: Box) -> list[str]:
    """Addresses of the nodes that a launch is given."""
    return (box.folder / "hostfile").read_text().split()


FAULTS = {
    "die": Fault("all processes of node 2 end", (2,), _die, _boot),
    "deaths": Fault("all processes of nodes 3 and 4 of four end", (3, 4), _die, _boot, num_nodes=4),
    "down": Fault("the link of node 2 goes down and stays so", (2,), _down, _up),
    "cut": Fault("the link of node 1, where launcher and head are, goes down and stays so", (1,), _down, _up),
    "rank-dies": Fault("all processes of node 2 end, and a trainer rank of node 1", (2,), _die_and_kill, _boot),
    "rank-down": Fault("the link of node 2 goes down, and a trainer rank of node 1 ends", (2,), _down_and_kill, _up),
    "full": Fault("all processes of node 2 end, and the shared disk is full", (2,), _die_and_fill, _boot_and_empty, disk=True),
    "spare": Fault(
        "all processes of one node end; the same command is given a third in its place", (), _die, _replace, num_nodes=3
    ),
    "head": Fault("all processes of node 1, where launcher and head are, end", (1,), _die, _boot),
    "part": Fault("nodes 3 and 4 of four reach each other alone", (3, 4), cluster_box.part, _up, num_nodes=4),
    "flap": Fault(f"the link of node 2 is down for {FLAP_SECONDS:.0f} s", (2,), _flap, _up, survives=True),
    "flaps": Fault(
        f"the link of node 2 is down for {FLAP_SECONDS:.0f} s, {FLAPS} times in {2 * FLAPS * FLAP_SECONDS:.0f} s", (2,), _flaps,
        _up, survives=True,
    ),
    "slow": Fault(f"the link of node 2 carries {SLOW_MBIT:g} Mbit/s", (2,), _slow, _up, survives=True),
    "late": Fault(
        f"frames on the link of node 2 come {LATE_MS:.0f} ms late, and {LOSS:.0%} never", (2,), _late, _up, survives=True
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What happened in one drill."""

    fault: str
    phase: str
    hit: str
    """The phase that the run was in when the fault came."""
    outcome: str
    """ "survived", "named", "unnamed" or "hung"."""
    cause: str
    seconds_to_cause: float | None
    seconds_to_end: float | None
    seconds_to_clean: float | None
    """From the launch's end until the living nodes kept nothing; None where they kept something."""
    left: list[str]
    status: int | None
    resumed: bool | None = None
    """Whether the next launch went on from the newest checkpoint."""

    @property
    def failed(self) -> bool:
        return self.outcome in ("unnamed", "hung") or bool(self.left) or self.resumed is False


class Launch(Followed):
    """The tiny launcher on node 1 of a box."""

    def __init__(self, box: Box, flags: Sequence[str] = FLAGS):
        self.box, self.base = box, box.folder / "base"
        tool = f"{sys.executable} {Path(cluster_box.__file__).resolve()}"
        settings = {
            "BASE_DIR": str(self.base), "HOSTFILE": str(box.folder / "hostfile"), "MASTER_ADDR": box.nodes[0].address,
            "NUM_NODES": str(len(hosts(box))), "SFT_STEPS": "3", "SSH": f"{tool} ssh {box.folder}",
        }  # fmt: skip
        command = cluster_box.entering(box, 1, ["bash", str(ROOT / "scripts" / "run-glm5.2-tiny.sh"), *flags])
        super().__init__(command, os.environ | settings, self.base / "run")

    def comes_to(self, phase: str) -> bool:
        """A phase of an iteration is awaited after the first rollout: the weights' first way is also a start."""
        if phase == "start":
            return self.until(lambda: any("other nodes joined" in line.text for line in self.lines), seconds=READY_WITHIN) and (
                self.until(lambda: bool(self.began), seconds=READY_WITHIN)
            )
        if not self.until(lambda: bool(self.rollouts), seconds=READY_WITHIN):
            return False
        return self.wait_for_phase(phase, seconds=60.0)

    def leave(self, *, seconds: float = 90.0) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.close()


def left_on(box: Box) -> list[str]:
    """What living nodes keep of launches: processes, shared memory, sockets, temporary files."""
    found = []
    for node in cluster_box.load(box.folder).nodes:
        if not node.init:
            continue
        found += [f"{node.name}: process {_words(pid)}" for pid in node.pids()]
        root = Path(f"/proc/{node.init}/root")
        found += [f"{node.name}: {file.relative_to(root)}" for file in (root / "dev/shm").iterdir()]
        for folder in (root / "tmp").glob("slime-*"):
            sockets = sum(path.is_socket() for path in folder.rglob("*"))
            found += [f"{node.name}: {sockets} sockets in {folder.name}"] if sockets else []
            found += [f"{node.name}: {folder.name}/tmp"] if (folder / "tmp").exists() else []
    return found


def _words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:80]
    except OSError:
        return str(pid)


class Campaign:
    def __init__(self, box: Box):
        self._folder, self._box = box.folder, box
        self._launch: Launch | None = None

    def drill(self, name: str) -> Row | None:
        """None where the phase never came."""
        fault, phase = FAULTS[name.split("/")[0]], name.split("/")[1]
        assert fault.num_nodes == len(self._box.nodes), f"{name} needs a box of {fault.num_nodes} nodes"
        if phase == "start":
            self.leave()
        if (launch := self._launch) is None:
            before, launch = newest(self._checkpoints), Launch(self._box)
            self._launch = launch
            placed = launch.comes_to(phase)
            self._settle(launch, before)
        else:  # it survived the drill before
            placed = launch.comes_to(phase)
        if not placed:
            self._transcribe(launch, name, time.monotonic())
            self.leave()
            return None
        at, hit, box = time.monotonic(), launch.phase, cluster_box.load(self._box.folder)
        nodes = fault.nodes or (1 + [node.address for node in box.nodes].index(hosts(box)[1]),)
        try:
            fault.do(box, nodes)
            launch.until(lambda: launch.reported_since(at) >= _SURVIVED_ROLLOUTS, seconds=ENDS_WITHIN)
            row = self._judge(launch, replace(fault, nodes=nodes), name, at, hit)
            self._transcribe(launch, name, at)
        finally:
            fault.mend(cluster_box.load(self._box.folder), nodes)
        if row.outcome != "survived":
            self.leave()
        self._write(row)
        return row

    def leave(self) -> None:
        """End the launch that runs, if one does. Whatever it left has been told; the next one begins on empty nodes."""
        if self._launch is None:
            return
        self._launch.leave()
        self._launch = None
        for node in cluster_box.load(self._box.folder).nodes:
            if node.pids() or not node.init:
                cluster_box.boot(cluster_box.die(cluster_box.load(self._box.folder), node.name), node.name)
            for folder in self._box.tmp(node).glob("slime-*"):
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def _checkpoints(self) -> Path:
        return self._box.folder / "base" / "GLM-5.2-tiny_slime"

    def _judge(self, launch: Launch, fault: Fault, name: str, at: float, hit: str) -> Row:
        status, now = launch.process.poll(), time.monotonic()
        went_on = launch.reported_since(at) >= _SURVIVED_ROLLOUTS
        left, clean = [], None
        if status is not None:
            while (left := left_on(self._box)) and time.monotonic() < now + CLEAN_WITHIN:
                time.sleep(0.5)
            clean = None if left else time.monotonic() - now
        addresses = [self._box.node(node).address for node in fault.nodes]
        told = next((one for one in launch.lines if one.at >= at and says_all(one.text, addresses)), None)
        outcome = "survived" if went_on else "hung" if status is None else "named" if told else "unnamed"
        if outcome == "survived" and not fault.survives:
            outcome = "unnamed"
        return Row(
            name.split("/")[0], name.split("/")[1], hit, outcome, told.text if told else "", told.at - at if told else None,
            None if status is None else now - at, clean, left, status,
        )  # fmt: skip

    def _settle(self, launch: Launch, before: int | None) -> None:
        """What this launch shows of the drill before: that the same command went on from the newest checkpoint."""
        rows = read(self._folder)
        if rows and rows[-1].resumed is None and launch.rollouts:
            began = launch.rollouts[0][1]
            self._write(replace(rows[-1], resumed=began == (0 if before is None else before + 1) + 1))

    def undisturbed(self) -> bool:
        """Whether it trained, and went on from where the drill before had left the run."""
        before, self._launch = newest(self._checkpoints), Launch(self._box)
        self._launch.until(lambda: bool(self._launch.rollouts), seconds=2 * READY_WITHIN)
        self._settle(self._launch, before)
        self._transcribe(self._launch, "undisturbed", time.monotonic())
        return bool(self._launch.rollouts) and not any(row.resumed is False for row in read(self._folder)[-1:])

    def _transcribe(self, launch: Launch, name: str, at: float) -> None:
        folder = self._folder / "transcripts"
        folder.mkdir(exist_ok=True)
        text = "".join(f"{line.at - at:8.1f} {line.text}\n" for line in launch.lines)
        (folder / f"{name.replace('/', '-')}.log").write_text(text)

    def _write(self, row: Row) -> None:
        with (self._folder / "drills.jsonl").open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")


_PHASE_WORDS = r"starting|loading|opening|joining|generating|evaluating|handing|training|saving|sending|reading|between two"


def says_all(line: str, addresses: Sequence[str]) -> bool:
    """Whether one line names the nodes, the phase and what to do."""
    return all(one in line for one in addresses) and _REMEDY in line and re.search(_PHASE_WORDS, line) is not None


def read(folder: Path) -> list[Row]:
    """The last of each name, in the order in which they were made."""
    file, rows = folder / "drills.jsonl", {}
    for line in file.read_text().splitlines() if file.exists() else ():
        row = Row(**json.loads(line))
        rows.pop((row.fault, row.phase), None)
        rows[row.fault, row.phase] = row
    return list(rows.values())


def run(folder: Path, names: Sequence[str], *, undisturbed_nodes: int = 2) -> int:
    failed = 0
    faults = [FAULTS[name.split("/")[0]] for name in names]
    counts = {fault.num_nodes for fault in faults} or {undisturbed_nodes}
    if len(counts) > 1:
        raise SystemExit(f"these drills need boxes of {sorted(counts)} nodes: one call for each")
    with made(folder, counts.pop(), disk=any(fault.disk for fault in faults)) as box:
        campaign = Campaign(box)
        for name in names:
            sys.stdout.write(f"{name}: {FAULTS[name.split('/')[0]].what} ...\n")
            sys.stdout.flush()
            row = campaign.drill(name)
            sys.stdout.write(f"  {told(row)}\n")
            sys.stdout.flush()
            failed += row is None or row.failed
        if not names:
            failed += not campaign.undisturbed()
        campaign.leave()
        failed += sum(row.resumed is False for row in read(folder) if f"{row.fault}/{row.phase}" in names)
    return 1 if failed else 0


@contextmanager
def made(folder: Path, num_nodes: int, *, disk: bool) -> Iterator[Box]:
    """disk: BASE_DIR is a disk of memory, with what lay there, and goes with the box."""
    with _disk_of_memory(folder) if disk else nullcontext():
        box = cluster_box.make(folder, num_nodes)
        try:
            if num_nodes == 3:  # one is a spare
                (folder / "hostfile").write_text("".join(f"{node.address}\n" for node in box.nodes[:2]))
            yield box
        finally:
            cluster_box.remove(folder)


@contextmanager
def _disk_of_memory(folder: Path) -> Iterator[None]:
    """At folder/base, with what lay there."""
    base, fresh = folder / "base", folder / "disk"
    for one in (base, fresh):
        one.mkdir(parents=True, exist_ok=True)
    _call("mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(fresh))
    try:
        shutil.copytree(base, fresh, dirs_exist_ok=True)
        _call("mount", "--bind", str(fresh), str(base))
    finally:
        _call("umount", str(fresh))
        fresh.rmdir()
    try:
        yield
    finally:
        _call("umount", str(base))


def _call(*command: str) -> None:
    subprocess.run(command, check=True)


def told(row: Row | None) -> str:
    if row is None:
        return "the phase did not come"
    times = {"told": row.seconds_to_cause, "ended": row.seconds_to_end, "clean": row.seconds_to_clean}
    said = ", ".join(f"{what} after {value:.0f} s" for what, value in times.items() if value is not None)
    return f"{row.outcome} (in {row.hit}) {said}; status {row.status}; left {row.left}: {row.cause[:300]}"


def table(rows: Sequence[Row]) -> str:
    lines = ["| fault | phase | outcome | told | ended | nodes clean | resumed |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        times = [row.seconds_to_cause, row.seconds_to_end, row.seconds_to_clean]
        cells = [FAULTS[row.fault].what, row.phase, row.outcome, *("-" if one is None else f"{one:.0f} s" for one in times)]
        resumed = {None: "-", True: "yes", False: "no"}[row.resumed]
        lines.append("| " + " | ".join([*cells, resumed]) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "list", "table", "all"):
        one = commands.add_parser(name)
        if name != "list":
            one.add_argument("folder", type=Path)
        if name == "run":
            one.add_argument("drills", nargs="*", metavar="FAULT/PHASE")
            one.add_argument("--nodes", type=int, default=2, help="of the box, where no drill is named")
        elif name == "all":
            one.add_argument("--dry", action="store_true", help="print the commands, and run none")
    given = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a box is removed on the way out
    if given.command == "run":
        return run(given.folder, given.drills, undisturbed_nodes=given.nodes)
    if given.command == "all":
        from tools.drills import everything  # it imports this file

        parts = everything.parts(given.folder.absolute())
        if not given.dry:
            return everything.run(parts)
        sys.stdout.write("".join(f"{part}\n" for part in parts))
        return 0
    if given.command == "table":
        sys.stdout.write(table(read(given.folder)))
        return 0
    for name, fault in FAULTS.items():
        sys.stdout.write(f"{name}: {fault.what}\n")
    sys.stdout.write(f"phases: {', '.join(PHASES)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
