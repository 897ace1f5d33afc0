"""A user's grader, on an event loop of its own in a thread: one that blocks holds neither generation nor the watchers.

All calls share one loop, as module-level clients and semaphores of such code expect. A call that it does not begin within
a second, because an earlier one blocks it, is offered to a further loop, up to the number of workers; so blocking graders run
side by side. A thread cannot be ended: a loop that is still blocked when its call's time is up is left behind and replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

from slime.rollout.failures import told, users_lines
from slime.rollout.grading.pool import GradingError

logger = logging.getLogger(__name__)

# Long enough that a loop which is only slow to wake under load is not taken for a blocked one.
PATIENCE_SECONDS = 1.0


class _Loop:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="own-grader", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while True:
            try:
                return self.loop.run_forever()
            except BaseException as error:  # sys.exit() in a task that a grader started: no reason to end the others
                logger.warning("a task of a grader raised %s", told(error))

    def where(self) -> str:
        """The user's lines that the thread is executing; empty while it waits."""
        frame = sys._current_frames().get(self.thread.ident)
        return users_lines(traceback.extract_stack(frame)) if frame is not None else ""


class _Call:
    """One awaitable to make and await, on whichever loop claims it first."""

    def __init__(self, make: Callable[[], Awaitable[Any]]):
        self.make, self.context = make, contextvars.copy_context()
        self.caller = asyncio.get_running_loop()
        self.begun = asyncio.Event()
        self.result: Future = Future()
        self.loop: _Loop | None = None
        self.task: asyncio.Task | None = None
        self.given_up = False
        """Nobody waits for it any more."""
        self._claim = threading.Lock()

    def offer_to(self, loop: _Loop) -> None:
        start, context = loop.loop.create_task, self.context.copy()  # two loops cannot be in one context at once
        loop.loop.call_soon_threadsafe(lambda: start(self._run(loop), context=context))

    async def _run(self, loop: _Loop) -> None:
        # Claimed here, by the task's first step: tasks that are made while another one blocks are still free for other loops.
        if not self._claim.acquire(blocking=False):
            return
        self.loop, self.task = loop, asyncio.current_task()
        self.caller.call_soon_threadsafe(self.begun.set)
        try:
            self.result.set_result(await self.make())
        except Exception as error:
            self.result.set_exception(error)
        except BaseException as error:
            # sys.exit() of a library, or a cancelled request of the grader's own: it ends this grading. Let through, it would
            # end the loop's thread, which every later call waits for, or pass for a cancellation of the caller.
            if self.given_up:
                self.result.cancel()
            else:
                self.result.set_exception(GradingError(type(error).__name__, told(error)))

    def cancel(self) -> None:
        """Nobody begins it from now on; if somebody has, it is cancelled as soon as its loop is free."""
        self.given_up = True
        if not self._claim.acquire(blocking=False) and self.task is not None:
            self.loop.loop.call_soon_threadsafe(self.task.cancel)


class OwnCode:
    """At most `num_loops` blocking calls at a time; any number of calls that wait."""

    def __init__(self, num_loops: int):
        self._loops: list[_Loop | None] = [None] * num_loops
        self._lock = threading.Lock()

    async def run(self, make: Callable[[], Awaitable[Any]], *, name: str, seconds: float) -> Any:
        """What the awaitable gives, or its exception. Raises GradingError when it is not done `seconds` after it began."""
        call = _Call(make)
        try:
            await self._begin(call)
            waiting = asyncio.wrap_future(call.result)
            # A cancelled caller looks at no result, and asyncio prints an error that nobody has looked at.
            waiting.add_done_callback(lambda future: future.cancelled() or future.exception())
            done, _ = await asyncio.wait([waiting], timeout=seconds)
            if done:
                return waiting.result()
            where = call.loop.where()
            if where:
                self._leave_behind(call.loop)
            raise GradingError(
                "timeout",
                f"{name} gave no reward within {seconds:g} s (--rm-timeout)"
                + (f"; its loop is blocked at {where}" if where else ""),
            )
        finally:
            if not call.result.done():
                call.cancel()

    async def _begin(self, call: _Call) -> None:
        """Offer the call to one loop after the other until one begins it."""
        offered: set[_Loop] = set()
        number = 0
        while not call.begun.is_set():
            loop = self._loop(number % len(self._loops))
            number += 1
            if loop not in offered:
                offered.add(loop)
                call.offer_to(loop)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(call.begun.wait(), PATIENCE_SECONDS)

    def _loop(self, number: int) -> _Loop:
        with self._lock:
            if self._loops[number] is None:
                self._loops[number] = _Loop()
            return self._loops[number]

    def _leave_behind(self, loop: _Loop) -> None:
        """Its thread ends once the call that blocks it returns, if ever."""
        with self._lock:
            if loop in self._loops:
                self._loops[self._loops.index(loop)] = None
        # Not at once: calls that were offered to it meanwhile find that others have begun them.
        loop.loop.call_soon_threadsafe(loop.loop.call_later, PATIENCE_SECONDS, loop.loop.stop)
