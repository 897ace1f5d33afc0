"""The router in front of a model's engines: one process, only the workers we give it, nothing but loopback unless told."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from slime.compat.sglang import REPOSITORY
from slime.engine.ports import ROUTER_FIRST_PORT, PortBook, require_port
from slime.engine.process import ChildProcess, EngineDied


@dataclass(frozen=True)
class Worker:
    """An engine as the router knows it."""

    url: str
    role: str
    bootstrap_port: int | None = None


ROUTER_DEFAULTS: Mapping[str, object] = {
    "log_level": "warn",
    "balance_abs_threshold": 10,
    "balance_rel_threshold": 1.2,
    "request_timeout_secs": 14400,
    "worker_startup_timeout_secs": 600,
    "worker_startup_check_interval": 1,
    # A paused engine answers nothing for the length of a weight update: neither may take it out of the rotation.
    "disable_circuit_breaker": True,
    "disable_health_check": True,
    # Groups of n samples come at once; the router's own queue would refuse them.
    "max_concurrent_requests": -1,
    "max_payload_size": 2**31,
    "shutdown_grace_period_secs": 1,
}


def router_argv(
    workers: Sequence[Worker], *, host: str, port: int, prometheus_port: int, options: Mapping[str, object]
) -> list[str]:
    """The command line of `sglang_router.launch_router`. Raises ValueError for half a PD pair or an encoder."""
    roles = [worker.role for worker in workers]
    paired = any(role in ("prefill", "decode") for role in roles)
    if paired and ("prefill" not in roles or "decode" not in roles or "regular" in roles):
        raise ValueError(
            f"prefill/decode needs at least one engine of each kind and no regular one behind a router, got {roles}"
        )
    argv = [f"--host={host}", f"--port={port}", "--prometheus-host=127.0.0.1", f"--prometheus-port={prometheus_port}"]
    for name, value in {**ROUTER_DEFAULTS, **options}.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        argv += [flag] if value is True else [f"{flag}={value}"]
    if not paired:
        return [*argv, "--worker-urls", *(worker.url for worker in workers)] if workers else argv
    argv.append("--pd-disaggregation")
    for worker in workers:
        if worker.role == "prefill":
            argv += ["--prefill", worker.url, str(worker.bootstrap_port)]
        else:
            argv += ["--decode", worker.url]
    return argv


class RouterProcess:
    """A running router. The token goes to the engines with every request."""

    def __init__(
        self, workers: Sequence[Worker], *, token: str, log_path: str | Path, host: str = "127.0.0.1", port: int | None = None,
        options: Mapping[str, object] | None = None, report: Callable[[str], None] = lambda line: None, name: str = "router",
    ):  # fmt: skip
        self.workers, self.token, self.host, self.report, self.name = tuple(workers), token, host, report, name
        # Its metrics ask for no token, so they are for this node.
        self._book, self._metrics_book = PortBook(host, ROUTER_FIRST_PORT), PortBook("127.0.0.1", ROUTER_FIRST_PORT)
        if port is None:
            self.port = self._book.take()
        else:
            self._book.held[port] = require_port(host, port, "--sglang-router-port")
            self.port = port
        self._argv = router_argv(
            workers, host=host, port=self.port, prometheus_port=self._metrics_book.take(), options=dict(options or {})
        )
        self.child = ChildProcess(name, Path(log_path))

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def start(self) -> None:
        env = dict(os.environ)
        env["PYTHONPATH"] = os.pathsep.join(
            dict.fromkeys(part for part in (str(REPOSITORY), env.get("PYTHONPATH", "")) if part)
        )
        self.child.launch([sys.executable, "-u", "-m", "slime.engine.serve_router", *self._argv], env, self.token)

    def wait_ready(self, timeout: float = 120.0) -> float:
        """Seconds until every worker is registered."""
        took = self.child.wait(self._answers, timeout=timeout, phase=lambda: "registering engines", report=self.report)
        self._book.release()
        self._metrics_book.release()
        self.report(f"{self.name}: ready at {self.url} after {took:.1f} s, {len(self.workers)} engines")
        return took

    def _answers(self) -> bool:
        try:
            headers = {"Authorization": f"Bearer {self.token}"}
            answer = httpx.get(f"{self.url}/workers", headers=headers, timeout=2.0, trust_env=False)
        except httpx.TransportError:
            return False
        if answer.status_code != 200:
            return False
        found = {worker["url"] for worker in answer.json()["workers"]}
        return found >= {worker.url for worker in self.workers}

    def missed_check(self, timeout: float) -> str | None:
        """Why it did not tell its engines within `timeout` seconds; None if it did."""
        try:
            headers = {"Authorization": f"Bearer {self.token}"}
            answer = httpx.get(f"{self.url}/workers", headers=headers, timeout=timeout, trust_env=False)
        except httpx.TransportError as error:
            return f"GET {self.url}/workers: {type(error).__name__} {error}".rstrip()
        return None if answer.is_success else f"GET {self.url}/workers: status {answer.status_code}"

    def is_alive(self) -> bool:
        return self.child.is_alive()

    def check(self) -> None:
        """Raises EngineDied with the reason when the process has ended."""
        if not self.is_alive():
            raise EngineDied(self.child.obituary())

    def stop(self) -> None:
        self._book.release()
        self._metrics_book.release()
        self.child.stop()


class JoinedRouter:
    """A router that somebody else runs (--sglang-router-ip, --sglang-router-port): our engines are its workers while the run
    lasts. It is never started or stopped; what it is asked carries the run's token."""

    name = "router"

    def __init__(self, workers: Sequence[Worker], *, host: str, port: int, token: str, report: Callable[[str], None]):
        self.workers, self.host, self.port, self._token, self._report = tuple(workers), host.strip("[]"), port, token, report

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def start(self) -> None:
        """Add the engines that it does not have. Raises ValueError where nobody answers, or the router refuses one."""
        known = {worker["url"] for worker in self._known()}
        for worker in self.workers:
            if worker.url in known:
                continue
            body: dict[str, object] = {"url": worker.url, "worker_type": worker.role, "api_key": self._token}
            if worker.bootstrap_port is not None:
                body["bootstrap_port"] = worker.bootstrap_port
            self._ask("POST", "/workers", body)

    def wait_ready(self, timeout: float = 120.0) -> float:
        """Seconds until every worker is registered."""
        started = time.monotonic()
        while missing := {worker.url for worker in self.workers} - {worker["url"] for worker in self._known()}:
            if time.monotonic() - started > timeout:
                raise TimeoutError(f"the router at {self.url} has not taken {', '.join(sorted(missing))} in {timeout:.0f} s")
            time.sleep(0.25)
        took = time.monotonic() - started
        self._report(f"router: joined {self.url} with {len(self.workers)} engines in {took:.1f} s")
        return took

    def is_alive(self) -> bool:
        try:
            self._known()
        except ValueError:
            return False
        return True

    def check(self) -> None:
        """Raises EngineDied when it does not answer."""
        try:
            self._known()
        except ValueError as error:
            raise EngineDied(str(error)) from None

    def stop(self) -> None:
        """Take our engines out of it; it runs on."""
        ours = {worker.url for worker in self.workers}
        try:
            for worker in self._known():
                if worker["url"] in ours:
                    self._ask("DELETE", f"/workers/{worker['id']}")
        except ValueError as error:
            self._report(f"router: {error}; our engines may still be listed there")

    def _known(self) -> list[dict]:
        return self._ask("GET", "/workers").json()["workers"]

    def _ask(self, method: str, path: str, body: Mapping[str, object] | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self._token}"}
        try:
            answer = httpx.request(method, f"{self.url}{path}", json=body, headers=headers, timeout=10.0, trust_env=False)
        except httpx.TransportError as error:
            raise ValueError(
                f"the router of --sglang-router-ip at {self.url} does not answer ({type(error).__name__}: {error}); start it, "
                "or leave the flag out and the run starts its own"
            ) from None
        if not answer.is_success:
            raise ValueError(f"the router at {self.url} answers {method} {path} with {answer.status_code}: {answer.text[:300]}")
        return answer
