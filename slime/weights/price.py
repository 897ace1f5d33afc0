"""What a plan costs: seconds on the links hop by hop, seconds of loading, bytes per GPU. Arithmetic on assumed rates."""

from __future__ import annotations

from dataclasses import dataclass

from slime.weights.plan import SyncPlan

PORTS = ("network out", "network in", "NVLink out", "NVLink in")


@dataclass(frozen=True)
class Links:
    """Rates in GB/s, those of links in each direction."""

    network: float = 50.0
    """Of one GPU."""
    nvlink: float = 450.0
    """Between GPUs of a node."""
    load: float = 50.0
    """At which an engine rank loads a bucket that lies on its GPU."""


@dataclass(frozen=True)
class RoundPrice:
    hops: tuple[float, ...]
    """Seconds of each hop's busiest port."""
    bucket: int
    """Bytes of the largest bucket, room for what is not loaded from it included."""
    load: float
    """Seconds in which engines load it."""

    @property
    def wire(self) -> float:
        return sum(self.hops)


@dataclass(frozen=True)
class PlanPrice:
    rounds: tuple[RoundPrice, ...]
    busiest: str
    """The port with the most to do in all: `network out of GPU 3`."""
    busiest_seconds: float
    received: tuple[int, int]
    """Least and most bytes that reach an engine's GPU over links; what it has trained itself does not travel."""
    network_out: tuple[int, int]
    """Least and most bytes that leave a trainer's or an engine's GPU for another node."""

    @property
    def wire_seconds(self) -> float:
        return sum(one.wire for one in self.rounds)

    @property
    def load_seconds(self) -> float:
        return sum(one.load for one in self.rounds)

    @property
    def seconds(self) -> float:
        """From the first byte to the last load: a round travels while engines load the one before."""
        behind = 0.0
        total = 0.0
        for one in self.rounds:
            total += max(one.wire, behind)
            behind = one.load
        return total + behind


def price(plan: SyncPlan, links: Links) -> PlanPrice:
    """Hops are taken to wait for each other and to use ports to their rate: one lasts as long as its busiest port is busy."""
    rates = [rate * 1e9 for rate in (links.network, links.network, links.nvlink, links.nvlink)]
    loads, loaded = _loads(plan)
    rounds = []
    for hops, of_gpu, bucket in zip(loads, loaded, _buckets(plan), strict=True):
        seconds = tuple(max(max(port) / rate for port, rate in zip(hop, rates, strict=True)) for hop in hops)
        rounds.append(RoundPrice(seconds, bucket, max(of_gpu) / (links.load * 1e9)))
    totals = [
        [sum(gpu) for gpu in zip(*(hop[port] for hops in loads for hop in hops), strict=True)] or [0] for port in range(4)
    ]
    seconds_of = [max(total) / rate for total, rate in zip(totals, rates, strict=True)]
    port = seconds_of.index(max(seconds_of))
    serving = {gpu for lane in plan.lanes for gpu in lane.gpus}
    received = [totals[1][gpu] + totals[3][gpu] for gpu in serving if plan.hops] or [0]
    return PlanPrice(
        tuple(rounds),
        f"{PORTS[port]} of GPU {totals[port].index(max(totals[port]))}",
        seconds_of[port],
        (min(received), max(received)),
        (min(totals[0]), max(totals[0])),
    )


def _loads(plan: SyncPlan) -> tuple[list[list[list[list[int]]]], list[list[int]]]:
    """(bytes by round, hop, port and GPU; bytes that are loaded by round and GPU)"""
    gpus, hops = len(plan.nodes), plan.hops
    loads = [[[[0] * gpus for _ in PORTS] for _ in range(hops)] for _ in range(plan.rounds)]
    loaded = [[0] * gpus for _ in range(plan.rounds)]
    for delivery in plan.deliveries:
        nbytes, of_gpu = delivery.nbytes, loaded[delivery.round]
        for gpu in plan.keepers[delivery.lane][delivery.part].intersection(delivery.makers):
            of_gpu[gpu] += nbytes
        for hop, source, target in delivery.legs:
            near = 2 if plan.nodes[source] == plan.nodes[target] else 0
            ports = loads[delivery.round][hop]
            ports[near][source] += nbytes
            ports[near + 1][target] += nbytes
            of_gpu[target] += nbytes
    return loads, loaded


def _buckets(plan: SyncPlan) -> list[int]:
    """Bytes of the largest bucket by round."""
    rooms = [[0] * len(plan.nodes) for _ in range(plan.rounds)]
    seen: set[tuple[int, int]] = set()
    for delivery in plan.deliveries:
        lane = plan.lanes[delivery.lane]
        new = [unit for unit in delivery.units if (delivery.lane, unit) not in seen]
        seen.update((delivery.lane, unit) for unit in new)
        nbytes = sum(lane.units[unit].nbytes for unit in new)
        for gpu in lane.gpus if nbytes else ():
            rooms[delivery.round][gpu] += nbytes
    return [max(of_round) for of_round in rooms]


def broadcast_seconds(plan: SyncPlan, links: Links) -> float:
    """The simple way beside it: every tensor once through the network port of its one source, one source after another."""
    return sum(unit.nbytes for lane in plan.lanes for unit in lane.units) / (links.network * 1e9)
