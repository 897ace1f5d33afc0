"""A torch process group whose members have different default groups, or none: trainer ranks with engines, or with receivers."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _new_process_group_helper, _world


def joint_group(store: dist.Store, *, name: str, rank: int, world: int, backend: str, timeout: timedelta) -> dist.ProcessGroup:
    """Returns when all `world` members have called it with the same name; SGLang's ranks meet under the same prefix."""
    group, _ = _new_process_group_helper(
        world, rank, [], dist.Backend(backend), dist.PrefixStore(name, store), group_name=name, timeout=timeout
    )
    _world.pg_group_ranks[group] = {number: number for number in range(world)}
    return group
