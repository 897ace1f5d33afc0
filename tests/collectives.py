"""What every rank asked of every process group, in order: a sequence that differs between ranks is found before it hangs.

    with recorded() as record:
        step()
    assert mismatches(records of all ranks) == []

Calls are caught at the ProcessGroup itself, below every alias and wrapper of torch.distributed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup

COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "broadcast", "reduce", "allgather", "allgather_coalesced", "_allgather_base",
    "allgather_into_tensor_coalesced", "all_gather_single", "all_gather_single_coalesced", "reduce_scatter",
    "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "reduce_scatter_single", "reduce_scatter_single_coalesced",
    "alltoall", "alltoall_base", "all_to_all_single", "gather", "scatter", "barrier",
)  # fmt: skip
# Ranks may send each other unequally many rows, so that only the shape of a row can be compared.
UNEVEN = ("alltoall", "alltoall_base", "all_to_all_single")

Call = tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]
"""(operation, (dtype, shape) of each tensor argument)."""


@dataclass
class Record:
    """One rank's calls by process group, and its point-to-point traffic by (from, to)."""

    rank: int
    members: dict[str, tuple[int, ...]] = field(default_factory=dict)
    collectives: dict[str, list[Call]] = field(default_factory=dict)
    sent: dict[tuple[int, int], list[Call]] = field(default_factory=dict)
    received: dict[tuple[int, int], list[Call]] = field(default_factory=dict)


@contextmanager
def recorded() -> Iterator[Record]:
    record = Record(dist.get_rank())
    # From __dict__: getattr would give functions that no longer bind to a group once they are put back.
    published = {name: vars(ProcessGroup)[name] for name in (*COLLECTIVES, "send", "recv") if name in vars(ProcessGroup)}
    depth = [0]

    def catch(name: str):
        def call(group: ProcessGroup, *args, **kwargs):
            if not depth[0]:  # one operation may be made of others
                _note(record, name, group, args)
            depth[0] += 1
            try:
                return published[name].__get__(group)(*args, **kwargs)
            finally:
                depth[0] -= 1

        return call

    for name in published:
        setattr(ProcessGroup, name, catch(name))
    try:
        yield record
    finally:
        for name, method in published.items():
            setattr(ProcessGroup, name, method)


def _note(record: Record, name: str, group: ProcessGroup, args: tuple) -> None:
    members = tuple(dist.get_process_group_ranks(group))
    tensors = tuple((str(t.dtype), tuple(t.shape[1:] if name in UNEVEN else t.shape)) for t in _tensors(args))
    if name in ("send", "recv"):
        other = members[next(arg for arg in args if isinstance(arg, int))]
        if name == "send":
            record.sent.setdefault((record.rank, other), []).append((name, tensors))
        else:
            record.received.setdefault((other, record.rank), []).append((name, tensors))
        return
    record.members[group.group_name] = members
    record.collectives.setdefault(group.group_name, []).append((name, tensors))


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def mismatches(records: Sequence[Record]) -> list[str]:
    """One line per group whose members did not call the same operations on the same shapes in the same order, and per pair of
    ranks whose sends are not the other's receives."""
    by_rank, lines = {record.rank: record for record in records}, []
    groups = {name: members for record in records for name, members in record.members.items()}
    for name, members in sorted(groups.items()):
        calls = {rank: by_rank[rank].collectives.get(name, []) for rank in members}
        first = members[0]
        for rank in members[1:]:
            if where := _difference(calls[first], calls[rank]):
                lines.append(f"group {name} of ranks {list(members)}: rank {first} and rank {rank} differ at {where}")
    pairs = {pair for record in records for pair in (*record.sent, *record.received)}
    for pair in sorted(pairs):
        sent = [tensors for _, tensors in by_rank[pair[0]].sent.get(pair, [])]
        received = [tensors for _, tensors in by_rank[pair[1]].received.get(pair, [])]
        if where := _difference(sent, received):
            lines.append(f"sent from rank {pair[0]} and received by rank {pair[1]} differ at {where}")
    return lines


def _difference(left: list, right: list) -> str | None:
    for number, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return f"call {number}: {one} and {other}"
    if len(left) != len(right):
        return f"call {min(len(left), len(right))}: {len(left)} calls and {len(right)}"
    return None
