"""One node's part of one serving engine, in a Ray actor that sits in the engine's device slot."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import ray

from slime.engine.ports import EnginePorts
from slime.engine.process import EngineDied, EngineProcess
from slime.engine.spec import EngineSpec, NodePlacement
from slime.ray.fates import Process, stopped_below, this_process

logger = logging.getLogger(__name__)

# A cold start on GPUs compiles kernels and captures graphs for minutes; loading 744B from a shared disk takes longer still.
READY_SECONDS = 3600.0


@dataclass(frozen=True)
class EngineAddress:
    url: str
    bootstrap_port: int | None
    """Where decode engines ask a prefill engine for its KV cache."""
    dist_init_addr: str
    """Where the ranks of an engine over several nodes meet."""
    ports: EnginePorts
    actor: Process
    compiles: bool = False
    """Kernels are compiled when they are first called there."""


# Threads: whether the server lives can be asked, and it can be stopped, while somebody waits until it is ready.
@ray.remote(max_concurrency=4)
class EngineActor:
    """Starts, watches and stops the server process. Requests do not pass through here."""

    def __init__(
        self,
        spec: EngineSpec,
        place: NodePlacement,
        token: str,
        log_path: Path,
        *,
        kernel_cache: str | None,
        ports: EnginePorts | None = None,
    ):
        """kernel_cache: --kernel-cache. ports: those of an actor that was lost; the new server is where the old one was."""
        from slime.device import get_device
        from slime.observability.log import setup_logging

        setup_logging(spec.label, folder=log_path.parent)
        self._who, self._spec = this_process(), spec
        self._kind = get_device().kind
        self._process = EngineProcess(
            spec,
            device_kind=self._kind,
            token=token,
            log_path=log_path,
            place=place,
            ports=ports,
            kernel_cache=kernel_cache,
            report=logger.info,
            detail=logger.debug,
        )

    def start(self) -> EngineAddress:
        self._process.start()
        process = self._process
        at = (process.url, process.ports.bootstrap, process.dist_init_addr, process.ports)
        return EngineAddress(*at, self._who, compiles=self._kind == "cuda")

    def wait_ready(self) -> float:
        return self._process.wait_ready(timeout=READY_SECONDS)

    def obituary(self) -> str | None:
        """Why the process is gone, or None while it lives."""
        try:
            self._process.check()
        except EngineDied as died:
            return str(died)
        return None

    def condition(self) -> list[str]:
        """What is wrong with the server's processes: gone, or stopped; [] while all of them run."""
        gone = self.obituary()
        return [gone] if gone else [f"engine {self._spec.label}: {line}" for line in stopped_below(os.getpid())]

    def spoilt(self, folder: str) -> list[str]:
        """Tensors of a published version whose bytes, as this node reads them, are not the trainer's."""
        from slime.weights.published import wrong_tensors

        return wrong_tensors(folder)

    def follow(self, local: str, origin: str, root: str, version: int) -> list[int]:
        """Bring this node's copy of the checkpoint to a published version; the versions that were applied."""
        from slime.weights.published import LocalCopy

        return LocalCopy(local, origin=origin).follow(root, version)

    def stop(self) -> None:
        self._process.stop()
