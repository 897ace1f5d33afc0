"""Prompts, engines, rewards and the router, in one actor; and its face towards the driver."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import ray

from slime.config import Config
from slime.ray import witness
from slime.ray.destinations import Destinations
from slime.ray.fates import Process, end, this_process
from slime.ray.health import HealthWatch
from slime.ray.placement import Placement, Slot
from slime.ray.standstill import Patience
from slime.rollout.reports import Report

logger = logging.getLogger(__name__)

_SAY_SECONDS = 30.0


def seed_generators(seed: int, rollout_id: int) -> None:
    """Python's and NumPy's own generators, which plugins draw from: the same in every run, and after a resume, of a rollout."""
    words = np.random.SeedSequence([seed, rollout_id]).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(words[1])


@ray.remote
class RolloutActor:
    """Everything about samples that happens outside the trainer."""

    def __init__(self, config: Config, placement: Placement, run_folder: Path, token: str):
        from slime.observability.log import setup_logging
        from slime.ray.engine_fleet import EngineFleet
        from slime.rollout.dumps import Replay
        from slime.rollout.watch import waiting

        setup_logging("rollout", folder=run_folder)
        witness.tell_also(waiting)
        self._config, self._token = config, token
        self._fleet = EngineFleet(config, placement, run_folder, token)
        self._plugins = self._data_source = self._stream = None
        self._version = 0
        """Of the weights that the engines have."""
        template = config.debug.load_debug_rollout_data
        self._replay = Replay(template, share=config.debug.load_debug_rollout_data_subsample) if template else None

    def load_plugins(self) -> None:
        """Everything that flags name by a dotted path, before anything large starts. Raises ValueError."""
        from slime.rollout.plugins import load_plugins

        self._plugins = load_plugins(self._config)

    def process(self) -> Process:
        return this_process()

    def start(self) -> None:
        """Engines start first and load while prompts are read; then all is waited for."""
        from slime.rollout.fully_async_rollout import Stream
        from slime.rollout.http import init_http_client

        if self._plugins is None:
            self.load_plugins()
        has_engines = not self._config.debug.debug_train_only
        if has_engines:
            self._fleet.start()
        try:
            if self._replay is None:
                self._data_source = self._plugins.data_source(self._config.args.for_call())
                if self._config.loop.schedule == "fully-async":
                    self._stream = Stream(self._data_source)
            self._save_tokenizer()
            if has_engines:
                self._fleet.wait_ready()
        except BaseException:
            self._fleet.stop()
            raise
        self._args = self._runtime_args()
        init_http_client(self._args)

    def _runtime_args(self):
        runtime = {"engine_token": self._token}
        if self._fleet.router is not None:
            runtime |= {"sglang_router_ip": self._fleet.router.host, "sglang_router_port": self._fleet.router.port}
            runtime["sglang_model_routers"] = {name: (one.host, one.port) for name, one in self._fleet.routers.items()}
            if len(self._fleet.routers) > 1 or self._config.engine.rollout_external_engine_addrs:
                # Else as slime counts them, by GPUs.
                runtime["rollout_num_engines"] = len(self._fleet.updated())
        return self._config.args.with_runtime(**runtime)

    def _save_tokenizer(self) -> None:
        """--dump-details keeps what turns token ids into text beside the rollouts."""
        if self._config.debug.dump_details:
            from slime.rollout.tokenizer import load_tokenizer

            load_tokenizer(self._config.checkpoint.hf_checkpoint).save_pretrained(self._config.debug.dump_details)

    def num_rollout(self) -> int:
        data = self._config.data
        if data.num_rollout is not None:
            return data.num_rollout
        if self._replay is not None:
            raise ValueError("a replay reads no prompts to count epochs by: give --num-rollout with --load-debug-rollout-data")
        return data.num_epoch * (len(self._data_source) // data.rollout_batch_size)

    @ray.method(num_returns=2)
    def generate(self, rollout_id: int):
        """(RolloutBatch, Report) of one rollout."""
        from slime.rollout import dumps
        from slime.rollout.reports import report_rollout
        from slime.rollout.to_batch import make_rollout_batch

        started = time.monotonic()
        if self._replay is not None:
            output = self._replay.rollout(rollout_id)
        else:
            seed_generators(self._config.data.rollout_seed, rollout_id)
            with self._watched():
                args = self._args.with_runtime(weight_version=self._version)
                output = self._plugins.rollout(args, rollout_id, self._stream or self._data_source)
        seconds = time.monotonic() - started
        if self._config.debug.save_debug_rollout_data:
            # Before anything is made of the samples: a rollout that cannot be trained is the one to look at.
            dumps.save_rollout(self._config.debug.save_debug_rollout_data, rollout_id, output, data_state=self.state())
        batch = make_rollout_batch(output.samples, rollout_id=rollout_id, config=self._config)
        return batch, report_rollout(self._args, rollout_id, output, seconds=seconds)

    def evaluate(self, rollout_id: int) -> tuple[dict[str, float], Report]:
        """({dataset: mean reward}, Report). rollout_id: the last one trained; -1 before the first."""
        from slime.rollout import dumps
        from slime.rollout.reports import report_evaluation

        shown = max(rollout_id, 0)
        with self._watched():
            output = self._plugins.evaluate(self._args, shown, self._data_source, evaluation=True)
        if self._config.debug.save_debug_rollout_data:
            dumps.save_evaluation(self._config.debug.save_debug_rollout_data, rollout_id, output)
        report = report_evaluation(self._args, shown, output)
        return {name: report.metrics[f"eval/{name}"] for name in output.data}, report

    def _watched(self) -> AbstractContextManager:
        """Engines answer health checks only while they generate: they are paused or asleep at other times."""
        engine = self._config.engine
        if self._config.debug.debug_train_only:
            return nullcontext()
        return HealthWatch(
            self._fleet.end_hopeless_requests,
            partial(self._fleet.missed_checks, engine.rollout_health_check_timeout),
            self._fleet.end_server,
            interval=engine.rollout_health_check_interval if engine.use_fault_tolerance else math.inf,
            first_wait=engine.rollout_health_check_first_wait,
        )

    def state(self, saving: int | None = None) -> dict | None:
        """Which prompts come next, and which were begun; while replaying, as of when the last replayed rollout was made.

        saving: the rollout whose checkpoint gets it.
        """
        from slime.rollout.data_source import state_of

        if self._replay is not None:
            return self._replay.data_state
        return state_of(self._data_source, saving=saving) if self._stream is None else self._stream.position(saving)

    def restore(self, state: dict) -> None:
        from slime.rollout.data_source import return_to

        if self._replay is not None:
            self._replay.data_state = state
        elif self._stream is not None:
            self._stream.go_back(state)
        else:
            return_to(self._data_source, state)

    def destinations(self, trainer_slots: Sequence[Slot]) -> Destinations:
        return self._fleet.destinations(trainer_slots)

    def fleet(self, method: str, *args):
        """One of the fleet's calls (pause, flush, begin, ...)."""
        answer = getattr(self._fleet, method)(*args)
        if method == "end":
            (self._version,) = args
        return answer

    def stop(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._fleet.stop()


class RolloutSide:
    """The driver's view of the rollout actor: plain blocking calls whose errors read as text."""

    def __init__(self, actor, patience: Patience):
        self._actor, self._patience = actor, patience
        self._patience.also.append(self.engines_say)
        self._processes: dict[str, Process] = {}
        """Empty while the actor has not told of its process: it may never come up, and no server was started."""

    def load_plugins(self) -> None:
        self._wait(self._actor.load_plugins.remote(), "loading plugins")

    def begin_start(self) -> ray.ObjectRef:
        self._processes = {"rollout": self._wait(self._actor.process.remote(), "starting its process")}
        self._patience.processes |= self._processes
        return self._actor.start.remote()

    def finish_start(self, started: ray.ObjectRef) -> None:
        doing = "starting engines and data"
        self._wait(started, doing)
        self._patience.processes |= self._wait(self._actor.fleet.remote("receiver_processes"), doing)

    def num_rollout(self) -> int:
        return self._call("num_rollout")

    def begin_rollout(self, rollout_id: int) -> Callable[[], tuple[ray.ObjectRef, Report]]:
        """Begin to generate a rollout; a call of what is given waits for it."""
        batch, report = self._actor.generate.remote(rollout_id)
        return lambda: (batch, self._wait(report, f"generating rollout {rollout_id + 1}"))

    def begin_evaluation(self, rollout_id: int) -> Callable[[], tuple[dict[str, float], Report]]:
        answer = self._actor.evaluate.remote(rollout_id)
        return lambda: self._wait(answer, f"evaluating after rollout {rollout_id + 1}")

    def state(self, saving: int | None = None) -> dict | None:
        return self._call("state", saving)

    def restore(self, state: dict) -> None:
        self._call("restore", state)

    def destinations(self, trainer_slots: Sequence[Slot]) -> Destinations:
        return self._wait(self._actor.destinations.remote(trainer_slots), "destinations")

    def obituaries(self, *, timeout: float | None = None) -> list[str]:
        """Why servers are gone; empty if all live, or if nobody can tell (within `timeout` seconds, None: whenever)."""
        if not self._processes:
            return []
        answer = self._actor.fleet.remote("obituaries")
        done, _ = ray.wait([answer], timeout=timeout)
        try:
            return ray.get(done[0]) if done else []
        except ray.exceptions.RayError:
            return []

    def engines_say(self) -> list[str]:
        """A line for each engine: whether it answers."""
        answer = self._actor.fleet.remote("say")
        done, _ = ray.wait([answer], timeout=_SAY_SECONDS)
        try:
            return ray.get(done[0]) if done else [f"engines: the rollout actor does not answer within {_SAY_SECONDS:.0f} s"]
        except ray.exceptions.RayError as error:
            return [f"engines cannot be asked: {type(error).__name__}"]

    def recover(self) -> list[str]:
        """Servers that had died and run again; they need the trainer's weights."""
        return self._call("fleet", "recover")

    def stop(self) -> None:
        stopped = not self._processes or ray.wait([self._actor.stop.remote()], timeout=60)[0]
        ray.kill(self._actor)
        if not stopped:
            end(self._processes)  # a stopped one does not hear Ray

    # The engines' side of the weight protocol and of the lease.

    def pause(self) -> None:
        self._call("fleet", "pause")

    def flush(self) -> None:
        self._call("fleet", "flush")

    def begin(self, version: int) -> None:
        self._call("fleet", "begin", version)

    def load(self, version: int, folder: str) -> None:
        self._call("fleet", "load", version, folder)

    def end(self, version: int) -> None:
        self._call("fleet", "end", version)

    def versions(self) -> Mapping[str, str]:
        return self._call("fleet", "versions")

    def checksums(self, labels: Sequence[str]) -> Mapping[str, list[dict[str, str]]]:
        return self._call("fleet", "checksums", list(labels))

    def proceed(self) -> None:
        self._call("fleet", "proceed")

    def release_memory(self, labels: Sequence[str] | None = None, what: str = "everything") -> None:
        self._call("fleet", "release_memory", labels, what)

    def resume_memory(self, what: str, labels: Sequence[str] | None = None) -> None:
        self._call("fleet", "resume_memory", what, labels)

    def _call(self, method: str, *args):
        return self._wait(getattr(self._actor, method).remote(*args), " ".join(str(part) for part in (method, *args))[:80])

    def _wait(self, ref: ray.ObjectRef, doing: str):
        from slime.ray.calls import gather

        return gather({"rollout": ref}, doing=doing, processes=self._processes, patience=self._patience)["rollout"]
