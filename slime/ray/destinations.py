"""Where the trainer's weights go: the engines that take them, their GPUs, and which trainer rank holds the bucket of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ray.actor import ActorHandle

from slime.ray.fates import Process
from slime.weights.serving import Receiver

T = TypeVar("T")


@dataclass(frozen=True)
class Beside:
    """A `WeightReceiver`: its actor, and the process behind it."""

    actor: ActorHandle
    process: Process


@dataclass(frozen=True)
class EngineTarget:
    """Where the trainer sends weights for one engine."""

    name: str
    url: str
    token: str
    receiver: Receiver
    """Its GPUs, and which of them keep what."""
    starts: int = 1
    """How often it was started: a new process at the old address has joined no group."""
    receivers: tuple[Beside, ...] = ()
    """One beside each of its ranks; none where weights come by another way."""


@dataclass(frozen=True)
class Destinations:
    """Everything that takes the trainer's weights."""

    engines: tuple[EngineTarget, ...] = ()
    nodes: tuple[int, ...] = ()
    """Node of each GPU, those of the trainer's ranks first."""
    hosts: tuple[str, ...] = ("127.0.0.1",)
    """Address of each node."""


def homes_of(engines: Sequence[EngineTarget], world: int, num_gpus: int) -> list[int]:
    """Of each GPU the process that holds its bucket. Receivers count behind the trainer's ranks, as in `receivers_of`.

    A trainer rank holds that of its own GPU; beyond the trainer's GPUs, where an engine has no receivers, one stands for all
    such GPUs of the engine. Engines go to different ranks, so that they are fed at the same time.
    """
    homes = [*range(world), *[0] * (num_gpus - world)]
    with_receivers = [gpu for engine in engines if engine.receivers for gpu in engine.receiver.gpus]
    for number, gpu in enumerate(with_receivers):
        homes[gpu] = world + number
    engines = [engine for engine in engines if not engine.receivers]
    elsewhere = [engine.receiver for engine in engines if max(engine.receiver.gpus) >= world]
    for number, receiver in enumerate(elsewhere):
        for gpu in receiver.gpus:
            if gpu >= world:
                homes[gpu] = number * world // len(elsewhere)
    return homes


def receivers_of(engines: Sequence[EngineTarget]) -> dict[str, Beside]:
    """All receivers by name, engine by engine, rank by rank."""
    return by_name({engine.name: engine.receivers for engine in engines})


def by_name(receivers: Mapping[str, Sequence[T]]) -> dict[str, T]:
    """Receivers of each engine, or what belongs to each, by what the run calls them."""
    return {f"receiver {number} of engine {name}": one for name, those in receivers.items() for number, one in enumerate(those)}


def beside(target: EngineTarget, homes: Sequence[int]) -> tuple[int, ...]:
    """Processes that hold the buckets of an engine; the first one posts."""
    return tuple(dict.fromkeys(homes[gpu] for gpu in target.receiver.gpus))
