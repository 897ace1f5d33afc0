"""One engine process: started, waited for, and stopped with everything it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import httpx

from slime.compat.peers import keep_listeners
from slime.engine import kernels, kinds
from slime.engine.groups import group_exists, members, remove_listed, shared_files, write_list
from slime.engine.last_words import last_words
from slime.engine.ports import DIST_INIT_BLOCK, EnginePorts, PortBook, bind_when_free, take_engine_ports
from slime.engine.spec import EngineSpec, NodePlacement
from slime.engine.versions import capabilities, installed_version, option_table, typed_argv
from slime.observability.memory_kills import BY_THE_KERNEL, count_in_container, killed_for_memory

# Nothing is lost by killing a server; SGLang would take 5 s to say goodbye.
TERMINATE_SECONDS = 3.0
KILL_SECONDS = 5.0
TAKE_OVER_SECONDS = 60.0

# What a server's log shows, in order; the last one seen is the phase that `wait_ready` reports.
PHASES = (
    ("server_args=", "read options"),
    ("Init torch distributed begin", "joining ranks"),
    ("Load weight begin", "loading weights"),
    ("Load weight end", "weights loaded"),
    ("KV Cache is allocated", "cache allocated"),
    ("Capture", "capturing graphs"),
    ("Uvicorn running", "listening"),
)


class EngineDied(RuntimeError):
    """A server ended by itself; the message holds the last lines of its log."""


@dataclass
class ChildProcess:
    """A server child in a process group of its own, with its log and the pipe that ties its life to ours."""

    label: str
    log_path: Path
    popen: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    _log: BinaryIO | None = field(default=None, repr=False)
    _shared: set[Path] = field(default_factory=set, repr=False)
    _members: set[int] = field(default_factory=set, repr=False)
    """Of its process group, when that was last looked at."""
    _kills_before: int = field(default=0, repr=False)

    def launch(self, argv: Sequence[str], env: dict[str, str], token: str) -> None:
        """Start `argv`; the token is written to its stdin, which stays open until `stop`."""
        if self.is_alive():
            raise ValueError(f"{self.label} is already running (pid {self.popen.pid})")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        remove_listed(self._shared_list)  # of one whose actor was killed
        if self.popen is not None:
            # The last words of the one that died stay readable beside its successor's.
            self.log_path.replace(self.log_path.with_suffix(f"{self.log_path.suffix}.{self.popen.pid}"))
        # What an engine was asked may be printed: the log is the owner's alone.
        descriptor = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._log = os.fdopen(descriptor, "wb")
        self.started, self._kills_before, self._members = time.monotonic(), count_in_container(), set()
        self.popen = subprocess.Popen(
            list(argv), env=env, stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.popen.stdin.write(token.encode() + b"\n")
        self.popen.stdin.flush()

    @property
    def _shared_list(self) -> Path:
        return self.log_path.with_suffix(".shared")

    def is_alive(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    @property
    def pid(self) -> int:
        if self.popen is None:
            raise ValueError(f"{self.label} was not started")
        return self.popen.pid

    def wait(
        self,
        ready: Callable[[], bool],
        *,
        timeout: float,
        phase: Callable[[], str],
        report: Callable[[str], None],
        detail: Callable[[str], None] = lambda line: None,
    ) -> float:
        """Seconds until `ready`. Raises EngineDied when the child ends, TimeoutError after `timeout` seconds.

        report: gets the phase of a start that takes long, every half minute. detail: gets each phase once.
        """
        last_phase, next_report = "", 30.0
        while True:
            elapsed = time.monotonic() - self.started
            if not self.is_alive():
                raise EngineDied(self.obituary())
            if ready():
                return elapsed
            now = phase()
            if now != last_phase:
                detail(f"{self.label}: {now} ({elapsed:.0f} s)")
                last_phase = now
                self.note_group()  # a server that dies while it starts leaves them as well
            if elapsed > next_report:
                report(f"{self.label}: {now} ({elapsed:.0f} s of at most {timeout:.0f})")
                next_report = elapsed + 30.0
            if elapsed > timeout:
                raise TimeoutError(
                    f"{self.label} is not ready after {elapsed:.0f} s (phase: {now}; expected within {timeout:.0f} s)"
                    f"{last_words(self.log_path)}"
                )
            time.sleep(0.25)

    def obituary(self) -> str:
        code = self.popen.returncode if self.popen is not None else None
        how = (
            f"was killed by signal {-code} ({signal.Signals(-code).name})"
            if code is not None and code < 0
            else f"exited with {code}"
        )
        why = self._why_killed() if code == -signal.SIGKILL else ""
        return f"{self.label} {how}{why}{last_words(self.log_path)}"

    def _why_killed(self) -> str:
        """SGLang's first process kills itself when one of its others has ended."""
        killed = killed_for_memory({self.popen.pid, *self._members}, since=self.started)
        if self.popen.pid in killed:
            return BY_THE_KERNEL
        if killed:
            pid, name = next(iter(killed.items()))
            return f", because its process {pid} ({name}) was killed{BY_THE_KERNEL}"
        if (count := count_in_container() - self._kills_before) > 0:
            return f"; memory is the likely reason, the kernel has killed {count} processes of this container since it started"
        return ""

    def note_group(self) -> None:
        """Remember its processes, and the files in shared memory that SGLang makes and, being killed, does not remove."""
        self._members |= set(members(self.pid))
        found = shared_files(self.pid) - self._shared
        if found:
            self._shared |= found
            write_list(self._shared_list, self._shared)

    def stop(self) -> None:
        """End the whole process group and see it gone: TERM, then KILL. Safe to call twice."""
        if self.popen is None:
            return
        self.note_group()
        group = self.popen.pid  # start_new_session made the child the leader of its group
        for number, patience in ((signal.SIGTERM, TERMINATE_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
            if not group_exists(group):
                break
            try:
                os.killpg(group, number)
            except ProcessLookupError:
                break
            deadline = time.monotonic() + patience
            while group_exists(group) and time.monotonic() < deadline:
                self.popen.poll()
                time.sleep(0.05)
        try:
            # A killed process shows as a zombie before its last thread has gone, and cannot be waited for until then.
            self.popen.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            pass  # told below
        remove_listed(self._shared_list)
        self._shared.clear()
        if self.popen.stdin is not None:
            try:
                self.popen.stdin.close()
            except BrokenPipeError:
                pass
        if self._log is not None:
            self._log.close()
        if group_exists(group):
            raise RuntimeError(
                f"{self.label}: process group {group} survived SIGKILL; look at it with: ps -o pid,stat,cmd --ppid {group}"
            )


class EngineProcess:
    """The part of an engine that runs on one node. `url` answers when `place.node_rank` is 0."""

    def __init__(
        self,
        spec: EngineSpec,
        *,
        device_kind: str,
        token: str,
        log_path: str | Path,
        place: NodePlacement | None = None,
        ports: EnginePorts | None = None,
        kernel_cache: str | Path | None = None,
        report: Callable[[str], None] = lambda line: None,
        detail: Callable[[str], None] = lambda line: None,
    ):
        """place: None is loopback and the first device.

        ports: None takes free ones; else those of a server that has just ended or is about to, which are waited for.
        kernel_cache: folder of compiled kernels on CUDA; None leaves them where SGLang keeps them, below the home folder.
        report: gets a line per event. detail: gets what was made of each option, and each phase of the start.
        """
        if not token:
            raise ValueError("an engine needs the run's token: its control endpoints change weights and stop generation")
        self.spec, self.device_kind, self.token, self.report, self.detail = spec, device_kind, token, report, detail
        self._kernel_cache = kernel_cache
        self.place = place or NodePlacement(0, "127.0.0.1", 0)
        self._book = PortBook(self.place.host)
        self._takes_over = ports is not None
        self.ports = ports or take_engine_ports(self._book, prefill=spec.role == "prefill", dp_size=spec.dp_size)
        self.child = ChildProcess(f"engine {spec.label}", Path(log_path))
        self.notes: tuple[str, ...] = ()
        # The one whose ports these are has ended just now.
        self._stopped: float | None = time.monotonic() if ports is not None else None

    @property
    def url(self) -> str:
        host = f"[{self.place.host}]" if ":" in self.place.host else self.place.host
        return f"http://{host}:{self.ports.http}"

    @property
    def dist_init_addr(self) -> str:
        """Where the engine's ranks meet; node 0's goes into the NodePlacement of the other nodes."""
        return self.place.dist_init_addr or f"{self.place.host}:{self.ports.dist_init}"

    def start(self) -> None:
        """Returns when the process runs, not when it serves. Options are checked before anything starts.

        After `stop` it may be called again: the new process has the same address, so nobody needs to be told. A prefill engine
        waits until decode engines have noticed that it was gone: those that have not would send to its old buffers and wait.
        """
        if self._stopped is not None and self.spec.role == "prefill":
            time.sleep(max(0.0, self._stopped + seconds_until_missed(os.environ) - time.monotonic()))
        if self._takes_over:
            self._take_over()
        found = installed_version()
        plan = kinds.command(self.device_kind, self.spec, self.place, self.ports, capabilities(found))
        argv = typed_argv(plan.settings, option_table(found))
        self.notes = plan.notes
        for note in plan.notes:
            self.detail(f"engine {self.spec.label}: {note}")
        self.child.launch([sys.executable, "-u", "-m", "slime.engine.serve", *argv], self._kernels() | plan.env, self.token)

    def _kernels(self) -> dict[str, str]:
        """Environment; what the user set of it wins."""
        if self.device_kind != "cuda":
            return {}
        places = kernels.cache_environment(self._kernel_cache) if self._kernel_cache else {}
        return places | kernels.list_environment(self._kernel_cache, self.spec.model_path)

    def _take_over(self) -> None:
        """Once: the other server's ports are free, and its log stays beside ours."""
        self._takes_over = False
        for port in filter(None, (self.ports.http, self.ports.nccl, self.ports.bootstrap, self.ports.dist_init)):
            self._book.held[port] = bind_when_free(self.place.host, port, patience=TAKE_OVER_SECONDS)
        if self.child.log_path.exists():
            self.child.log_path.replace(self.child.log_path.with_suffix(f"{self.child.log_path.suffix}.lost"))

    def wait_ready(self, timeout: float = 600.0) -> float:
        """Seconds until the server answers (node 0), or until its ranks are up (other nodes).

        Raises EngineDied with the log's last lines when the process ends, TimeoutError with the phase it is stuck in.
        """
        if self.place.node_rank != 0:
            return 0.0
        took = self.child.wait(self._answers, timeout=timeout, phase=self._phase, report=self.report, detail=self.detail)
        self._book.release()
        self.child.note_group()
        if self.device_kind == "cuda":
            self.keep_to_the_run()
        self.report(
            f"engine {self.spec.label}: ready at {self.url} after {took:.1f} s "
            f"(pid {self.child.pid}, log {self.child.log_path})"
        )
        return took

    def keep_to_the_run(self) -> None:
        """The bootstrap server and the ports where ranks meet ask for no secret, and on GPUs SGLang opens them to everybody:
        the run's nodes alone get through from now on."""
        ports = {self.ports.nccl, *range(self.ports.dist_init, self.ports.dist_init + DIST_INIT_BLOCK + self.spec.dp_size)}
        ports |= {self.ports.bootstrap} - {None}
        if any(":" in address for address in (self.place.host, *self.place.peers)):
            return  # the filter reads IPv4
        try:
            kept = keep_listeners([*members(self.child.pid)], ports, sorted({"127.0.0.1", self.place.host, *self.place.peers}))
        except OSError as error:
            self.report(
                f"engine {self.spec.label}: its ports {min(ports)} to {max(ports)} ask for no secret and stay open to the "
                f"network ({error.strerror}); close them with the firewall rule of docs/en/advanced/sockets.md"
            )
            return
        self.detail(f"engine {self.spec.label}: {kept} sockets are kept to the nodes of the run")

    def _answers(self) -> bool:
        try:
            headers = {"Authorization": f"Bearer {self.token}"}
            return httpx.get(f"{self.url}/model_info", headers=headers, timeout=2.0, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def _phase(self) -> str:
        text = self.child.log_path.read_text(errors="replace")
        seen = [name for marker, name in PHASES if marker in text]
        return seen[-1] if seen else "starting Python"

    def is_alive(self) -> bool:
        return self.child.is_alive()

    def check(self) -> None:
        """Raises EngineDied with the reason when the process has ended."""
        if not self.is_alive():
            raise EngineDied(self.child.obituary())

    def stop(self) -> None:
        self._book.release()
        self.child.stop()
        self._stopped = time.monotonic()


def seconds_until_missed(environment: Mapping[str, str]) -> float:
    """After which a decode engine has surely forgotten a prefill engine that is gone: SGLang asks at intervals, and forgets
    after so many failures (sglang/srt/disaggregation/common/conn.py)."""
    interval = max(float(environment.get("SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL") or 5.0), 2.0)
    failures = max(int(environment.get("SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE") or 2), 1)
    return interval * failures + 1.0
