"""One run of the tiny launcher: its lines with their times, and in which phase it is."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.drills.judge import Line
from tools.drills.scene import MARK, Scene

ROOT = Path(__file__).resolve().parents[2]
NUM_ROLLOUT = 48
"""That are recorded; a folder that is near its end is begun again."""
_LOOK_SECONDS = 0.005
_SHARED_SECONDS = 4.0
SMALL = (
    "--rollout-batch-size", "1", "--n-samples-per-prompt", "2", "--n-samples-per-eval-prompt", "1",
    "--num-steps-per-rollout", "1", "--entropy-coef", "0.01",  # all rewards are 0 after so short a warm start
    "--save-interval", "1", "--hang-report-minutes", "0.5", "--hang-exit-minutes", "3",
    "--rollout-health-check-interval", "10", "--rollout-health-check-timeout", "10",
)  # fmt: skip
_WAITS = re.compile(r"DEBUG slime\.ray\.standstill: waits for: (.*)")
_PHASES = (
    (r"generating rollout ", "generate"),
    (r"evaluating after ", "evaluate"),
    (r"fleet (release|resume)_memory|waking the trainer|putting the trainer's ", "hand-over"),
    (r"training$", "train"),
    (r"saving rollout ", "save"),
    (r"sending weights |fleet (pause|flush|begin|end|versions|proceed)", "sync"),
    (r"loading |starting |joining ", "start"),
)
_ROLLOUT = re.compile(r"INFO slime\.\S+: rollout +(\d+)/\d+ \|")


def phase_of(line: str) -> str | None:
    """The phase that begins with a line of driver.log; None for any other line."""
    waits = _WAITS.search(line)
    return next((phase for pattern, phase in _PHASES if waits and re.match(pattern, waits[1])), None)


def newest(checkpoints: Path) -> int | None:
    """Iteration of the newest whole checkpoint."""
    try:
        return int((checkpoints / "latest_checkpointed_iteration.txt").read_text())
    except (OSError, ValueError):
        return None


class Launch:
    """Starts at once. Everything that it prints, its driver and its jobs write becomes `lines`."""

    def __init__(self, base: Path, checkpoints: Path, flags: Sequence[str]):
        self.base, self.checkpoints = base, checkpoints
        self.before = newest(checkpoints)
        self.lines: list[Line] = []
        self._began: list[tuple[float, str]] = []
        self.rollouts: list[tuple[float, int]] = []
        """When each was reported, and its number (from 1)."""
        mark = uuid.uuid4().hex
        environment = os.environ | {"BASE_DIR": str(base), "SFT_STEPS": "3", MARK: mark}
        logs = [base / "run" / name for name in ("driver.log", "console.log")]
        self._logs = {file: file.stat().st_size if file.exists() else 0 for file in logs}
        folder = ("--load", str(checkpoints), "--save", str(checkpoints))
        self.process = subprocess.Popen(
            ["bash", str(ROOT / "scripts" / "run-glm5.2-tiny.sh"), *SMALL, *folder, *flags],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.scene = Scene(self.process.pid, mark)
        self._closed = threading.Event()
        for work in (self._read, self._tail, self._watch):
            threading.Thread(target=work, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._take(line.decode(errors="replace").rstrip("\n"))

    def _tail(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            for file, position in self._logs.items():
                try:
                    if file.stat().st_size <= position:
                        continue
                    with file.open("rb") as log:
                        log.seek(position)
                        text = log.read().rpartition(b"\n")[0]
                except OSError:
                    continue
                self._logs[file] = position + len(text) + bool(text)
                for line in text.decode(errors="replace").splitlines():
                    self._take(line)

    def _watch(self) -> None:
        while not self._closed.wait(_SHARED_SECONDS):
            self.scene.update(maps=True)

    def _take(self, text: str) -> None:
        now = time.monotonic()
        if (phase := phase_of(text)) is not None:
            self._began.append((now, phase))
        if reported := _ROLLOUT.search(text):
            self.rollouts.append((now, int(reported[1])))
        self.lines.append(Line(now, text))

    @property
    def phase(self) -> str:
        return self._began[-1][1] if self._began else "start"

    def reported_since(self, moment: float) -> int:
        return sum(at > moment for at, _ in self.rollouts)

    def wait_for_phase(self, phase: str, *, seconds: float) -> bool:
        """Until it begins once more."""
        since = time.monotonic()
        return self.until(lambda: any(at > since and one == phase for at, one in reversed(self._began)), seconds=seconds)

    def until(self, what: Callable[[], bool], *, seconds: float, every: float = _LOOK_SECONDS) -> bool:
        """False when the launch ends first, or the time is over. every: seconds between two looks."""
        deadline = time.monotonic() + seconds
        while not what():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return what()
            time.sleep(every)
        return True

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

    def close(self) -> None:
        self._closed.set()
