"""All engines of a run and their router: started, addressed together, watched."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from slime.config import Config
from slime.engine.client import EngineClient, EngineError
from slime.engine.plan import plan_engines
from slime.engine.process import EngineDied
from slime.engine.router import RouterProcess, Worker
from slime.engine.spec import EngineSpec, NodePlacement
from slime.ray.calls import gather
from slime.ray.engine_actor import EngineActor
from slime.ray.placement import ALL_DEVICES, ENGINE_SHARE, Placement
from slime.ray.train_actor import EngineTarget

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    spec: EngineSpec
    url: str
    bootstrap_port: int | None
    actors: tuple
    """One per node of the engine, node 0 first."""

    @property
    def label(self) -> str:
        return self.spec.label


class EngineFleet:
    """Implements the engines' side of the weight protocol and of the lease: each call goes to all engines at once."""

    def __init__(self, config: Config, placement: Placement, log_folder: Path, token: str):
        self._config, self._placement, self._log_folder, self._token = config, placement, log_folder, token
        self.engines: list[Engine] = []
        self.router: RouterProcess | None = None

    def start(self) -> None:
        """Start every engine process, node 0 of each first: the other nodes need the address where its ranks meet."""
        specs = plan_engines(self._config)
        models = sorted({spec.model for spec in specs})
        if len(models) > 1:
            raise ValueError(
                f"--sglang-config serves {len(models)} models ({', '.join(models)}); this version runs one model and its router"
            )
        heads = {spec.label: self._actor(spec, 0) for spec in specs}
        addresses = gather({f"engine {label}": head.start.remote() for label, head in heads.items()}, doing="starting")
        for spec in specs:
            address = addresses[f"engine {spec.label}"]
            others = [self._actor(spec, node, address.dist_init_addr) for node in range(1, spec.num_nodes)]
            self.engines.append(Engine(spec, address.url, address.bootstrap_port, (heads[spec.label], *others)))
            gather(
                {f"node {n} of engine {spec.label}": o.start.remote() for n, o in enumerate(others, start=1)}, doing="starting"
            )

    def wait_ready(self) -> None:
        gather({f"engine {engine.label}": engine.actors[0].wait_ready.remote() for engine in self.engines}, doing="coming up")
        engine = self._config.engine
        self.router = RouterProcess(
            [Worker(served.url, served.spec.role, served.bootstrap_port) for served in self.updated()],
            token=self._token,
            log_path=self._log_folder / "router.log",
            host=self._host(),
            port=engine.sglang_router_port,
            options={"request_timeout_secs": engine.sglang_router_request_timeout_secs, **engine.router},
            report=logger.info,
        )
        self.router.start()
        self.router.wait_ready()

    def _host(self) -> str:
        """Where servers of one node listen: on loopback while nothing of them needs to be reached from outside."""
        nodes = {slot.node_ip for slot in self._placement.engine_slots}
        return "127.0.0.1" if len(nodes) == 1 else ray.util.get_node_ip_address()

    def _actor(self, spec: EngineSpec, node: int, dist_init_addr: str | None = None):
        slot = self._placement.engine_slots[spec.gpu_offset + node * spec.gpus_per_node]
        host = self._host() if self._host() == "127.0.0.1" else slot.node_ip
        return EngineActor.options(
            num_gpus=ENGINE_SHARE,
            num_cpus=ENGINE_SHARE,
            scheduling_strategy=self._placement.strategy(slot),
            runtime_env={"env_vars": ALL_DEVICES},
        ).remote(spec, NodePlacement(node, host, slot.device_index, dist_init_addr), self._token, self._log_folder)

    # ------------------------------------------------------------------ weights

    def updated(self) -> list[Engine]:
        """The engines that serve the model being trained."""
        return [engine for engine in self.engines if engine.spec.update_weights]

    def targets(self) -> list[EngineTarget]:
        trainer_slots = {slot: rank for rank, slot in enumerate(self._placement.trainer_slots)}
        targets = []
        for engine in self.updated():
            spec = engine.spec
            slots = self._placement.engine_slots[spec.gpu_offset : spec.gpu_offset + spec.num_gpus]
            sharing = tuple(trainer_slots[slot] for slot in slots) if all(slot in trainer_slots for slot in slots) else ()
            targets.append(EngineTarget(engine.label, engine.url, self._token, sharing, spec.tp_size * spec.pp_size))
        return targets

    def pause(self) -> None:
        self._each(self.updated(), lambda client: client.pause_generation())

    def flush(self) -> None:
        self._each(self.updated(), lambda client: client.flush_cache())

    def begin(self, version: int) -> None:
        self._each(self.updated(), lambda client: client.begin_weight_update(version))

    def end(self, version: int) -> None:
        self._each(self.updated(), lambda client: client.end_weight_update(version))

    def versions(self) -> Mapping[str, str]:
        return self._each(self.updated(), lambda client: client.weight_version())

    def proceed(self) -> None:
        self._each(self.updated(), lambda client: client.continue_generation())

    # ------------------------------------------------------------------ memory

    def release_memory(self, labels: Sequence[str] | None = None) -> None:
        """labels: of the engines that are to do it; None: all that share their devices."""
        sharing = self._sharing(labels)
        self._each(sharing, lambda client: client.flush_cache())
        self._each(sharing, lambda client: client.release_memory())

    def resume_memory(self, what: str, labels: Sequence[str] | None = None) -> None:
        tags = {"weights": ["weights"], "kv_cache": ["kv_cache", "cuda_graph"]}[what]
        self._each(self._sharing(labels), lambda client: client.resume_memory(tags))

    def _sharing(self, labels: Sequence[str] | None) -> list[Engine]:
        return [e for e in self.engines if e.spec.needs_offload and (labels is None or e.label in labels)]

    # ------------------------------------------------------------------ health

    def obituaries(self) -> list[str]:
        """Why engines or the router are gone; empty while all live."""
        return [text for texts in (*self._dead_engines().values(), self._dead_router()) for text in texts]

    def _dead_router(self) -> list[str]:
        """Why the router is gone; empty while it lives."""
        if self.router is not None:
            try:
                self.router.check()
            except EngineDied as died:
                return [str(died)]
        return []

    def _dead_engines(self) -> dict[str, list[str]]:
        """Label -> why its processes are gone, of the engines that lack one."""
        nodes = {(e.label, n): node for e in self.engines for n, node in enumerate(e.actors)}
        asked = {f"node {n} of engine {label}": node.obituary.remote() for (label, n), node in nodes.items()}
        found: dict[str, list[str]] = {}
        for (label, _), text in zip(nodes, gather(asked, doing="looking after engines").values(), strict=True):
            if text:
                found.setdefault(label, []).append(text)
        return found

    def end_hopeless_requests(self) -> None:
        """Stop the router when the last engine of a kind has died: its partner would keep every request waiting for minutes."""
        dead = self._dead_engines()
        alive = {(engine.spec.model, engine.spec.role) for engine in self.engines if engine.label not in dead}
        lost = [e.label for e in self.engines if e.label in dead and (e.spec.model, e.spec.role) not in alive]
        if lost and self.router is not None and self.router.is_alive():
            logger.error("%s died and nobody can take its place: ending all requests", ", ".join(lost))
            self.router.stop()

    def missed_checks(self, timeout: float) -> dict[str, str | None]:
        """Asks every engine to generate a token: label -> why it did not within `timeout` seconds, None where it did."""

        async def check(client: EngineClient) -> str | None:
            try:
                await client.health(timeout=timeout)
            except EngineError as error:
                return str(error)
            return None

        return self._each(self.engines, check)

    def end_engine(self, label: str) -> None:
        """Kill one engine, on all its nodes."""
        (engine,) = (engine for engine in self.engines if engine.label == label)
        self._stop_nodes([engine])

    def recover(self) -> list[str]:
        """Start what died again, at the address where it was, and wait until it serves. What was started; empty if all live.

        A restarted engine holds the checkpoint's weights. Requests that wait for a dead partner are aborted on the others.
        """
        dead, router_died = self._dead_engines(), self._dead_router()
        for text in (*(text for texts in dead.values() for text in texts), *router_died):
            logger.error("%s", text)
        if not dead and not router_died:
            return []
        self._each([engine for engine in self.engines if engine.label not in dead], lambda client: client.abort_all())
        again = [engine for engine in self.engines if engine.label in dead]
        self._stop_nodes(again)
        for engine in again:
            for number, node in enumerate(engine.actors):  # node 0 first: the ranks of the others look for it
                gather({f"node {number} of engine {engine.label}": node.start.remote()}, doing="starting again")
        gather({f"engine {e.label}": e.actors[0].wait_ready.remote() for e in again}, doing="coming up again")
        if router_died:
            self.router.stop()
            self.router.start()
            self.router.wait_ready()
        return [*dead, *(["router"] if router_died else [])]

    @staticmethod
    def _stop_nodes(engines: list[Engine]) -> None:
        nodes = {f"node {n} of engine {e.label}": node for e in engines for n, node in enumerate(e.actors)}
        gather({name: node.stop.remote() for name, node in nodes.items()}, doing="stopping")

    def stop(self) -> None:
        if self.router is not None:
            self.router.stop()
        stops = [node.stop.remote() for engine in self.engines for node in engine.actors]
        ray.wait(stops, num_returns=len(stops), timeout=30) if stops else None
        for engine in self.engines:
            for node in engine.actors:
                ray.kill(node)
        self.engines.clear()

    def _each(self, engines: list[Engine], call: Callable[[EngineClient], Awaitable[object]]) -> dict[str, object]:
        """The call's answer of each engine, all asked at once. If one fails its error is raised, when all are done."""

        async def one(engine: Engine) -> object:
            # A client belongs to one event loop, and these calls are few: a fresh one each time.
            client = EngineClient(engine.url, self._token)
            try:
                return await call(client)
            finally:
                await client.close()

        async def everyone() -> list[object]:
            return await asyncio.gather(*(one(engine) for engine in engines), return_exceptions=True)

        answers = asyncio.run(everyone())
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return dict(zip((engine.label for engine in engines), answers, strict=True))
