"""By which links a part reaches all its GPUs: each node once over the network, the node's other GPUs over NVLink.

A node that has it already gets nothing over the network. Any other is entered through one GPU, from a rank that trained the
part (hop 0) or from a GPU that got it in hop 0 (hop 1): so a pipeline stage with many layers gives few copies, and the
receivers pass them on. A hop lasts as long as its busiest link. Each choice is the one that makes the two hops together the
least longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

Groups = tuple[tuple[int, tuple[int, ...]], ...]


class Leg(NamedTuple):
    """One send of a delivery's bytes."""

    hop: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Route:
    makers: tuple[int, ...]
    """GPUs whose trainer rank gives the part: it sends it, or keeps it itself."""
    legs: tuple[Leg, ...]


class _Hop:
    """Bytes on every GPU's network link in one hop of the round."""

    def __init__(self, gpus: int, level: float):
        self.out, self.into = [0] * gpus, [0] * gpus
        self.level = level
        """Bytes on the busiest link at the end of the hop, as far as is known: what stays below costs no time."""

    def add(self, source: int, target: int, nbytes: int) -> None:
        self.out[source] += nbytes
        self.into[target] += nbytes
        self.level = max(self.level, self.out[source], self.into[target])

    def cost(self, source: int, target: int, nbytes: int) -> tuple[float, float]:
        """(by how much the hop becomes longer, how full the fuller link is then)."""
        full = nbytes + max(self.out[source], self.into[target])
        return max(0.0, full - self.level), full / (self.level or 1.0)


class Router:
    """Chooses by the bytes that each GPU's links have to carry in the round so far."""

    def __init__(self, nodes: Sequence[int]):
        self._node = nodes
        self._groups: dict[tuple[int, ...], Groups] = {}
        self._fans: dict[tuple[int, int, tuple[int, ...]], tuple[Leg, ...]] = {}
        self._turn = 0

    def new_round(self, stops: Sequence[tuple[Sequence[int], tuple[int, ...], int]]) -> list[int]:
        """Forget the last round's loads. stops: (sources, GPUs, bytes) of everything that the round moves.

        Returns the order in which to route them: what has the fewest ways to go first, and of these what the busiest ranks
        send, so that receivers pass on what these would have to send again.
        """
        once, total = [0.0] * len(self._node), 0
        for sources, gpus, nbytes in stops:
            inside = {self._node[source] for source in sources}
            copies = sum(node not in inside for node, _ in self._nodes(gpus))
            total += copies * nbytes
            for source in sources if copies else ():
                once[source] += nbytes / len(sources)
        gpus = len(self._node)
        receiving = len({gpu for gpus in {gpus for _, gpus, _ in stops} for gpu in gpus})
        first = max(once)
        self._first, self._second = _Hop(gpus, first), _Hop(gpus, max(0.0, total / receiving - first))
        self._near_out = [0] * gpus
        busy = [(len(keep), -max(once[source] for source in sources)) for sources, keep, _ in stops]
        return sorted(range(len(stops)), key=lambda one: (busy[one], one))

    def route(self, sources: Sequence[int], gpus: tuple[int, ...], nbytes: int) -> Route:
        """sources: GPUs whose trainer rank can give the part. gpus: that must have it at the end."""
        keeps = set(sources)
        makers = keeps.intersection(gpus)
        legs: list[Leg] = []
        inside: dict[int, list[int]] = {}
        for source in sources:
            inside.setdefault(self._node[source], []).append(source)
        away: list[tuple[int, ...]] = []
        for node, members in self._nodes(gpus):
            if node not in inside:
                away.append(members)
                continue
            for gpu in members:
                if gpu not in keeps:
                    source = min(inside[node], key=self._near_out.__getitem__)
                    makers.add(source)
                    self._near_out[source] += nbytes
                    legs.append(Leg(0, source, gpu))
        relays: list[int] = []
        for members in self._in_turn(away):
            leg = self._enter(sources, relays, members, nbytes)
            if leg.source in keeps:
                makers.add(leg.source)
            if leg.hop == 0:
                relays.append(leg.target)
            legs.append(leg)
            legs += self._fan(leg, members, nbytes)
        return Route(tuple(sorted(makers)), tuple(legs))

    def _in_turn(self, away: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The node whose links are the emptiest in hop 0 comes first, for the first copy is always of hop 0."""
        if len(away) < 2:
            return away
        self._turn += 1
        start = self._turn % len(away)
        turned = away[start:] + away[:start]
        into = self._first.into
        best = min(range(len(turned)), key=lambda one: min(into[gpu] for gpu in turned[one]))
        return [turned[best], *turned[:best], *turned[best + 1 :]]

    def _enter(self, sources: Sequence[int], relays: Sequence[int], members: tuple[int, ...], nbytes: int) -> Leg:
        """A node's one copy."""
        first, second = self._first, self._second
        direct = min(sources, key=first.out.__getitem__), min(members, key=first.into.__getitem__)
        if relays:
            relayed = min((*relays, *sources), key=second.out.__getitem__), min(members, key=second.into.__getitem__)
            if second.cost(*relayed, nbytes) < first.cost(*direct, nbytes):
                second.add(*relayed, nbytes)
                return Leg(1, *relayed)
        first.add(*direct, nbytes)
        return Leg(0, *direct)

    def _fan(self, leg: Leg, members: tuple[int, ...], nbytes: int) -> tuple[Leg, ...]:
        """From the GPU through which a node was entered to its other ones."""
        key = leg.hop + 1, leg.target, members
        if key not in self._fans:
            self._fans[key] = tuple(Leg(leg.hop + 1, leg.target, gpu) for gpu in members if gpu != leg.target)
        self._near_out[leg.target] += nbytes * (len(members) - 1)
        return self._fans[key]

    def _nodes(self, gpus: tuple[int, ...]) -> Groups:
        """The GPUs node by node."""
        if gpus not in self._groups:
            found: dict[int, list[int]] = {}
            for gpu in gpus:
                found.setdefault(self._node[gpu], []).append(gpu)
            self._groups[gpus] = tuple((node, tuple(members)) for node, members in found.items())
        return self._groups[gpus]
