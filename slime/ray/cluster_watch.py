"""A driver ends with its cluster: Ray itself waits for a control process that is gone, and so would a run.

It also says when Ray's own processes on this machine are stopped: everything asks them, so everything waits, and whoever gives
up first blames another.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from slime.ray.fates import stopped

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
GONE_SECONDS = 15.0
"""A busy machine may miss a few looks."""
LEAVE_SECONDS = 20.0
"""For the `with` block that stops engines and trainer; calls to a cluster that is gone may not return."""


_PARTS = {"gcs_server": "Ray's control process (gcs_server)", "raylet": "Ray's raylet"}


def parts_here(session: str) -> dict[str, int]:
    """Ids of Ray's own processes on this machine, by what a reader calls them. session: name of the cluster's session."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0") if entry.name.isdigit() else [""]
        except OSError:
            continue
        name = _PARTS.get(os.path.basename(words[0]))
        if name is not None and f"--session-name={session}" in words:
            found[name] = int(entry.name)
    return found


class ClusterWatch:
    """A daemon thread that connects to Ray's control process (GCS) again and again, and ends this process when nobody listens.

    First as SIGTERM does, then, if that takes longer than `leave_seconds`, at once with status 1.
    """

    def __init__(
        self,
        address: str,
        parts: Mapping[str, int] | None = None,
        *,
        look: float = LOOK_SECONDS,
        gone: float = GONE_SECONDS,
        leave: float = LEAVE_SECONDS,
    ):
        """address: "host:port" of the control process. parts: ids of Ray's processes on this machine, by name."""
        self._parts, self._since = dict(parts or {}), {}
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
            self._tell_stopped()
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

    def _tell_stopped(self) -> None:
        """Once for each stop; one that has ended is told by those who lose it."""
        for name, pid in self._parts.items():
            how = stopped(pid)
            if how is not None and name not in self._since:
                self._since[name] = time.monotonic()
                logger.warning("%s (pid %d) %s: whatever asks it waits", name, pid, how)
            elif how is None and (since := self._since.pop(name, None)) is not None:
                fate = "goes on" if os.path.exists(f"/proc/{pid}") else "has ended"
                logger.info("%s %s, after %.0f s", name, fate, time.monotonic() - since)

    def _answers(self) -> bool:
        try:
            socket.create_connection(self._target, timeout=self._look).close()
        except OSError:
            return False
        return True
