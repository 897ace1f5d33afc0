"""Runs of the tiny launcher in a cluster in a box, each in another layout over its nodes.

    .venv/bin/python tools/box_layouts.py FOLDER [NAME...]        all, or these; FOLDER/base is made once

As root. One line for each, and status 1 where one failed.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import cluster_box  # noqa: E402
from tools.box_drill import Launch, left_on  # noqa: E402

_WITHIN = 800.0
_CLEAN_WITHIN = 30.0
FLAGS = (
    "--rollout-batch-size", "4", "--n-samples-per-prompt", "2", "--num-steps-per-rollout", "1", "--num-rollout", "1",
    "--save-interval", "1", "--eval-interval", "1000", "--skip-eval-before-train", "--check-weight-update-equal",
)  # fmt: skip
OVER_BOTH = """sglang:
  - name: default
    server_groups:
      - {worker_type: regular, num_gpus: 2, num_gpus_per_engine: 2}
"""


@dataclass(frozen=True)
class Layout:
    what: str
    num_nodes: int
    flags: tuple[str, ...]
    status: int
    said: tuple[str, ...]
    """Patterns that have to be found in what the run says."""


LAYOUTS = {
    "four": Layout(
        "four nodes: two copies of two stages, one prefill and three decode engines", 4, (), 0,
        (
            r"3 other nodes joined", r"trainer: 4 ranks = TP 1 x CP 1 x PP 2 x DP 2",
            *(rf"ready at http://10\.98\.0\.{n}:" for n in (1, 2, 3, 4)),
            r"weights v2: (\d+) of \1 tensors read back equal from default-decode-3", r"rollout +1/1 \|",
        ),
    ),
    "wide": Layout(
        # In BF16: halves of a tiny FP8 matrix would cut its blocks.
        "one engine of two ranks over two nodes", 2,
        ("--sglang-config", "{box}/engines.yaml", "--hf-checkpoint", "{box}/base/GLM-5.2-tiny"), 0,
        # Of halves an engine gives back what it has whole; that the rest arrives, its checksums after a second stream say.
        (r"weights v2: \d+ of \d+ tensors read back equal", r"v2: \d+ parameters of \S+ stay as they are", r"rollout +1/1 \|"),
    ),
    "own-disk": Layout(
        "--save on each node's own disk", 2, ("--save", "/tmp/own", "--load", "/tmp/own"), 1,
        (r"--save /tmp/own is not one folder for all ranks: rank 1 on node2 cannot see what rank 0 on node1 writes there",),
    ),
}  # fmt: skip


def run(folder: Path, name: str) -> bool:
    layout = LAYOUTS[name]
    with tempfile.TemporaryDirectory(prefix="bl-", dir="/tmp") as scratch:
        box = cluster_box.make(Path(scratch) / "box", layout.num_nodes)
        (box.folder / "engines.yaml").write_text(OVER_BOTH)
        if (folder / "base").exists():
            shutil.copytree(folder / "base", box.folder / "base")
        began = time.monotonic()
        launch = Launch(box, (*FLAGS, *(flag.format(box=box.folder) for flag in layout.flags)))
        try:
            launch.until(lambda: False, seconds=_WITHIN)
            status, seconds = launch.process.poll(), time.monotonic() - began
            while (left := left_on(box)) and time.monotonic() < began + seconds + _CLEAN_WITHIN:
                time.sleep(0.5)
            if status == 0 and not (folder / "base").exists():
                shutil.copytree(
                    box.folder / "base", folder / "base", ignore=shutil.ignore_patterns("GLM-5.2-tiny_slime", "run")
                )
        finally:
            launch.leave()
            cluster_box.remove(box.folder)
    text = "\n".join(line.text for line in launch.lines)
    lacking = [pattern for pattern in layout.said if not re.search(pattern, text)]
    good = status == layout.status and not lacking and not left
    told = "as wanted" if good else f"FAILED (lacking {lacking}, left {left})"
    sys.stdout.write(f"{name}: {layout.what}: {told}; status {status} after {seconds:.0f} s\n")
    (folder / f"{name}.log").write_text(text + "\n")
    sys.stdout.flush()
    return good


def main(argv: Sequence[str]) -> int:
    if not argv or set(argv[1:]) - LAYOUTS.keys():
        sys.exit(f"{__doc__}\nnames: {', '.join(LAYOUTS)}")
    Path(argv[0]).mkdir(parents=True, exist_ok=True)
    done = [run(Path(argv[0]), name) for name in argv[1:] or LAYOUTS]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
