"""Logging set up the same way in every process: time, who speaks, the line; a person's part on the terminal, all in files."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

_NOISY = ("httpx", "httpcore", "urllib3", "filelock", "asyncio", "megatron", "ray")
_OURS = ("slime", "slime_plugins")


def run_folder(save: str | None) -> Path:
    """Where logs, metrics and memory.json go: SLIME_RUN_DIR (a launcher's RUN_DIR), else beside the checkpoints (--save), else
    ./outputs."""
    return Path(os.environ.get("SLIME_RUN_DIR") or Path(save or "outputs") / "logs").absolute()


def setup_logging(who: str, *, folder: Path | None = None, level: int = logging.INFO) -> Path | None:
    """Send this process's log lines to stderr as `HH:MM:SS [who] line`. Safe to call twice.

    folder: `who.log` in it gets the same lines, those of level DEBUG from our own code as well, and Python's warnings, which
    then do not go to stderr. Returns that file; None where there is no folder or it cannot be written here (a node without it).
    """
    root = logging.getLogger()
    warned = logging.getLogger("py.warnings")
    for logger in (root, warned):
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(level)
    terminal.setFormatter(logging.Formatter(f"%(asctime)s [{who}] %(message)s", datefmt="%H:%M:%S"))
    root.addHandler(terminal)
    root.setLevel(level)
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    file = _file_handler(folder / f"{who.replace(' ', '-')}.log") if folder is not None else None
    if file is None:
        return None
    root.addHandler(file)
    for ours in _OURS:
        logging.getLogger(ours).setLevel(logging.DEBUG)
    logging.captureWarnings(True)
    warned.addHandler(file)
    warned.propagate = False
    return Path(file.baseFilename)


def _file_handler(file: Path) -> logging.FileHandler | None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(file, delay=False)
    except OSError:
        return None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"))
    handler.handleError = lambda record: None  # a full disk ends no run, and says so where checkpoints are written
    handler.stream.write(f"---- pid {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    handler.flush()
    return handler


def write_whole(file: Path, text: str) -> None:
    """A reader finds the old file or the new one, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    part.write_text(text)
    part.replace(file)
