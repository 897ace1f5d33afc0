"""Which node keeps the copies of which other's snapshots. Pure: a run does what a rehearsal counts."""

from __future__ import annotations

from collections.abc import Sequence


def copy_places(sizes: Sequence[int]) -> list[int]:
    """Node -> the other node that keeps its copies, one for each. sizes: bytes of each node's own snapshots, two nodes or more.

    The fullest nodes' lie where less is: nodes are taken by size, and each one's copies go half way round.
    """
    order = sorted(range(len(sizes)), key=lambda node: (-sizes[node], node))
    half = len(order) // 2
    places = [0] * len(order)
    for number, node in enumerate(order):
        places[node] = order[(number + half) % len(order)]
    return places
