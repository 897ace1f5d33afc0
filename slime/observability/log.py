"""Logging set up the same way in every process: time, who speaks, the line."""

from __future__ import annotations

import logging
import sys


def setup_logging(who: str, *, level: int = logging.INFO) -> None:
    """Send this process's log lines to stderr as `HH:MM:SS [who] line`. Safe to call twice."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s [{who}] %(message)s", datefmt="%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(level)
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "asyncio", "megatron", "ray"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
