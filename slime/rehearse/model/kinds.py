"""The tensors of a model, alike ones counted: sums over 60,000 names become sums over some 2,000 kinds."""

from __future__ import annotations

from functools import lru_cache

from slime.model.names import Entry, NameTable


@lru_cache(maxsize=4)
def kinds(table: NameTable) -> tuple[tuple[Entry, int], ...]:
    """(one entry, how many are like it) in the table's order: the experts of one layer's matrix are alike."""
    found: dict[tuple, list] = {}
    for entry in table.entries:
        key = (entry.name if entry.expert is None else entry.name.rstrip("0123456789"), entry.shape)
        found.setdefault(key, [entry, 0])[1] += 1
    return tuple((entry, count) for entry, count in found.values())
