"""Nodes that do not fit, in a cluster in a box: what a launcher says of them before it trains.

    .venv/bin/python tools/box_fitness.py [NAME...]        all, or these: one line for each, and status 1 where one was missed

As root. Clocks of the day are not among them: the kernel has one for all namespaces, and under libfaketime Ray does not start.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import cluster_box  # noqa: E402
from tools.cluster_box import Box  # noqa: E402

LATE_SECONDS = 20
_WITHIN = 400.0


@dataclass(frozen=True)
class Misfit:
    what: str
    prepare: Callable[[Box], None]
    told: str
    """Pattern of the line that names it."""
    by_hand: bool = False
    """The second node joins by the printed script, late, and once more."""
    runs: bool = False
    """Without --preflight."""


def _node2(box: Box, script: str) -> None:
    subprocess.run(cluster_box.entering(box, 2, ["bash", "-euc", script]), check=True)


def _instead(box: Box, file: Path, old: str, new: str) -> None:
    """On node 2 the file reads otherwise; nobody else sees that."""
    other = box.folder / f"other-{file.name}"
    other.write_text(re.sub(old, new, file.read_text(), count=1))
    _node2(box, f"mount --bind {other} {file}")


def _metadata(box: Box) -> None:
    _instead(box, Path(str(distribution("transformers")._path)) / "METADATA", r"(?m)^Version: .*$", "Version: 4.0.1")  # type: ignore[attr-defined]


def _checkout(box: Box) -> None:
    _instead(box, ROOT / "slime" / "train.py", r"^", "# another commit\n")


def _ray(box: Box) -> None:
    _instead(box, Path(str(distribution("ray").locate_file("ray/_version.py"))), r"(?m)^version = .*$", 'version = "2.40.0"')


def _itself(box: Box) -> None:
    """The launcher's own machine, by another address of it."""
    subprocess.run(["ip", "-n", box.nodes[0].netns, "addr", "add", "10.98.0.101/24", "dev", "eth0"], check=True)
    (box.folder / "hostfile").write_text("10.98.0.1\n10.98.0.101\n")


MISFITS = {
    "package": Misfit(
        "node 2 has another transformers",
        _metadata,
        r"versions differ on 1 nodes.*10\.98\.0\.2: transformers 4\.0\.1, the others",
    ),
    "run": Misfit(
        "node 2 has another transformers, and nobody asks for a preflight",
        _metadata,
        r"the run stopped: starting: node 10\.98\.0\.2 has transformers 4\.0\.1, the others .* run the same command again",
        runs=True,
    ),
    "checkout": Misfit(
        "node 2 has another commit of slime", _checkout, r"versions differ on 1 nodes.*10\.98\.0\.2: slime \w{8}, the others"
    ),
    "ray": Misfit("node 2 has another Ray", _ray, r"did not join: 10\.98\.0\.2 \(.*(2\.40\.0|[Vv]ersion)"),
    "itself": Misfit(
        "HOSTFILE has the launcher's node by another address",
        _itself,
        r"10\.98\.0\.101 \(this machine has joined this cluster already",
    ),
    "late": Misfit(
        f"node 2 joins by hand, {LATE_SECONDS} s late, and once more", lambda box: None, r"every node is fit", by_hand=True
    ),
}


def preflight(box: Box, misfit: Misfit) -> tuple[list[str], float]:
    """What the launcher says, and how long it takes."""
    tool = f"{sys.executable} {Path(cluster_box.__file__).resolve()}"
    settings = {
        "BASE_DIR": str(box.folder / "base"),
        "MASTER_ADDR": box.nodes[0].address,
        "NUM_NODES": "2",
        "SSH": f"{tool} ssh {box.folder}",
    }
    if not misfit.by_hand:
        settings["HOSTFILE"] = str(box.folder / "hostfile")
    began = time.monotonic()
    words = ["bash", str(ROOT / "scripts" / "run-glm5.2-tiny.sh"), *(() if misfit.runs else ("--preflight",))]
    launcher = subprocess.Popen(
        cluster_box.entering(box, 1, words),
        env=os.environ | settings, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    signal.alarm(int(_WITHIN))  # a launcher that says nothing must not hold this up
    lines = []
    for line in launcher.stdout:
        lines.append(line.rstrip("\n"))
        if misfit.by_hand and "on each of the other 1 nodes: bash " in line:
            lines += _join(box, line.rpartition(": bash ")[2].strip())
    launcher.wait()
    signal.alarm(0)
    return lines, time.monotonic() - began


def _join(box: Box, script: str) -> list[str]:
    """What the second of two attempts says."""
    time.sleep(LATE_SECONDS)
    subprocess.Popen(
        cluster_box.entering(box, 2, ["bash", script]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(3.0)
    again = subprocess.run(cluster_box.entering(box, 2, ["bash", script]), capture_output=True, text=True, timeout=60)
    return [f"(again) {line}" for line in again.stderr.splitlines()]


def run(box: Box, name: str) -> bool:
    misfit = MISFITS[name]
    misfit.prepare(box)
    lines, seconds = preflight(cluster_box.load(box.folder), misfit)
    cluster_box.boot(cluster_box.die(cluster_box.load(box.folder), 2), 2)
    (box.folder / "hostfile").write_text("".join(f"{node.address}\n" for node in box.nodes))
    told = next((line for line in lines if re.search(misfit.told, line)), "")
    again = next((line for line in lines if line.startswith("(again) this machine has joined")), "")
    found = bool(told) and (not misfit.by_hand or bool(again))
    sys.stdout.write(f"{name}: {misfit.what}: {'told' if found else 'MISSED'} after {seconds:.0f} s: {told} {again}\n")
    sys.stdout.write("" if found else "".join(f"    {line}\n" for line in lines[-25:]))
    sys.stdout.flush()
    return found


def main(argv: Sequence[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a box is removed on the way out
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("a launcher took too long"))
    if wrong := [name for name in argv if name not in MISFITS]:
        sys.exit(f"{__doc__}\nno such name: {', '.join(wrong)}; there are {', '.join(MISFITS)}")
    with tempfile.TemporaryDirectory(prefix="bf-", dir="/tmp") as folder:
        box = cluster_box.make(Path(folder) / "box", 2)
        try:
            found = [run(cluster_box.load(box.folder), name) for name in argv or MISFITS]
        finally:
            cluster_box.remove(box.folder)
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
