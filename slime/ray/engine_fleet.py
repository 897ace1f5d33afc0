"""All engines of a run and the router of each model: started, addressed together, watched.

In:  the config (which engines of which model, or the addresses of somebody else's), the placement's slots, the run's token.
Out: addresses for the rollout (`routers`) and for the weights (`destinations`); the engines' side of the weight protocol and of
     the lease; who has died (`obituaries`), and servers started again (`recover`). Lives in the rollout actor.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import ray

from slime.config import Config
from slime.engine.client import UPDATE_SECONDS, EngineClient, EngineError
from slime.engine.plan import plan_engines, slots_of
from slime.engine.ports import EnginePorts
from slime.engine.process import EngineDied
from slime.engine.router import JoinedRouter, RouterProcess, Worker
from slime.engine.spec import EngineSpec, NodePlacement
from slime.ray import engine_nodes
from slime.ray.calls import gather
from slime.ray.destinations import Beside, Destinations, EngineTarget, by_name
from slime.ray.engine_actor import EngineActor, EngineAddress
from slime.ray.engine_nodes import Death, EngineNode
from slime.ray.external_engines import absent, ask_all, node_of
from slime.ray.fates import Process, end
from slime.ray.first_requests import first_requests
from slime.ray.placement import ALL_DEVICES, ENGINE_SHARE, Placement, Slot, listens
from slime.ray.weight_receivers import start_receiver, with_processes
from slime.weights.follow import wait_for_copy
from slime.weights.serving import Receiver

logger = logging.getLogger(__name__)

_SAY_SECONDS = 5.0

# A new actor and its server's process; not until it serves.
_START_SECONDS = 300.0


@dataclass(frozen=True)
class Engine:
    spec: EngineSpec
    url: str
    bootstrap_port: int | None
    nodes: tuple[EngineNode, ...]
    """Node 0, which answers HTTP, first; none of an engine that somebody else runs."""
    starts: int = 1
    compiles: bool = False
    """Kernels are compiled when they are first called there."""

    @property
    def label(self) -> str:
        return self.spec.label

    @property
    def is_external(self) -> bool:
        return not self.nodes


class EngineFleet:
    """Implements the engines' side of the weight protocol and of the lease: each call goes to all engines at once."""

    def __init__(self, config: Config, placement: Placement, log_folder: Path, token: str):
        self._config, self._placement, self._log_folder, self._token = config, placement, log_folder, token
        self.engines: list[Engine] = []
        self._known_dead: frozenset[str] = frozenset()
        self._silent: frozenset[str] = frozenset()
        """Nodes that did not answer for a minute when they were asked last."""
        self._told_dead: dict[str, Death] = {}
        """By the last `obituaries`."""
        self._receivers: dict[str, tuple[Beside, ...]] = {}
        """Engine -> its `WeightReceiver`s, rank by rank."""
        self.routers: dict[str, RouterProcess | JoinedRouter] = {}
        """By the name of the model, the trained one first."""

    @property
    def router(self) -> RouterProcess | JoinedRouter | None:
        """In front of the engines of the trained model."""
        return next(iter(self.routers.values()), None)

    def start(self) -> None:
        """Start every engine process, node 0 of each first: the other nodes need the address where its ranks meet."""
        specs = plan_engines(self._config)
        heads = [self._node(spec, 0) for spec in specs]
        for spec, (head, address) in zip(specs, self._started(heads), strict=True):
            others = [self._node(spec, number, address.dist_init_addr) for number in range(1, spec.num_nodes)]
            # Before the others start: whatever fails from here on, `stop` knows of them.
            self.engines.append(Engine(spec, address.url, address.bootstrap_port, (head, *others), compiles=address.compiles))
            nodes = (head, *(node for node, _ in self._started(others)))
            self.engines[-1] = replace(self.engines[-1], nodes=nodes)
        if (addresses := self._config.engine.rollout_external_engine_addrs) is not None:
            self._join_external(addresses)

    def _join_external(self, addresses: Sequence[str]) -> None:
        config = self._config
        told = {
            "model": config.engine.groups[0].name,
            "model_path": config.checkpoint.hf_checkpoint,
            "asked": config.engine.sglang,
            "broadcasts": config.engine.update_weight_transport == "nccl",
        }
        for one in ask_all(addresses, self._token, **told):
            self.engines.append(Engine(one.spec, one.url, one.bootstrap_port, ()))
            sizes = f"TP {one.spec.tp_size} x PP {one.spec.pp_size}, EP {one.spec.ep_size}"
            logger.info("engine %s: external, at %s, sglang %s, %s", one.spec.label, one.url, one.version, sizes)

    def wait_ready(self) -> None:
        heads = [engine.nodes[0] for engine in self.engines if not engine.is_external]
        gather({head.name: head.actor.wait_ready.remote() for head in heads}, doing="coming up")
        models = enumerate(self._config.engine.groups)
        self.routers = {model.name: self._make_router(model.name, number) for number, model in models}
        for router in self.routers.values():
            router.start()
        for router in self.routers.values():
            router.wait_ready()
        first_requests(self.engines, self.routers, self._token)
        self._start_receivers()

    def _start_receivers(self) -> None:
        """A process beside each rank of an engine on GPUs of its own, where weights go that way."""
        if self._config.engine.update_weight_transport != "receivers":
            return
        shared, actors = set(self._placement.trainer_slots), {}
        for engine in self.updated():
            first, count = engine.spec.gpu_offset, engine.spec.num_gpus
            slots = self._placement.engine_slots[first : first + count]
            if not engine.is_external and not shared & set(slots):
                actors[engine.label] = tuple(
                    start_receiver(self._placement, slot, f"receiver {engine.label} {number}", self._log_folder)
                    for number, slot in enumerate(slots)
                )
        self._receivers = with_processes(actors)

    def receiver_processes(self) -> dict[str, Process]:
        """By name: who takes part in a weight update besides trainer and engines, and may hold it up."""
        return {name: receiver.process for name, receiver in by_name(self._receivers).items()}

    def _make_router(self, model: str, number: int) -> RouterProcess | JoinedRouter:
        """number: 0 for the model whose address the flags give; a router of another takes a free port."""
        engine = self._config.engine
        served = [one for one in self.engines if one.spec.model == model]
        workers = [Worker(one.url, one.spec.role, one.bootstrap_port) for one in served]
        if number == 0 and engine.sglang_router_ip is not None:
            host, port = engine.sglang_router_ip, engine.sglang_router_port
            return JoinedRouter(workers, host=host, port=port, token=self._token, report=logger.info)
        name = "router" if number == 0 else f"router of {model}"
        return RouterProcess(
            workers,
            token=self._token,
            log_path=self._log_folder / f"{name.replace(' of ', '-')}.log",
            name=name,
            host=listens(self._placement, ray.util.get_node_ip_address())[0],
            port=engine.sglang_router_port if number == 0 else None,
            options={"request_timeout_secs": engine.sglang_router_request_timeout_secs, **engine.router},
            report=logger.info,
        )

    @staticmethod
    def _started(nodes: Sequence[EngineNode], *, timeout: float | None = None) -> list[tuple[EngineNode, EngineAddress]]:
        """The nodes with what is known of them once their processes run."""
        addresses = gather({node.name: node.actor.start.remote() for node in nodes}, doing="starting", timeout=timeout)
        found = ((node, addresses[node.name]) for node in nodes)
        return [(replace(node, ports=address.ports, process=address.actor), address) for node, address in found]

    def _node(
        self, spec: EngineSpec, number: int, dist_init_addr: str | None = None, ports: EnginePorts | None = None
    ) -> EngineNode:
        slot = self._placement.engine_slots[spec.gpu_offset + number * spec.gpus_per_node]
        host, peers = listens(self._placement, slot.node_ip)
        log_path = self._log_folder / f"{spec.label}-{number}.log"
        actor = EngineActor.options(
            num_gpus=ENGINE_SHARE,
            num_cpus=ENGINE_SHARE,
            scheduling_strategy=self._placement.strategy(slot),
            runtime_env={"env_vars": ALL_DEVICES},
        ).remote(
            spec,
            NodePlacement(number, host, slot.device_index, dist_init_addr, peers),
            self._token,
            log_path,
            kernel_cache=self._config.cluster.kernel_cache,
            ports=ports,
        )
        name = f"engine {spec.label}" if spec.num_nodes == 1 else f"node {number} of engine {spec.label}"
        return EngineNode(name, slot.node_ip, actor, log_path, ports)

    # ------------------------------------------------------------------ weights

    def updated(self) -> list[Engine]:
        """The engines that serve the model being trained."""
        return [engine for engine in self.engines if engine.spec.update_weights]

    def destinations(self, trainer_slots: Sequence[Slot]) -> Destinations:
        """GPUs count through the trainer's ranks, then through the slots of engines elsewhere.

        trainer_slots: where its ranks are now; some may have moved to a spare node.
        """
        first = slots_of(self._config).first_rollout_gpu
        engines = tuple(
            EngineTarget(
                engine.label,
                engine.url,
                self._token,
                Receiver.of(engine.spec, first_gpu=first),
                engine.starts,
                self._receivers.get(engine.label, ()),
            )
            for engine in self.updated()
        )
        slots = [*trainer_slots, *(slot for slot in self._placement.engine_slots if slot not in set(trainer_slots))]
        at = [slot.node_ip for slot in slots]
        for engine in self.engines:
            if engine.is_external:
                at += [node_of(engine.url, ray.util.get_node_ip_address())] * engine.spec.num_gpus
        number = {address: node for node, address in enumerate(dict.fromkeys(at))}
        return Destinations(engines, tuple(number[address] for address in at), tuple(number))

    def pause(self) -> None:
        mode = self._config.loop.pause_generation_mode
        self._each(self.updated(), lambda client: client.pause_generation(mode), doing="pausing")

    def flush(self) -> None:
        if self._config.loop.pause_generation_mode == "in_place":
            return  # requests keep their cache
        self._each(self.updated(), lambda client: client.flush_cache(), doing="flushing its cache")

    def begin(self, version: int) -> None:
        self._each(
            self.updated(),
            lambda client: client.begin_weight_update(version),
            doing=f"opening the update to weights v{version}",
        )

    def load(self, version: int, folder: str) -> None:
        """A published version, by every engine: the folder itself, or, of differences, the nodes' own copies."""
        options, nodes = self._config.engine, self._nodes(self.updated())
        places = {engine.label: folder for engine in self.updated()}
        if options.update_weight_mode == "delta":
            local, origin = options.update_weight_local_checkpoint_dir, self._config.checkpoint.hf_checkpoint
            root = options.update_weight_disk_dir
            calls = {name: node.actor.follow.remote(local, origin, root, version) for name, node in nodes.items()}
            gather(calls, doing=f"following weights v{version}", timeout=UPDATE_SECONDS)
            for engine in self.updated():
                copy = wait_for_copy(root, engine.url, version, UPDATE_SECONDS) if engine.is_external else local
                places[engine.label] = copy
        elif options.check_weight_update_equal:
            calls = {name: node.actor.spoilt.remote(folder) for name, node in nodes.items()}
            for name, wrong in gather(calls, doing=f"checking {folder}", timeout=UPDATE_SECONDS).items():
                if wrong:
                    raise RuntimeError(
                        f"{name} reads other bytes than the trainer wrote to {folder}: {len(wrong)} tensors, "
                        f"{', '.join(wrong[:5])}; the engines stay paused. Look at the disk, and start the run again"
                    )
        for place in dict.fromkeys(places.values()):
            there = [engine for engine in self.updated() if places[engine.label] == place]
            load = partial(EngineClient.update_weights_from_disk, folder=place)
            self._each(there, load, doing=f"loading weights v{version} from {place}")

    def end(self, version: int) -> None:
        self._each(
            self.updated(), lambda client: client.end_weight_update(version), doing=f"closing the update to weights v{version}"
        )

    def versions(self) -> Mapping[str, str]:
        return self._each(self.updated(), lambda client: client.weight_version(), doing="telling its weights' version")

    def checksums(self, labels: Sequence[str]) -> Mapping[str, list[dict[str, str]]]:
        """Of every parameter that these engines hold, per rank."""
        asked = [engine for engine in self.updated() if engine.label in labels]
        return self._each(asked, lambda client: client.weights_checksums(), doing="making checksums of its weights")

    def proceed(self) -> None:
        self._each(self.updated(), lambda client: client.continue_generation(), doing="continuing")

    # ------------------------------------------------------------------ memory

    def release_memory(self, labels: Sequence[str] | None = None, what: str = "everything") -> None:
        """labels: of the engines that are to do it; None: all that share their devices. what: or "weights" alone, where nothing
        else is held."""
        sharing, tags = self._sharing(labels), {"everything": None, "weights": ["weights"]}[what]
        self._each(sharing, lambda client: client.flush_cache(), doing="flushing its cache")
        self._each(sharing, lambda client: client.release_memory(tags), doing="giving its memory back")

    def resume_memory(self, what: str, labels: Sequence[str] | None = None) -> None:
        tags = {"weights": ["weights"], "kv_cache": ["kv_cache", "cuda_graph"]}[what]
        self._each(self._sharing(labels), lambda client: client.resume_memory(tags), doing=f"taking memory for {what} again")

    def _sharing(self, labels: Sequence[str] | None) -> list[Engine]:
        return [e for e in self.engines if e.spec.needs_offload and (labels is None or e.label in labels)]

    # ------------------------------------------------------------------ health

    def obituaries(self) -> list[str]:
        """Why engines or the router are gone; empty while all live."""
        self._told_dead = self._deaths()
        return [death.why for death in self._told_dead.values()] + list(self._dead_routers().values())

    def _nodes(self, engines: Sequence[Engine] | None = None) -> dict[str, EngineNode]:
        return {node.name: node for engine in (self.engines if engines is None else engines) for node in engine.nodes}

    def _external(self) -> list[Engine]:
        return [engine for engine in self.engines if engine.is_external]

    def _deaths(self, but: Container[str] = ()) -> dict[str, Death]:
        """By the name of the node; of an external engine, its address. but: who is not asked."""
        found = engine_nodes.deaths([node for name, node in self._nodes().items() if name not in but], silent=self._silent)
        self._silent = frozenset(name for name, death in found.items() if death.hangs)
        for engine in self._external():
            if engine.url not in but and (why := absent(engine.url, self._token)):
                found[engine.url] = Death(f"external engine {engine.label} at {engine.url} does not answer: {why}")
        return found

    def _without(self, dead: Mapping[str, Death]) -> tuple[list[Engine], list[Engine]]:
        """(engines that are whole, engines that lack a node)."""
        broken = [e for e in self.engines if e.url in dead or any(node.name in dead for node in e.nodes)]
        return [engine for engine in self.engines if engine not in broken], broken

    def _dead_routers(self) -> dict[str, str]:
        """Model -> why its router is gone; empty while all live."""
        found = {}
        for model, router in self.routers.items():
            try:
                router.check()
            except EngineDied as died:
                found[model] = str(died)
        return found

    def end_hopeless_requests(self) -> None:
        """Stop a model's router when nobody will end some requests: its last engine of a kind has died, whose partner would
        keep each for minutes, or one is out of reach, whose connections do not break."""
        dead = self._deaths()
        whole, broken = self._without(dead)
        self._known_dead = frozenset(engine.label for engine in broken)
        for model, router in self.routers.items():
            alive = {engine.spec.role for engine in whole if engine.spec.model == model}
            ours = [engine for engine in broken if engine.spec.model == model]
            lost = [engine.label for engine in ours if engine.spec.role not in alive]
            hanging = [node.name for engine in ours for node in engine.nodes if node.name in dead and dead[node.name].hangs]
            if (lost or hanging) and router.is_alive():
                why = (
                    f"{', '.join(lost)} died and nobody can take its place" if lost else f"{', '.join(hanging)} is out of reach"
                )
                logger.error("%s: ending all requests", why)
                router.stop()

    def missed_checks(self, timeout: float) -> dict[str, str | None]:
        """Asks every engine that lived at the last look to generate a token, and our routers for their engines: name -> why
        it did not answer within `timeout` seconds, None where it did."""

        async def check(client: EngineClient) -> str | None:
            try:
                await client.health(timeout=timeout)
            except EngineError as error:
                return str(error)
            return None

        asked = [engine for engine in self.engines if engine.label not in self._known_dead]
        found = {f"engine {label}": why for label, why in self._each(asked, check, doing="answering").items()}
        alive = {name: router for name, router in self._own_routers().items() if router.is_alive()}
        return found | {name: router.missed_check(timeout) for name, router in alive.items()}

    def say(self) -> list[str]:
        """For a report of a wait: a line for each engine. While the trainer trains engines are paused, and do not answer."""
        missed = self.missed_checks(_SAY_SECONDS)
        answers = [f"{name}: {'answers' if why is None else f'does not answer ({why})'}" for name, why in missed.items()]
        engines = engine_nodes.unwell(list(self._nodes().values()), _SAY_SECONDS)
        return [*answers, *engines, *self._dead_routers().values()]

    def _own_routers(self) -> dict[str, RouterProcess]:
        """By name; those that somebody else runs are not ours to look after."""
        found = {router.name: router for router in self.routers.values()}
        return {name: router for name, router in found.items() if isinstance(router, RouterProcess)}

    def end_server(self, name: str) -> None:
        """Kill one that `missed_checks` names: a router, or an engine on all its nodes; of one not ours, end the requests."""
        if name in self._own_routers():
            self._own_routers()[name].stop()
        for engine in self.engines:
            if name == f"engine {engine.label}":
                engine_nodes.stop(list(engine.nodes))
                if engine.is_external:
                    self.routers[engine.spec.model].stop()

    def recover(self) -> list[str]:
        """Start what died again, at the address where it was, and wait until it serves. What was started; empty if all live.
        Whom `obituaries` called dead just now is not asked again, for others have acted on it; all others are.

        A restarted engine holds the checkpoint's weights. Requests that wait for a dead partner are aborted on the others.
        Raises RuntimeError where the machine of an engine is gone.
        """
        dead, routers_died = self._told_dead | self._deaths(but=self._told_dead), self._dead_routers()
        self._told_dead = {}
        for text in (*(death.why for death in dead.values()), *routers_died.values()):
            logger.error("%s", text)
        if not dead and not routers_died:
            return []
        engine_nodes.refuse_lost_nodes(self._nodes(), dead)
        if gone := [engine for engine in self._external() if engine.url in dead]:
            raise RuntimeError(
                f"external engine {', '.join(engine.url for engine in gone)} is gone, and it is not this run's to start: "
                "start it again at that address and run the same command again; it resumes from the last checkpoint"
            )
        whole, broken = self._without(dead)
        self._abort_on(whole)
        engine_nodes.stop(list(self._nodes(broken).values()), silent={name for name, death in dead.items() if death.hangs})
        for engine in broken:
            self._start_again(engine, {name for name, death in dead.items() if death.actor_is_lost})
        labels = [engine.label for engine in broken]
        heads = [engine.nodes[0] for engine in self.engines if engine.label in labels]
        gather({head.name: head.actor.wait_ready.remote() for head in heads}, doing="coming up again")
        for model, router in self.routers.items():
            if model in routers_died:
                router.stop()
            if model in routers_died or isinstance(
                router, JoinedRouter
            ):  # one that runs on may have lost its workers meanwhile
                router.start()
                router.wait_ready()
        self._known_dead = self._silent = frozenset()
        return [*labels, *(self.routers[model].name for model in routers_died)]

    def _abort_on(self, engines: list[Engine]) -> None:
        async def abort(client: EngineClient) -> None:
            try:
                await client.abort_all()
            except EngineError as error:  # it dies too: the next look finds it
                logger.warning("abort: %s", error)

        self._each(engines, abort, doing="ending its requests")

    def _start_again(self, engine: Engine, lost: set[str]) -> None:
        """lost: names of nodes whose actor is gone; each gets a new one at the old address."""
        nodes, meeting = list(engine.nodes), None
        for number, node in enumerate(nodes):  # node 0 first: the ranks of the others look for it
            if node.name in lost:
                ray.kill(node.actor)  # one that hangs still holds its share of the device
                node = self._node(engine.spec, number, meeting, node.ports)
            ((nodes[number], address),) = self._started([node], timeout=_START_SECONDS)
            meeting = address.dist_init_addr
        self.engines[self.engines.index(engine)] = replace(engine, nodes=tuple(nodes), starts=engine.starts + 1)

    def stop(self) -> None:
        for router in self.routers.values():
            router.stop()
        self._let_go()
        nodes = list(self._nodes().values())
        engine_nodes.stop(nodes)
        for actor in (*(node.actor for node in nodes), *(one.actor for one in by_name(self._receivers).values())):
            ray.kill(actor)
        end(self.receiver_processes())  # a stopped one does not hear Ray
        self.engines.clear()

    def _let_go(self) -> None:
        """An external engine that was paused for new weights goes on serving what it has."""
        for engine in self._external():
            try:
                self._each([engine], lambda client: client.continue_generation(), doing="continuing")
            except EngineError as error:
                logger.warning("%s; it may still be paused", error)

    def _each(
        self, engines: list[Engine], call: Callable[[EngineClient], Awaitable[object]], *, doing: str
    ) -> dict[str, object]:
        """The call's answer of each engine, all asked at once. If one fails its error is raised, when all are done.

        doing: what the call is for, for that error.
        """

        async def one(engine: Engine) -> object:
            # A client belongs to one event loop, and these calls are few: a fresh one each time.
            client, started = EngineClient(engine.url, self._token), time.monotonic()
            try:
                return await call(client)
            except EngineError as error:
                where = f"engine {engine.label}, {doing}, after {time.monotonic() - started:.1f} s"
                raise type(error)(f"{where}: {error}", error.status, error.retry_after) from None
            finally:
                await client.close()

        async def everyone() -> list[object]:
            return await asyncio.gather(*(one(engine) for engine in engines), return_exceptions=True)

        answers = asyncio.run(everyone())
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return dict(zip((engine.label for engine in engines), answers, strict=True))
