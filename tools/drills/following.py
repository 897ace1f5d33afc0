"""A launch that is followed: what it and its logs say, line by line with the time, and the phase that follows from it."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tools.drills.judge import Line

_LOOK_SECONDS = 0.005
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


class Followed:
    """Starts at once. Everything that the process prints, and is added to the logs from now on, becomes `lines`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], run: Path):
        """run: the folder of the run's logs, which may not be there yet."""
        self.lines: list[Line] = []
        self.began: list[tuple[float, str]] = []
        """When each phase began."""
        self.rollouts: list[tuple[float, int]] = []
        """When each was reported, and its number (from 1)."""
        self.closed = threading.Event()
        logs = [run / name for name in ("driver.log", "console.log")]
        self._logs = {file: file.stat().st_size if file.exists() else 0 for file in logs}
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for work in (self._read, self._tail):
            threading.Thread(target=work, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._take(line.decode(errors="replace").rstrip("\n"))

    def _tail(self) -> None:
        while not self.closed.wait(_LOOK_SECONDS):
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

    def _take(self, text: str) -> None:
        now = time.monotonic()
        if (phase := phase_of(text)) is not None:
            self.began.append((now, phase))
        if reported := _ROLLOUT.search(text):
            self.rollouts.append((now, int(reported[1])))
        self.lines.append(Line(now, text))

    @property
    def phase(self) -> str:
        return self.began[-1][1] if self.began else "start"

    def reported_since(self, moment: float) -> int:
        return sum(at > moment for at, _ in self.rollouts)

    def wait_for_phase(self, phase: str, *, seconds: float) -> bool:
        """Until it begins once more."""
        since = time.monotonic()
        return self.until(lambda: any(at > since and one == phase for at, one in reversed(self.began)), seconds=seconds)

    def until(self, what: Callable[[], bool], *, seconds: float, every: float = _LOOK_SECONDS) -> bool:
        """False when the launch ends first, or the time is over. every: seconds between two looks."""
        deadline = time.monotonic() + seconds
        while not what():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return what()
            time.sleep(every)
        return True

    def close(self) -> None:
        """The logs are followed no longer."""
        self.closed.set()
