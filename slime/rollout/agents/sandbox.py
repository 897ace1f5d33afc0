"""A Python tool for what a policy writes: each call is a process of its own that ends within its limits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)

_PROGRAM = Path(__file__).with_name("confined.py")
_BY_CPU = (128 + signal.SIGXCPU, 128 + signal.SIGKILL)


@dataclass(frozen=True)
class Limits:
    """Of one call."""

    cpu_seconds: int = 5
    wall_seconds: float = 10.0
    memory_bytes: int = 512 << 20
    """Of address space, for each process."""
    file_bytes: int = 16 << 20
    """Of all files it writes where it has a file system of its own, of each elsewhere."""
    processes: int = 16
    """Threads count; only where it has namespaces."""
    output_bytes: int = 8192
    """Of its output and errors together. What writes more is ended."""


@dataclass(frozen=True)
class Outcome:
    """What became of a piece of code."""

    output: str
    """Standard output and errors as they came, cut at the limit."""
    status: int
    """0 where it came to its end; 128 and the signal where one ended it."""
    exceeded: Literal["", "cpu", "wall", "output"] = ""
    """The limit that ended it. Too much memory or too large files are errors in the code, so they are in the output."""

    def for_the_policy(self) -> str:
        """Text for a tool's answer: the output, and why there is no more of it."""
        why = {"cpu": "out of CPU time", "wall": "out of time", "output": "too much output"}.get(self.exceeded, "")
        if not why and self.status >= 128:
            why = f"ended by signal {self.status - 128}"
        return "\n".join(filter(None, [self.output.rstrip("\n"), f"[{why}]" if why else ""]))


class PythonSandbox:
    """Runs code by `run`, at most `at_once` pieces at a time (default: one a core).

    isolation: "required" refuses to run code where the kernel gives no namespaces; "where possible" says once that the limits
    hold alone there, so that code sees the network and all files of this user.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        isolation: Literal["required", "where possible"] = "where possible",
        at_once: int | None = None,
    ):
        self.limits, self._required = limits or Limits(), isolation == "required"
        self._at_once = at_once or os.cpu_count() or 1
        self._free: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}
        self._confined: bool | None = None

    async def run(self, code: str) -> Outcome:
        """Raises RuntimeError where isolation is required and cannot be had."""
        free = self._free.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._at_once))
        async with free:
            if self._confined is None:
                self._confined = await self._can_confine()
            return await self._run(code, required=self._confined)

    async def _can_confine(self) -> bool:
        tried = await self._run("", required=True)
        if tried.status == 0:
            return True
        if self._required:
            raise RuntimeError(f"code of a policy cannot be isolated on this machine: {tried.output.strip()}")
        logger.warning(
            "code of the policy runs with limits of time and memory, but sees the network and this user's files: %s",
            tried.output.strip(),
        )
        return False

    async def _run(self, code: str, *, required: bool) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="slime-sandbox-") as folder:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", str(_PROGRAM), json.dumps(self._settings(folder, required)),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
                cwd=folder, env={}, start_new_session=True,
            )  # fmt: skip
            try:
                output, exceeded = await self._read(process, code)
            finally:
                # The whole session: where there is no namespace, what the code started may have outlived it.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                # asyncio waits for the end of the pipes too, and never sees it where a full buffer has paused their reader.
                process._transport.close()
                await process.wait()
        status = process.returncode if process.returncode >= 0 else 128 - process.returncode
        if not exceeded and status in _BY_CPU:
            exceeded = "cpu"
        return Outcome(output, status, exceeded)

    def _settings(self, folder: str, required: bool) -> dict[str, object]:
        limits = self.limits
        return {
            "folder": folder,
            "required": required,
            "python": sys.executable,
            "visible": _what_python_needs(),
            "cpu_seconds": limits.cpu_seconds,
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
            "processes": limits.processes,
        }

    async def _read(self, process: asyncio.subprocess.Process, code: str) -> tuple[str, Literal["", "wall", "output"]]:
        parts: list[bytes] = []
        exceeded: Literal["", "wall", "output"] = ""
        try:
            async with asyncio.timeout(self.limits.wall_seconds):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    process.stdin.write(code.encode("utf-8", "replace"))
                    await process.stdin.drain()
                process.stdin.close()
                while part := await process.stdout.read(4096):
                    parts.append(part)
                    if sum(map(len, parts)) > self.limits.output_bytes:
                        exceeded = "output"
                        break
                else:
                    await process.wait()
        except TimeoutError:
            exceeded = "wall"
        return b"".join(parts)[: self.limits.output_bytes].decode("utf-8", "replace"), exceeded


def _what_python_needs() -> list[str]:
    """Folders of the interpreter, its packages and the libraries of the system; links to such folders stay links."""
    wanted = ["/usr", "/lib", "/lib64", "/bin", sys.prefix, os.path.realpath(sys.prefix), sys.base_prefix]
    found = dict.fromkeys(path for path in wanted if os.path.exists(path))
    return [path for path in found if not any(path != other and path.startswith(f"{other}/") for other in found)]
