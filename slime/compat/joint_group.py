"""A torch process group whose members have different default groups, or none: trainer ranks with engines, or with receivers."""

from __future__ import annotations

import traceback
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


def give_up(group: dist.ProcessGroup, error: BaseException) -> None:
    """Close a group in which `error` came, so that members which wait for this one hear of it. The caller keeps no other
    reference.

    gloo closes connections when nobody holds the group any more, which the frames of what failed do; NCCL when it is told to.
    """
    failed: BaseException | None = error
    while failed is not None:
        traceback.clear_frames(failed.__traceback__)
        failed = failed.__context__
    group.abort()
    dist.destroy_process_group(group)
