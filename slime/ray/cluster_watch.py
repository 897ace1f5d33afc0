"""A driver ends with its cluster: Ray itself waits for a control process that is gone, and so would a run."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
GONE_SECONDS = 15.0
"""A busy machine may miss a few looks."""
LEAVE_SECONDS = 20.0
"""For the `with` block that stops engines and trainer; calls to a cluster that is gone may not return."""


class ClusterWatch:
    """A daemon thread that connects to Ray's control process (GCS) again and again, and ends this process when nobody listens.

    First as SIGTERM does, then, if that takes longer than `leave_seconds`, at once with status 1.
    """

    def __init__(self, address: str, *, look: float = LOOK_SECONDS, gone: float = GONE_SECONDS, leave: float = LEAVE_SECONDS):
        """address: "host:port" of the control process."""
        host, _, port = address.rpartition(":")
        self._target = (host.strip("[]"), int(port))
        self._look, self._gone, self._leave_seconds = look, gone, leave
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="cluster-watch", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        last_seen = time.monotonic()
        while not self._stopped.wait(self._look):
            if self._answers():
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen >= self._gone:
                break
        if self._stopped.is_set():
            return
        logger.error("Ray's control process at %s:%d is gone, and the cluster with it: the run ends", *self._target)
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._stopped.wait(self._leave_seconds):
            os._exit(1)

    def _answers(self) -> bool:
        try:
            socket.create_connection(self._target, timeout=self._look).close()
        except OSError:
            return False
        return True
