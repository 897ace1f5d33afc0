"""The planned weight sync for the terminal: its bytes, and its rounds as bars."""

from __future__ import annotations

from collections.abc import Iterable

from slime.rehearse.report.bars import amount
from slime.rehearse.sync import PlannedSync
from slime.weights.price import RoundPrice

SHOWN = 20
"""Rounds with a line of their own; of more, runs of neighbours share one."""
BAR = 40


def sync_lines(sync: PlannedSync) -> list[str]:
    """What moves, how long it takes, and one bar per round: `#` over links, `.` loading."""
    found, plan = sync.price, sync.plan
    largest = max(one.bucket for one in found.rounds)
    lines = ["engines elsewhere get a broadcast; this is what the plan would take"] if sync.broadcasts else []
    lines += [
        f"{plan.rounds} rounds of at most {amount(largest / 1e9)} GB on a GPU, {plan.hops} hops each: "
        f"{found.wire_seconds:.2f} s on the wire, {found.seconds:.2f} s with loading",
        f"into an engine's GPU {_range(found.received)} over links; out of a GPU to other nodes {_range(found.network_out)}; "
        f"most to do: {found.busiest}, {found.busiest_seconds:.2f} s",
        f"an engine rank is given at most {sync.most_tensors:,} tensors in {plan.rounds} calls",
        f"plan {plan.digest[:16]}",
    ]
    rows = list(_rows(found.rounds))
    longest = max((one.wire + one.load for _, one in rows), default=0.0) or 1.0
    for name, one in rows:
        wire, load = (round(seconds / longest * BAR) for seconds in (one.wire, one.load))
        hops = " + ".join(f"{seconds * 1e3:.1f}" for seconds in one.hops)
        told = f"{one.bucket / 1e9:6.3f} GB  {hops:>18} ms, load {one.load * 1e3:5.1f} ms"
        lines.append(f"  round {name:>6}  {told}  {'#' * wire}{'.' * load}")
    return lines


def sync_json(sync: PlannedSync) -> dict[str, object]:
    found, plan = sync.price, sync.plan
    return {
        "digest": plan.digest,
        "wire_seconds": found.wire_seconds,
        "load_seconds": found.load_seconds,
        "seconds": found.seconds,
        "busiest": found.busiest,
        "busiest_seconds": found.busiest_seconds,
        "received_bytes": list(found.received),
        "network_out_bytes": list(found.network_out),
        "most_tensors": sync.most_tensors,
        "rounds": [{"hops": list(one.hops), "bucket": one.bucket, "load": one.load} for one in found.rounds],
    }


def _range(nbytes: tuple[int, int]) -> str:
    low, high = (amount(one / 1e9) for one in nbytes)
    return f"{high} GB" if low == high else f"{low} to {high} GB"


def _rows(rounds: tuple[RoundPrice, ...]) -> Iterable[tuple[str, RoundPrice]]:
    """Rounds, or the mean of neighbours where there are many."""
    each = -(-len(rounds) // SHOWN)
    for first in range(0, len(rounds), each):
        some = rounds[first : first + each]
        name = str(first) if each == 1 else f"{first}-{first + len(some) - 1}"
        hops = tuple(sum(seconds) / len(some) for seconds in zip(*(one.hops for one in some), strict=True))
        load = sum(one.load for one in some) / len(some)
        yield name, RoundPrice(hops, max(one.bucket for one in some), load)
