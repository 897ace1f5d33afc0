"""The actors of engines, one per node of each: which of them live, and what became of the others."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from slime.engine.last_words import last_words
from slime.engine.ports import EnginePorts
from slime.ray.fates import Process, death, end, fates
from slime.ray.machines import lost_nodes

logger = logging.getLogger(__name__)

# An actor that has not said in this time whether its server lives does not look after it either.
_ANSWER_SECONDS = 60.0
# Most answer in milliseconds. One that has not is told if it is stopped; who was silent before is not waited for again.
_SOON_SECONDS = 5.0
_STOP_SECONDS = 30.0
# After which an actor that Ray called unavailable, not dead, is asked once more.
_ASK_AGAIN_SECONDS = 3.0


@dataclass(frozen=True)
class EngineNode:
    """One node's part of an engine."""

    name: str
    """ "node 0 of engine default-decode-1" """
    node_ip: str
    actor: Any
    log_path: Path
    ports: EnginePorts | None = None
    """Known once it was started; a new actor in its place takes them, so that nobody needs to be told."""
    process: Process | None = None


@dataclass(frozen=True)
class Death:
    why: str
    actor_is_lost: bool = False
    """Not the server alone: the actor that started it cannot be asked, so a new one has to take its place."""
    hangs: bool = False
    """Nobody ends its connections: its node is gone, or nothing is known. Requests to it would wait for ever."""


def deaths(nodes: Sequence[EngineNode], *, silent: Set[str] = frozenset()) -> dict[str, Death]:
    """Name -> what became of it, of the nodes whose server is gone or cannot be asked about. Takes a minute at most.

    silent: names of those that were waited for in vain already.
    """
    found, unavailable = _ask(nodes, silent)
    if unavailable:
        time.sleep(_ASK_AGAIN_SECONDS)
        again, still = _ask([node for node in nodes if node.name in unavailable], silent)
        found |= again | still
    return {node.name: found[node.name] for node in nodes if node.name in found}


def _ask(nodes: Sequence[EngineNode], silent: Set[str]) -> tuple[dict[str, Death], dict[str, Death]]:
    """(those that are gone, those of which Ray says that they may come back)."""
    asked, deadline = {node.actor.obituary.remote(): node for node in nodes}, time.monotonic() + _ANSWER_SECONDS
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=_SOON_SECONDS) if asked else ([], [])
    if new := [ref for ref in late if asked[ref].name not in silent]:
        _tell_stopped([asked[ref] for ref in new])
        done += ray.wait(new, num_returns=len(new), timeout=max(0.0, deadline - time.monotonic()))[0]
    found: dict[str, Death] = {}
    unavailable: dict[str, Death] = {}
    for ref, node in asked.items():
        if ref not in done:
            found[node.name] = _lost(node, f"has not answered for {_ANSWER_SECONDS:.0f} s", hangs=True)
            continue
        try:
            why = ray.get(ref)
        except ray.exceptions.ActorUnavailableError as error:
            unavailable[node.name] = _lost(node, death(error, node.process), hangs=True)
        except ray.exceptions.RayError as error:
            found[node.name] = _lost(node, death(error, node.process), hangs=bool(lost_nodes({node.node_ip})))
        else:
            if why:
                found[node.name] = Death(why)
    return found, unavailable


def _tell_stopped(nodes: Sequence[EngineNode]) -> None:
    for line in _unwell_actors(nodes).values():
        logger.warning("%s: after %.0f s without an answer it counts as dead", line, _ANSWER_SECONDS)


def _unwell_actors(nodes: Sequence[EngineNode]) -> dict[str, str]:
    """Name -> a line, of those whose actor is gone or stopped."""
    known = {node.name: node.process for node in nodes if node.process is not None}
    return {name: f"{name}: its actor ({known[name]}) {fate}" for name, fate in fates(known).items() if fate is not None}


def _lost(node: EngineNode, what: str, *, hangs: bool) -> Death:
    return Death(f"{node.name} cannot be asked: its actor on {node.node_ip} {what}{last_words(node.log_path)}", True, hangs)


def unwell(nodes: Sequence[EngineNode], timeout: float) -> list[str]:
    """For a report, so soon: a line for each actor or server that is gone or stopped, or silent for `timeout` seconds."""
    lines = _unwell_actors(nodes)
    asked = {node.actor.condition.remote(): node for node in nodes if node.name not in lines}
    done, silent = ray.wait(list(asked), num_returns=len(asked), timeout=timeout) if asked else ([], [])
    found = list(lines.values())
    for ref in done:
        try:
            found += ray.get(ref)
        except ray.exceptions.RayError as error:
            found.append(f"{asked[ref].name}: its actor {death(error, asked[ref].process)}")
    late = _unwell_actors([asked[ref] for ref in silent])  # a busy machine may have stopped one only after the first look
    return found + [
        late.get(name, f"{name}: its actor has not answered for {timeout:.0f} s")
        for name in (asked[ref].name for ref in silent)
    ]


def stop(nodes: Sequence[EngineNode], *, silent: Set[str] = frozenset()) -> None:
    """End the servers; of an actor that does not do so in time, the process, and with it the server whose pipe it holds.

    silent: names of those that need not be asked, because they do not answer.
    """
    stops = {node.actor.stop.remote(): node for node in nodes if node.name not in silent}
    done, _ = ray.wait(list(stops), num_returns=len(stops), timeout=_STOP_SECONDS) if stops else ([], [])
    for ref in done:
        try:
            ray.get(ref)
        except ray.exceptions.RayError:
            pass  # an actor that is gone took its server along
    ended = {stops[ref].name for ref in done}
    left = [node for node in nodes if node.name not in ended]
    for node in left:
        ray.kill(node.actor)
    end({node.name: node.process for node in left if node.process is not None})


def refuse_lost_nodes(nodes: Mapping[str, EngineNode], dead: Mapping[str, Death]) -> None:
    """Raises RuntimeError naming the machines that are gone: only somebody outside can bring them back."""
    lost = lost_nodes({node.node_ip for name, node in nodes.items() if name in dead})
    if lost:
        gone = "; ".join(f"{name} ({nodes[name].node_ip})" for name in dead if nodes[name].node_ip in lost)
        raise RuntimeError(
            f"node {', '.join(lost)} is gone, and with it {gone}. Ray cannot start an engine there: bring the node back or "
            "replace it and run the same command again; it resumes from the last checkpoint"
        )
