"""When a run is asked to leave, or has said when it would: preemption, a job's time limit, an interval.

A boundary is where a checkpoint is whole: between two rollouts. While engines work nothing is trained, so the driver may stop
waiting for them at once, and what counts is the rollout before; a rollout that is being trained is finished.
The wait ends by KeyboardInterrupt: of all that a signal handler may raise, Ray's calls pass on nothing else unbroken.
"""

from __future__ import annotations

import logging
import os
import signal as signals
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from slime.config.upkeep import UpkeepConfig

logger = logging.getLogger(__name__)

STOPPED = 143
"""Status of a run that left without saving: 128 + SIGTERM, as a shell says it."""
# For the `with` block that stops engines and trainer, once the time for saving is over.
_LEAVE_SECONDS = 30.0


class Leaving:
    """Whether, when and why the run leaves. `listen` puts the signal handlers in place; Ray replaces them when it starts."""

    def __init__(self, rules: UpkeepConfig | None = None, *, clock: Callable[[], float] = time.monotonic):
        self._rules, self._clock = rules or UpkeepConfig(), clock
        self._started = clock()
        self._may_interrupt = True  # until there is something that could be lost
        self.signal: str | None = None
        """Which one came."""

    @property
    def saves_on_signal(self) -> bool:
        return self._rules.save_on_signal

    def listen(self) -> None:
        signals.signal(signals.SIGTERM, self._on_signal)
        if self.saves_on_signal:
            for one in (signals.SIGUSR1, signals.SIGINT):
                signals.signal(one, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        name = signals.Signals(number).name
        if not self.saves_on_signal or self.signal is not None:
            again = " again" if self.signal is not None else ""
            logger.info("stopped from outside (%s%s): ending engines and trainer; the last checkpoint is intact", name, again)
            sys.exit(STOPPED)
        self.signal = name
        seconds = self._rules.save_on_signal_seconds
        logger.info("%s: saving at the next boundary and leaving, within %d s; a second signal leaves at once", name, seconds)
        threading.Thread(target=self._leave_late, name="leave-late", daemon=True).start()
        if self._may_interrupt:
            raise KeyboardInterrupt(name)

    def _leave_late(self) -> None:
        seconds = self._rules.save_on_signal_seconds
        time.sleep(seconds)
        logger.error("the run was not saved within --save-on-signal-seconds %d: it leaves with status %d", seconds, STOPPED)
        os.kill(os.getpid(), signals.SIGTERM)
        time.sleep(_LEAVE_SECONDS)
        os._exit(STOPPED)

    def hold(self) -> None:
        """From now on a signal waits for the next boundary; only `interruptible` lets it through."""
        self._may_interrupt = False
        self._leave_if_asked()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within the block a signal raises KeyboardInterrupt, also one that came before it."""
        self._may_interrupt = True
        try:
            self._leave_if_asked()
            yield
        finally:
            self._may_interrupt = False

    def _leave_if_asked(self) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt(self.signal)

    def why_after(self, rollout_id: int, *, is_last: bool) -> str | None:
        """Why the run leaves after this rollout; None where it goes on, or ends in any case."""
        rules, minutes = self._rules, (self._clock() - self._started) / 60
        if self.signal is not None:
            return self.signal
        if is_last:
            return None
        if rules.exit_duration_in_mins is not None and minutes > rules.exit_duration_in_mins:
            return f"--exit-duration-in-mins {rules.exit_duration_in_mins:g}, after {minutes:.1f}"
        if rules.exit_interval is not None and (rollout_id + 1) % rules.exit_interval == 0:
            return f"--exit-interval {rules.exit_interval}"
        return None
