"""A pool of worker processes that grade text. A call has a time-out, and a worker that does not keep it is ended and replaced.

Processes, because nothing else can be ended: a regular expression holds the interpreter, and an alarm works in a main thread
alone. Workers start when they are first needed, as forks of one process that has imported the graders (see `nursery.py`).
"""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from slime.rollout.grading.question import Question, Verdict

logger = logging.getLogger(__name__)

_NURSERY = Path(__file__).with_name("nursery.py")
_ROOT = Path(__file__).resolve().parents[3]
_START_SECONDS = 60.0
_TRIES = 2


class GradingError(RuntimeError):
    """A grading that gave no verdict. `reason` is what it is counted under."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class _Worker:
    def __init__(self, connection: socket.socket, pid: int):
        self.connection, self.pid = connection, pid

    def ask(self, question: bytes, seconds: float) -> bytes:
        """One answer line; empty when the worker died. Raises TimeoutError after `seconds`."""
        deadline = time.monotonic() + seconds
        self.connection.settimeout(seconds)
        self.connection.sendall(question)
        parts = []
        while not parts or not parts[-1].endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self.connection.settimeout(left)
            part = self.connection.recv(65536)
            if not part:
                return b""
            parts.append(part)
        return b"".join(parts)


class Pool:
    """At most `num_workers` gradings at a time. Safe to call from any thread and any event loop."""

    def __init__(self, num_workers: int):
        self.num_workers = num_workers
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="grading")
        # Last in, first out: a pool that is asked little keeps few workers busy and starts no others.
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._lock = threading.Lock()
        self._nursery: subprocess.Popen | None = None
        self._control: socket.socket | None = None

    async def grade(self, question: Question, seconds: float) -> Verdict:
        """The verdict. Raises ValueError when the question cannot be graded, GradingError when no verdict came."""
        return await asyncio.wrap_future(self._threads.submit(self.grade_now, question, seconds))

    def grade_now(self, question: Question, seconds: float) -> Verdict:
        """The same for code without an event loop; it blocks. The time counts from when a worker has the question."""
        line = json.dumps(asdict(question) | {"seconds": seconds}, default=_plain).encode() + b"\n"
        # A worker that somebody ended or stopped is noticed by the next question, which is not to blame for it.
        answer = self._ask(self._take(), question, line, seconds) or self._ask(self._fork(), question, line, seconds)
        if not answer:
            raise GradingError(
                "worker_died", f"two processes of grader {question.grader} died of an answer; too little memory?"
            )
        found = json.loads(answer)
        if "verdict" in found:
            return found["verdict"]
        if found["kind"] == "ValueError":
            raise ValueError(found["error"])
        raise GradingError(found["kind"], f"grader {question.grader}: {found['kind']}: {found['error']}")

    def _ask(self, worker: _Worker, question: Question, line: bytes, seconds: float) -> bytes:
        """The answer; b"" of a worker that died, or is stopped."""
        try:
            answer = worker.ask(line, seconds)
        except TimeoutError:
            if not _is_stopped(worker.pid):
                self._end(worker)
                raise GradingError(
                    "timeout", f"grader {question.grader} gave no verdict within {seconds:g} s (--rm-timeout)"
                ) from None
            logger.warning("a grader (pid %d) is stopped (SIGSTOP, or a debugger): it is ended, and another asked", worker.pid)
            answer = b""
        except OSError:
            answer = b""
        if answer:
            self._idle.put(worker)
        else:
            self._end(worker)
        return answer

    def _take(self) -> _Worker:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return self._fork()

    def _fork(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            for _ in range(_TRIES):
                try:
                    control = self._running_nursery()
                    socket.send_fds(control, [b"fork"], [theirs.fileno()])
                    answer = control.recv(64)
                except OSError:
                    answer = b""
                if answer:
                    return _Worker(ours, int(answer))
                self._stop_nursery()
        ours.close()
        raise GradingError("worker_died", f"no process could be started for graders, in {_TRIES} tries")

    def _running_nursery(self) -> socket.socket:
        if self._control is not None:
            return self._control
        # Whole messages: a stream could run two of them together.
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # -P keeps this folder off the path; the package is found beside this file, whatever else is installed.
            paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            self._nursery = subprocess.Popen(
                [sys.executable, "-P", str(_NURSERY), str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            )  # fmt: skip
        self._control.settimeout(_START_SECONDS)
        try:
            said = json.loads(self._control.recv(4096) or b'{"error": "it ended at once"}')
        except TimeoutError:
            said = {"error": f"no word within {_START_SECONDS:.0f} s"}
        if "error" in said:
            self._stop_nursery()
            raise GradingError("no_workers", f"the process that starts graders did not come up: {said['error']}")
        return self._control

    def _end(self, worker: _Worker) -> None:
        worker.connection.close()
        with self._lock:
            try:
                if self._control is not None:
                    self._control.sendall(f"kill {worker.pid}".encode())
            except OSError:
                pass  # the nursery is gone, and its workers with it

    def _stop_nursery(self) -> None:
        """The nursery ends its workers when its control socket closes."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._nursery is not None:
            try:
                self._nursery.wait(5)
            except subprocess.TimeoutExpired:
                self._nursery.kill()
                self._nursery.wait()
            self._nursery = None

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        while not self._idle.empty():
            self._idle.get_nowait().connection.close()
        with self._lock:
            self._stop_nursery()


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.NoSuchProcess:
        return False


def _plain(value: Any) -> Any:
    """What JSON does not know: arrays of a parquet row become lists, anything else its text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


_pools: dict[int, Pool] = {}
_making = threading.Lock()


def shared_pool(num_workers: int) -> Pool:
    """The pool of this process for so many workers."""
    with _making:
        if num_workers not in _pools:
            _pools[num_workers] = Pool(num_workers)
        return _pools[num_workers]


@atexit.register
def _close_all() -> None:
    for pool in _pools.values():
        pool.close()
    _pools.clear()


# A forked process must not talk to the workers of its parent: it starts its own.
os.register_at_fork(after_in_child=_pools.clear)
