"""Metrics to Weights & Biases, online or offline, under the same names. The library is imported with the first metrics."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import queue
import secrets
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slime.observability.tracking import Axis, Start

logger = logging.getLogger(__name__)

SECONDS_TO_BEGIN = 30
SECONDS_TO_FINISH = 120
STEP = {Axis.ROLLOUT: "rollout/step", Axis.TRAIN_STEP: "train/step"}
"""Axis -> the metric that W&B draws the others against, as slime names it."""
FAMILIES = {Axis.TRAIN_STEP: ("train",), Axis.ROLLOUT: ("rollout", "eval", "perf", "passrate", "multi_turn")}
"""Axis -> how the names of its metrics begin."""
SECRETS = frozenset({"wandb_key", "engine_token"})


@dataclass(frozen=True)
class WandbOptions:
    """What the flags say."""

    mode: Literal["online", "offline", "disabled"] | None
    """None is online, or what WANDB_MODE says."""
    folder: Path
    project: str | None
    team: str | None
    group: str | None
    """The run's name, too."""
    random_suffix: bool
    """Of the name, so that runs of one command differ."""
    key: str | None
    """None is WANDB_API_KEY, or what `wandb login` left."""
    host: str | None
    run_id: str | None
    """An existing run that goes on."""
    count_train_steps: bool
    """Figures of a rollout are drawn against the optimizer steps done by then."""


class WandbSink:
    """One run. Where the server cannot be reached or refuses the key, it is written offline and can be sent later.

    The library may wait for its server without an end, so that it has a thread of its own: the run never waits for it.
    """

    def __init__(self, options: WandbOptions, start: Start, config: Mapping[str, object]):
        """config: the flags, which W&B shows beside the curves. Raises ValueError where the package is not installed."""
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "--use-wandb needs the package wandb, which is not installed: pip install wandb, or --use-tensorboard"
            )
        self.place = f"W&B, {options.folder / 'wandb'}"
        self._options, self._config, self._run = options, config, None
        self._steps = start.train_steps
        self._waiting: queue.SimpleQueue[dict[str, float] | None] = queue.SimpleQueue()
        self._failed: Exception | None = None
        self._thread: threading.Thread | None = None

    def write(self, metrics: Mapping[str, float], axis: Axis, position: int) -> None:
        """Raises what went wrong with an earlier line."""
        if axis is Axis.TRAIN_STEP:
            self._steps = position
        step = self._steps if self._options.count_train_steps else position
        if self._thread is None:
            self._thread = threading.Thread(target=self._send, name="wandb", daemon=True)
            self._thread.start()
        self._waiting.put({**metrics, STEP[axis]: step})
        self._tell_failure()

    def close(self) -> None:
        if self._thread is None:
            return
        self._waiting.put(None)
        seconds = SECONDS_TO_BEGIN + SECONDS_TO_FINISH
        self._thread.join(seconds)
        if self._thread.is_alive():
            raise TimeoutError(f"W&B has not taken everything within {seconds} s; `wandb sync` sends what its folder holds")
        self._tell_failure()

    def _tell_failure(self) -> None:
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def _send(self) -> None:
        """The thread: lines in the order in which they came, until None."""
        while (line := self._waiting.get()) is not None:
            try:
                if self._run is None:
                    self._run = self._begin()
                self._run.log(line)
            except Exception as error:  # told with the next line, on the thread of whoever writes it
                self._failed = error
        try:
            if self._run is not None:
                self._run.finish()
        except Exception as error:
            self._failed = error

    def _begin(self):
        options = self._options
        mode = options.mode or os.environ.get("WANDB_MODE") or "online"
        host = options.host or os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
        try:
            if mode == "online":
                _reach(host)
            run = self._open(mode, host)
        except Exception as error:
            if mode != "online":
                raise
            told = " ".join(str(error).split())[:200]
            logger.warning("W&B does not answer (%s): metrics are kept offline, and `wandb sync` sends them", told)
            run = self._open("offline", host)
        for name in STEP.values():
            run.define_metric(name, hidden=True)
        for axis, families in FAMILIES.items():
            for family in families:
                run.define_metric(f"{family}/*", step_metric=STEP[axis])
        if mode == "disabled":
            self.place = "W&B, disabled"
        else:
            self.place = run.url or f"wandb sync {Path(run.dir).parent}"
        return run

    def _open(self, mode: str, host: str):
        import wandb

        options = self._options
        options.folder.mkdir(parents=True, exist_ok=True)
        name = options.group
        if name and options.random_suffix:
            name = f"{name}_{secrets.token_hex(3)}"
        settings = wandb.Settings(
            mode=mode,
            root_dir=str(options.folder),
            project=options.project,
            entity=options.team,
            run_group=options.group,
            run_name=name,
            run_id=options.run_id,
            resume="allow" if options.run_id else None,
            api_key=options.key,
            base_url=host,
            # The driver's own output has a reader already, and a command line may hold the key.
            console="off",
            silent=True,
            x_disable_meta=options.key is not None,
            init_timeout=SECONDS_TO_BEGIN,
            login_timeout=SECONDS_TO_BEGIN,
            finish_timeout=SECONDS_TO_FINISH,
        )
        return wandb.init(settings=settings, config=_plain(self._config))


def _reach(url: str) -> None:
    """Somebody listens there, or at the proxy on the way. Raises OSError: the library would try again for minutes."""
    parts = urllib.parse.urlsplit(url)
    if not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urllib.parse.urlsplit(urllib.request.getproxies().get(parts.scheme) or url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname, port), timeout=SECONDS_TO_BEGIN).close()


def _plain(config: Mapping[str, object]) -> dict[str, object]:
    """Without secrets; what JSON has no word for is text."""
    return {name: _word(value) for name, value in sorted(config.items()) if name not in SECRETS}


def _word(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, tuple | list):
        return [_word(one) for one in value]
    return {str(key): _word(one) for key, one in value.items()} if isinstance(value, Mapping) else str(value)
