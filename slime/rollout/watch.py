"""Who says that nothing moves: a thread of its own, because what stands still is often the event loop."""

from __future__ import annotations

import asyncio
import logging
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Sequence

from slime.rollout.base_types import Group, flatten
from slime.types.sample import Sample, Status

logger = logging.getLogger(__name__)

_SILENCE_SECONDS = 60.0
_LOOK_SECONDS = 5.0
_OWN_FRAMES = 2
_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))


_watching: list[Watch] = []


def waiting() -> list[str]:
    """What rollouts and evaluations of this process wait for, a line each."""
    return [watch.text() for watch in list(_watching)]


def _generates(sample: Sample) -> bool:
    return sample.status in (Status.PENDING, Status.ABORTED) and not sample.is_settled


def _is_graded(sample: Sample) -> bool:
    return sample.status in (Status.COMPLETED, Status.TRUNCATED) and not sample.is_settled


class Silence:
    """Says so when no sample ends for a minute: how many are waiting for what, and since when; once a minute while it lasts."""

    def __init__(self, what: str = "") -> None:
        """what: of which run of samples the line speaks, e.g. "evaluation gsm8k"."""
        self._what = f"{what}: " if what else ""
        self._seen: tuple[int, int] | None = None
        self._last_end, self._said = time.time(), time.time()

    def look(self, groups: Sequence[Group], *, num_back: int) -> None:
        """groups: those that have not come back. Progress: more came back than at the last look, or fewer samples wait."""
        now = time.time()
        samples = [sample for group in groups for sample in flatten(group)]
        generating, graded = sum(map(_generates, samples)), sum(map(_is_graded, samples))
        seen = (num_back, generating + graded)
        if seen != self._seen:
            self._seen, self._last_end, self._said = seen, now, now
        elif now - self._said >= _SILENCE_SECONDS:
            self._said = now
            logger.info(
                "%sno sample has ended for %.0f s: %d samples of %d prompts are waiting since %s "
                "(%d for an engine, %d for a grader)",
                self._what, now - self._last_end, generating + graded, len(groups),
                time.strftime("%H:%M:%S", time.localtime(self._last_end)), generating, graded,
            )  # fmt: skip


class _Standstill:
    """Says so when the event loop has not come round for a minute, and in which lines of code it is."""

    def __init__(self, loop: asyncio.AbstractEventLoop, thread: int):
        self._loop, self._thread = loop, thread
        self._beat, self._said = time.monotonic(), time.monotonic()

    def look(self) -> None:
        now = time.monotonic()
        if now - max(self._beat, self._said) >= _SILENCE_SECONDS:
            self._said = now
            logger.warning(
                "the rollout's event loop has stood still for %.0f s, and every request with it, in %s; "
                "what takes long must be awaited, or run by a worker",
                now - self._beat, self._where(),
            )  # fmt: skip
        self._loop.call_soon_threadsafe(self._note)

    def _note(self) -> None:
        self._beat = time.monotonic()

    def _where(self) -> str:
        frame = sys._current_frames().get(self._thread)
        stack = traceback.extract_stack(frame)[::-1] if frame else []
        own = [at for at in stack[1:] if not at.filename.startswith(_LIBRARIES)]
        return " < ".join(f"{at.name} ({at.filename}:{at.lineno})" for at in [*stack[:1], *own[:_OWN_FRAMES]])


class Watch:
    """`with Watch(waiting)` inside a coroutine: a thread looks every few seconds at what `waiting` gives, until the block ends.

    waiting: called in that thread; the groups that have not come back, and how many have. An exception in a look is told once
    and does not end the watch.
    """

    def __init__(self, waiting: Callable[[], tuple[Sequence[Group], int]], what: str = ""):
        self._waiting, self._silence = waiting, Silence(what)
        self._what = f"{what}: " if what else ""
        self._standstill = _Standstill(asyncio.get_running_loop(), threading.get_ident())
        self._leave = threading.Event()
        self._told: set[str] = set()
        self._thread = threading.Thread(target=self._watch, name="rollout-watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        _watching.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _watching.remove(self)
        self._leave.set()  # not joined: a look that waits for a lock must not hold the event loop

    def text(self) -> str:
        groups, num_back = self._waiting()
        samples = [sample for group in groups for sample in flatten(group)]
        generating, graded = sum(map(_generates, samples)), sum(map(_is_graded, samples))
        told = f"{num_back} prompts are back, {len(groups)} wait: {generating} samples for an engine, {graded} for a grader"
        return self._what + told

    def _watch(self) -> None:
        while not self._leave.wait(_LOOK_SECONDS):
            try:
                groups, num_back = self._waiting()
                self._silence.look(groups, num_back=num_back)
                self._standstill.look()
            except Exception as error:
                line = f"{type(error).__name__}: {error}"
                if line not in self._told and not self._leave.is_set():  # the loop may have been closed in the middle of a look
                    self._told.add(line)
                    logger.warning("looking after the rollout failed (%s); looking goes on", line)
