"""One actor on every node of the cluster that `ray` is connected to: waits for the nodes, and asks all of them side by side."""

from __future__ import annotations

import sys
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from slime.preflight.facts import NodeFacts, Wanted, clock_offset, gather, listen, reach

ANSWER_SECONDS = 120.0
"""A node that says nothing for so long is silent. Torch comes from a shared file system that all of them ask at once."""
GRACE_SECONDS = 15.0
"""What the other half gets at least once one half of the nodes has answered."""
JOIN_SECONDS = 60.0
QUIET_SECONDS = 15.0
"""Nodes that a launcher started join within so long of each other; whoever comes later is not waited for."""
TELL_SECONDS = 15.0


def node_names(nodes: Sequence[Mapping[str, object]]) -> list[str]:
    """Addresses; where several Ray nodes have the same one, with what tells them apart."""
    addresses = Counter(node["NodeManagerAddress"] for node in nodes)
    names = []
    for node in nodes:
        address, name = str(node["NodeManagerAddress"]), str(node.get("NodeName") or "")
        apart = name if name and name != address else str(node["NodeID"])[:8]
        names.append(f"{address} ({apart})" if addresses[address] > 1 else address)
    return names


def waits_on(joined_at: Sequence[float], now: float, *, wanted: int, limit: float | None) -> bool:
    """Whether more nodes may still come. joined_at: seconds at which each was first seen; limit: --join-seconds, where given.

    Who joins by hand may take long, and says so by the limit. Otherwise a quarter of a minute without a new node is the end.
    """
    if len(joined_at) >= wanted:
        return False
    return now < limit if limit is not None else now < JOIN_SECONDS and now < max(joined_at, default=0.0) + QUIET_SECONDS


def wait_for_nodes(count: int, seconds: float | None) -> None:
    """Nodes join one after another, started by a launcher or by hand; who does not come is told by the verdict."""
    import ray

    started, told, seen = time.monotonic(), -TELL_SECONDS, []
    while True:
        waited = time.monotonic() - started
        there = sum(node["Alive"] for node in ray.nodes())
        seen = [*seen, *[waited] * (there - len(seen))][:there]
        if not waits_on(seen, waited, wanted=count, limit=seconds):
            return
        if waited >= told + TELL_SECONDS:
            told, limit = waited, JOIN_SECONDS if seconds is None else seconds
            sys.stderr.write(f"preflight: {there} of {count} nodes have joined ({waited:.0f} s, at most {limit:.0f})\n")
        time.sleep(1.0)


def patience(answered_at: Sequence[float], asked: int) -> float:
    """Seconds after which the rest of `asked` nodes is silent. answered_at: seconds of each answer so far.

    Nodes do the same work: once half of them has answered, the others get as much again and twice, so that a few dead ones do
    not cost the patience that a slow file system needs.
    """
    if 2 * len(answered_at) < asked or not asked:
        return ANSWER_SECONDS
    half = sorted(answered_at)[(asked - 1) // 2]
    return min(ANSWER_SECONDS, half + max(GRACE_SECONDS, 2 * half))


def _answers(asked: dict[str, object], silent: dict[str, str]) -> dict:
    """Name -> answer, of those that answer in time; the others go to `silent`. asked: name -> Ray's promise of an answer."""
    import ray

    started, waiting, answered_at, found = time.monotonic(), dict(asked), [], {}
    while waiting and (now := time.monotonic() - started) < (limit := patience(answered_at, len(asked))):
        done, _ = ray.wait(list(waiting.values()), num_returns=len(waiting), timeout=min(0.5, limit - now))
        for name in [name for name, ref in waiting.items() if ref in done]:
            answered_at.append(time.monotonic() - started)
            try:
                found[name] = ray.get(waiting.pop(name))
            except ray.exceptions.RayError as error:
                silent[name] = _last_line(error)
    silent.update({name: f"no answer within {time.monotonic() - started:.0f} s" for name in waiting})
    return found


def ask_nodes(wanted: Wanted) -> tuple[list[NodeFacts], dict[str, str]]:
    """(facts of every live node of the cluster that `ray` is connected to, the nodes that gave no answer and why)."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=0)
    class Scout:
        def __init__(self) -> None:
            self._listener = listen()

        def port(self) -> int:
            return self._listener.getsockname()[1]

        def clock(self) -> float:
            return time.time()

        def facts(self, name: str, wanted: Wanted, seeds: dict[str, str]) -> NodeFacts:
            return gather(name, wanted, seeds)

        def reach(self, targets: dict[str, tuple[str, int]]) -> dict[str, str]:
            return reach(targets)

    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"])
    scouts = {}
    for name, node in zip(node_names(nodes), nodes, strict=True):
        only_there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        scouts[name] = Scout.options(scheduling_strategy=only_there).remote()
    silent: dict[str, str] = {}
    seeds = _seed((*wanted.paths, *wanted.read_only))
    try:
        ports = _answers({name: scout.port.remote() for name, scout in scouts.items()}, silent)
        facts = _answers({name: scouts[name].facts.remote(name, wanted, seeds) for name in ports}, silent)
        offsets = _clocks({name: scouts[name] for name in facts}, silent)
        targets = {name: (_control_address(facts[name], wanted), ports[name]) for name in offsets}
        cut_off = _answers(
            {
                name: scouts[name].reach.remote({other: target for other, target in targets.items() if other != name})
                for name in targets
            },
            silent,
        )
    finally:
        for seed in seeds.values():
            Path(seed).unlink(missing_ok=True)
        for scout in scouts.values():
            ray.kill(scout)
    answered = [replace(facts[name], clock_offset=offsets[name], unreachable=cut_off[name]) for name in cut_off]
    return answered, silent


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1][:200]


def _clocks(scouts: Mapping[str, object], silent: dict[str, str]) -> dict[str, float]:
    """Name -> seconds ahead of this node."""
    import ray

    def ahead(scout: object) -> float | str:
        try:
            return clock_offset(lambda: ray.get(scout.clock.remote(), timeout=GRACE_SECONDS))
        except ray.exceptions.RayError as error:
            return _last_line(error)

    with ThreadPoolExecutor(max(len(scouts), 1)) as pool:
        found = dict(zip(scouts, pool.map(ahead, scouts.values()), strict=True))
    silent.update({name: why for name, why in found.items() if isinstance(why, str)})
    return {name: offset for name, offset in found.items() if not isinstance(offset, str)}


def _control_address(fact: NodeFacts, wanted: Wanted) -> str:
    """Where the others connect to: the named interface's address, which is not always the one that Ray uses."""
    return fact.interfaces.get(wanted.interface or "", "") or fact.address


def _seed(paths: Sequence[str]) -> dict[str, str]:
    """A file of the driver in each shared folder that exists here; the nodes must see it."""
    seeds = {}
    for path in paths:
        file = Path(path) / f".rehearse-driver-{uuid.uuid4().hex}"
        try:
            file.write_text("x")
            seeds[path] = str(file)
        except OSError:
            continue
    return seeds
