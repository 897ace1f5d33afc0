"""Prompts, engines, rewards and the router, in one actor; and its face towards the driver."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import ray

from slime.config import Config
from slime.ray.placement import Placement
from slime.ray.train_actor import EngineTarget

logger = logging.getLogger(__name__)


@ray.remote
class RolloutActor:
    """Everything about samples that happens outside the trainer."""

    def __init__(self, config: Config, placement: Placement, run_folder: Path, token: str):
        from slime.observability.log import setup_logging
        from slime.ray.engine_fleet import EngineFleet

        setup_logging("rollout")
        self._config, self._token = config, token
        self._fleet = EngineFleet(config, placement, run_folder, token)
        self._data_source = None

    def start(self) -> None:
        """Engines start first and load while prompts are read and plugins checked; then all is waited for."""
        from slime.rollout.plugins import load_plugins

        plugins = self._plugins = load_plugins(self._config)
        has_engines = not self._config.debug.debug_train_only
        if has_engines:
            self._fleet.start()
        try:
            self._data_source = plugins.data_source(self._config.args)
            if has_engines:
                self._fleet.wait_ready()
        except BaseException:
            self._fleet.stop()
            raise
        self._args = self._runtime_args()

    def _runtime_args(self):
        runtime = {"engine_token": self._token}
        if self._fleet.router is not None:
            runtime |= {"sglang_router_ip": self._fleet.router.host, "sglang_router_port": self._fleet.router.port}
        return self._config.args.with_runtime(**runtime)

    def num_rollout(self) -> int:
        data = self._config.data
        if data.num_rollout is not None:
            return data.num_rollout
        return data.num_epoch * (len(self._data_source) // data.rollout_batch_size)

    @ray.method(num_returns=2)
    def generate(self, rollout_id: int):
        """(RolloutBatch, metrics) of one rollout."""
        from slime.rollout.metrics import rollout_metrics
        from slime.rollout.to_batch import make_rollout_batch

        output = self._watched(lambda: self._plugins.rollout(self._args, rollout_id, self._data_source))
        batch = make_rollout_batch(output.samples, rollout_id=rollout_id, config=self._config)
        return batch, rollout_metrics(output.samples, output.metrics)

    def evaluate(self, rollout_id: int) -> tuple[dict[str, float], dict[str, float]]:
        """({dataset: mean reward}, metrics)."""
        from slime.rollout.metrics import evaluation_metrics

        output = self._watched(lambda: self._plugins.evaluate(self._args, rollout_id, self._data_source, evaluation=True))
        metrics = evaluation_metrics(output.data)
        scores = {name: metrics[f"eval/{name}"] for name in output.data}
        return scores, metrics | dict(output.metrics or {})

    def _watched(self, work):
        """Run `work`; if it fails because an engine is gone, say that instead of what the sockets said."""
        try:
            return work()
        except Exception as error:
            gone = self._fleet.obituaries() if self._fleet.engines else []
            if gone:
                raise RuntimeError(
                    "generation stopped because a server is gone.\n" + "\n".join(gone) + "\nThe last checkpoint is intact: run the same "
                    "command again to resume from it."
                ) from error
            raise

    def state(self) -> dict:
        return self._data_source.state_dict()

    def restore(self, state: dict) -> None:
        self._data_source.load_state_dict(state)

    def targets(self) -> list[EngineTarget]:
        return self._fleet.targets()

    def fleet(self, method: str, *args):
        """One of the fleet's calls (pause, flush, begin, ...)."""
        return getattr(self._fleet, method)(*args)

    def stop(self) -> None:
        self._fleet.stop()


class RolloutSide:
    """The driver's view of the rollout actor: plain blocking calls whose errors read as text."""

    def __init__(self, actor):
        self._actor = actor

    def begin_start(self) -> ray.ObjectRef:
        return self._actor.start.remote()

    def finish_start(self, started: ray.ObjectRef) -> None:
        self._wait(started, "starting engines and data")

    def num_rollout(self) -> int:
        return self._call("num_rollout")

    def generate(self, rollout_id: int) -> tuple[ray.ObjectRef, dict[str, float]]:
        batch, metrics = self._actor.generate.remote(rollout_id)
        return batch, self._wait(metrics, f"generating rollout {rollout_id}")

    def evaluate(self, rollout_id: int) -> tuple[dict[str, float], dict[str, float]]:
        return self._call("evaluate", rollout_id)

    def state(self) -> dict:
        return self._call("state")

    def restore(self, state: dict) -> None:
        self._call("restore", state)

    def targets(self) -> list[EngineTarget]:
        return self._call("targets")

    def stop(self) -> None:
        ray.wait([self._actor.stop.remote()], timeout=60)
        ray.kill(self._actor)

    # The engines' side of the weight protocol and of the lease.

    def pause(self) -> None:
        self._call("fleet", "pause")

    def flush(self) -> None:
        self._call("fleet", "flush")

    def begin(self, version: int) -> None:
        self._call("fleet", "begin", version)

    def end(self, version: int) -> None:
        self._call("fleet", "end", version)

    def versions(self) -> Mapping[str, str]:
        return self._call("fleet", "versions")

    def proceed(self) -> None:
        self._call("fleet", "proceed")

    def release_memory(self) -> None:
        self._call("fleet", "release_memory")

    def resume_memory(self, what: str) -> None:
        self._call("fleet", "resume_memory", what)

    def _call(self, method: str, *args):
        return self._wait(getattr(self._actor, method).remote(*args), " ".join(str(part) for part in (method, *args))[:80])

    @staticmethod
    def _wait(ref: ray.ObjectRef, doing: str):
        from slime.ray.calls import gather

        return gather({"rollout": ref}, doing=doing)["rollout"]
