"""One run of the tiny launcher on this machine, and what it leaves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from tools.drills.following import Followed
from tools.drills.scene import MARK, Scene

ROOT = Path(__file__).resolve().parents[2]
NUM_ROLLOUT = 48
"""That are recorded; a folder that is near its end is begun again."""
_SHARED_SECONDS = 4.0
SMALL = (
    "--rollout-batch-size", "1", "--n-samples-per-prompt", "2", "--n-samples-per-eval-prompt", "1",
    "--num-steps-per-rollout", "1", "--entropy-coef", "0.01",  # all rewards are 0 after so short a warm start
    "--save-interval", "1", "--hang-report-minutes", "0.5", "--hang-exit-minutes", "3",
    "--rollout-health-check-interval", "10", "--rollout-health-check-timeout", "10",
)  # fmt: skip


def newest(checkpoints: Path) -> int | None:
    """Iteration of the newest whole checkpoint."""
    try:
        return int((checkpoints / "latest_checkpointed_iteration.txt").read_text())
    except (OSError, ValueError):
        return None


class Launch(Followed):
    """The tiny launcher, at its smallest, on checkpoints of its own; `scene` has its processes."""

    def __init__(self, base: Path, checkpoints: Path, flags: Sequence[str]):
        self.base, self.checkpoints = base, checkpoints
        self.before = newest(checkpoints)
        mark = uuid.uuid4().hex
        environment = os.environ | {"BASE_DIR": str(base), "SFT_STEPS": "3", MARK: mark}
        folder = ("--load", str(checkpoints), "--save", str(checkpoints))
        command = ["bash", str(ROOT / "scripts" / "run-glm5.2-tiny.sh"), *SMALL, *folder, *flags]
        super().__init__(command, environment, base / "run")
        self.scene = Scene(self.process.pid, mark)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self.closed.wait(_SHARED_SECONDS):
            self.scene.update(maps=True)

    def ray_folder(self) -> Path | None:
        found = [re.search(r"logs (/\S+/slime-ray-\w+|/tmp/\S+)$", line.text) for line in self.lines]
        return next((Path(one[1]) for one in found if one), None)

    def left(self, *, seconds: float) -> list[str]:
        """What is there after the end, once it is nothing or the time is over."""
        deadline, folders = time.monotonic() + seconds, (self.base, self.checkpoints)
        self.scene.update()
        while (found := self.scene.left(folders, self.ray_folder())) and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    def leave(self, *, seconds: float = 90.0) -> None:
        """As an operator ends it; what is deaf to that is killed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        self.left(seconds=30.0)
        self.kill_all()
        self.close()

    def kill_all(self) -> None:
        self.scene.update()
        for seen in self.scene.alive():
            try:
                os.kill(seen.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
