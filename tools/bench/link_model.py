"""A model of links: how long sends take when every GPU has one port to the network and one to its node, each way.

It knows nothing of weights or plans. A send is (round, hop, source, target, bytes). Sends of one hop fly together and share
ports max-min fairly, as flows do that nobody holds back; a hop begins when all sends of the hop before have arrived.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

Send = tuple[int, int, int, int, int]
PORTS = ("network out", "network in", "NVLink out", "NVLink in")
TOGETHER = 10
"""The first tenth of the flows to end is taken to end together, with its last: a little too slow, and much less work."""


@dataclass(frozen=True)
class Ports:
    """Rates of one GPU's ports, GB/s in each direction (an H100 with a 400 Gb/s card of its own)."""

    network: float = 50.0
    nvlink: float = 450.0


@dataclass(frozen=True)
class Timing:
    seconds: float
    busiest: str
    """The port with the most seconds of work in all: `NVLink out of GPU 3`."""
    busiest_seconds: float
    received_gb: tuple[float, ...]
    """By GPU, over either port."""
    network_gb: float
    """Through all network ports of one direction."""


def simulate(sends: Iterable[Send], *, nodes: tuple[int, ...], ports: Ports) -> Timing:
    """nodes: the node of each GPU. Sends within a node take NVLink."""
    gpus = len(nodes)
    rates = np.repeat([ports.network, ports.network, ports.nvlink, ports.nvlink], gpus) * 1e9
    flows: dict[tuple[int, int], dict[tuple[int, int], int]] = defaultdict(lambda: defaultdict(int))
    received = np.zeros(gpus)
    for number, hop, source, target, nbytes in sends:
        near = 2 * gpus if nodes[source] == nodes[target] else 0
        flows[number, hop][near + source, near + gpus + target] += nbytes
        received[target] += nbytes
    seconds, work = 0.0, np.zeros(4 * gpus)
    for step in sorted(flows):
        outs, ins = (np.array(side) for side in zip(*flows[step], strict=True))
        nbytes = np.array(list(flows[step].values()), dtype=float)
        seconds += _fair_seconds(outs, ins, nbytes, rates)
        work += np.bincount(outs, nbytes, 4 * gpus) + np.bincount(ins, nbytes, 4 * gpus)
    loads = work / rates
    worst = int(loads.argmax())
    name = f"{PORTS[worst // gpus]} of GPU {worst % gpus}"
    return Timing(seconds, name, float(loads[worst]), tuple(received / 1e9), float(work[:gpus].sum() / 1e9))


def _fair_seconds(outs: np.ndarray, ins: np.ndarray, nbytes: np.ndarray, rates: np.ndarray) -> float:
    """Until the last of these flows has ended. outs, ins: the two ports of each flow."""
    seconds, left, flying = 0.0, nbytes.copy(), np.arange(len(nbytes))
    while len(flying):
        speed = _fair_rates(outs[flying], ins[flying], rates)
        ends = left[flying] / speed
        step = np.partition(ends, len(ends) // TOGETHER)[len(ends) // TOGETHER]
        left[flying] -= speed * step
        flying = flying[ends > step]
        seconds += float(step)
    return seconds


def _fair_rates(outs: np.ndarray, ins: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Max-min fair rates: the ports that can give the least share fix their flows first; the others divide what is left."""
    speed, free, open_ = np.zeros(len(outs)), rates.copy(), np.ones(len(outs), dtype=bool)
    while open_.any():
        count = np.bincount(outs[open_], minlength=len(rates)) + np.bincount(ins[open_], minlength=len(rates))
        share = np.where(count > 0, free / np.maximum(count, 1), np.inf)
        own = np.where(open_, np.minimum(share[outs], share[ins]), np.inf)
        least = own.min()
        fixed = own <= least * 1.05  # ports that are nearly alike are fixed together
        speed[fixed] = least
        taken = np.bincount(outs[fixed], minlength=len(rates)) + np.bincount(ins[fixed], minlength=len(rates))
        free = free - taken * least
        open_ &= ~fixed
    return speed
