"""sympy in a process of its own: a time-out ends it for certain, in whatever loop it is, and a fresh one takes over.

A signal alarm would do in a main thread only and silently nothing elsewhere; a thread cannot be ended.
"""

from __future__ import annotations

import atexit
import json
import logging
import select
import subprocess
import sys
import threading
from pathlib import Path

logger = logging.getLogger(__name__)

_WORKER = Path(__file__).with_name("symbolic_worker.py")
ANSWER_SECONDS = 5.0
_START_SECONDS = 60.0


class SymbolicProcess:
    """One worker; calls are answered one at a time."""

    def __init__(self, answer_seconds: float = ANSWER_SECONDS):
        self.answer_seconds = answer_seconds
        self.num_timeouts = 0
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def equal(self, left: str, right: str) -> bool:
        """Whether the difference of two expressions simplifies to 0. An expression it cannot read, or a time-out, is not
        equal."""
        with self._lock:
            process = self._running()
            try:
                process.stdin.write(json.dumps([left, right]) + "\n")
                process.stdin.flush()
                answer = self._line(process, self.answer_seconds)
            except BrokenPipeError:
                answer = None
            if answer is None:
                self.num_timeouts += 1
                logger.warning(
                    "symbolic comparison gave no answer in %.0f s (%d so far), counted as different: %.80r and %.80r",
                    self.answer_seconds, self.num_timeouts, left, right,
                )  # fmt: skip
                self._end()
                return False
            return json.loads(answer)

    def _running(self) -> subprocess.Popen:
        if self._process is None or self._process.poll() is not None:
            self._end()
            # -P keeps this folder off the worker's import path.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            if self._line(self._process, _START_SECONDS) is None:
                self._end()
                raise RuntimeError(
                    f"the process that compares expressions did not start within {_START_SECONDS:.0f} s; is sympy installed?"
                )
        return self._process

    @staticmethod
    def _line(process: subprocess.Popen, seconds: float) -> str | None:
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        return (process.stdout.readline() or None) if ready else None

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass
            self._process = None

    def close(self) -> None:
        with self._lock:
            self._end()


_shared = SymbolicProcess()
atexit.register(_shared.close)


def symbolically_equal(left: str, right: str) -> bool:
    return _shared.equal(left, right)
