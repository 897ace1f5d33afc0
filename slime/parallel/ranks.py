"""The rank grid. Order of the axes, fastest first: tp, cp, ep, dp, pp (Megatron's default)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from slime.compat.megatron import prepare


class ParallelSizes(Protocol):
    """The part of the config's `parallel` section that decides the grid (slime's and Megatron's names)."""

    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    virtual_pipeline_model_parallel_size: int | None
    context_parallel_size: int
    expert_model_parallel_size: int
    expert_tensor_parallel_size: int | None
    distributed_timeout_minutes: int


class HasBackend(Protocol):
    """What is asked of a device here."""

    backend: str
    """The torch.distributed backend of its collectives."""


@dataclass(frozen=True)
class Ranks:
    """This process in the grid. A `*_rank` counts from 0 within the group of the same name.

    `dp` counts replicas of the data; gradients of dense parameters are summed over `dp_cp_group`, those of experts over
    `edp_group`.
    """

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    vpp_size: int | None
    """Model chunks per rank, or None without interleaving."""
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    etp_rank: int
    etp_size: int
    edp_rank: int
    edp_size: int
    tp_group: ProcessGroup
    pp_group: ProcessGroup
    cp_group: ProcessGroup
    dp_group: ProcessGroup
    dp_cp_group: ProcessGroup
    ep_group: ProcessGroup
    etp_group: ProcessGroup
    edp_group: ProcessGroup

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_dense_source(self) -> bool:
        """One rank per (pp, tp position 0): holds what every other dp x cp rank of the stage holds too."""
        return self.tp_rank == 0 and dist.get_rank(self.dp_cp_group) == 0

    @property
    def is_expert_source(self) -> bool:
        """One rank per (pp, ep): first of its expert tensor group and of its expert replicas."""
        return self.etp_rank == 0 and self.edp_rank == 0

    def __str__(self) -> str:
        axes = ("tp", "cp", "pp", "dp", "ep", "etp")
        places = " ".join(f"{axis} {getattr(self, axis + '_rank')}/{getattr(self, axis + '_size')}" for axis in axes)
        return f"rank {self.rank}/{self.world_size}: {places}"


def check_sizes(sizes: ParallelSizes, world_size: int) -> None:
    """Raise ValueError, with the numbers, when the grid does not fit `world_size` ranks."""
    tp, pp, cp = sizes.tensor_model_parallel_size, sizes.pipeline_model_parallel_size, sizes.context_parallel_size
    ep, etp = sizes.expert_model_parallel_size, expert_tp(sizes)
    if world_size % (tp * pp * cp):
        raise ValueError(
            f"{world_size} ranks cannot be divided into TP {tp} x PP {pp} x CP {cp} = {tp * pp * cp}; start a multiple of "
            f"{tp * pp * cp} ranks, or change --tensor-/--pipeline-/--context-...-parallel-size"
        )
    if world_size % (ep * etp * pp):
        raise ValueError(
            f"{world_size} ranks cannot be divided into expert-TP {etp} x EP {ep} x PP {pp} = {ep * etp * pp}; choose "
            "--expert-model-parallel-size among "
            f"{_divisors(world_size // (etp * pp)) if world_size % (etp * pp) == 0 else '(none)'}"
        )


def expert_tp(sizes: ParallelSizes) -> int:
    """Megatron's rule: experts are split like everything else unless told otherwise."""
    return sizes.expert_tensor_parallel_size or sizes.tensor_model_parallel_size


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def make_groups(sizes: ParallelSizes, **others: object) -> None:
    """Megatron-core's process groups of these sizes. others: its arguments beside the sizes. A collective."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor_model_parallel_size,
        pipeline_model_parallel_size=sizes.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=sizes.virtual_pipeline_model_parallel_size,
        context_parallel_size=sizes.context_parallel_size,
        expert_model_parallel_size=sizes.expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tp(sizes),
        **others,
    )


def init_ranks(
    sizes: ParallelSizes, *, rank: int, world_size: int, device: HasBackend, seed: int = 1234, init_method: str = "env://"
) -> Ranks:
    """Join the world (unless torch.distributed already runs), build every group, seed megatron-core's generators, say who we
    are.

    seed: --seed; tensor-parallel ranks get streams of their own from it, pipeline stages too. All ranks call it together.
    Raises ValueError when the sizes do not fit the world.
    """
    check_sizes(sizes, world_size)
    prepare()
    from megatron.core import parallel_state

    timeout = timedelta(minutes=sizes.distributed_timeout_minutes)
    if not dist.is_initialized():
        dist.init_process_group(device.backend, init_method=init_method, rank=rank, world_size=world_size, timeout=timeout)
    if not parallel_state.model_parallel_is_initialized():
        make_groups(sizes, distributed_timeout_minutes=sizes.distributed_timeout_minutes)
        _seed(seed)
    return _read(rank, world_size)


def _seed(seed: int) -> None:
    """Every generator of this process, by Megatron's rule: ranks of one pipeline stage draw the same numbers from Python's,
    NumPy's and torch's own; megatron-core's tracker has a stream for each tensor-parallel rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    of_stage = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(of_stage)
    np.random.seed(of_stage % 2**32)
    torch.manual_seed(of_stage)
    model_parallel_cuda_manual_seed(of_stage, force_reset_rng=True)


def _read(rank: int, world_size: int) -> Ranks:
    from megatron.core import parallel_state as state

    def place(group: ProcessGroup) -> tuple[int, int]:
        return dist.get_rank(group), dist.get_world_size(group)

    groups = {
        "tp": state.get_tensor_model_parallel_group(),
        "pp": state.get_pipeline_model_parallel_group(),
        "cp": state.get_context_parallel_group(),
        "dp": state.get_data_parallel_group(),
        "ep": state.get_expert_model_parallel_group(),
        "etp": state.get_expert_tensor_parallel_group(),
        "edp": state.get_expert_data_parallel_group(),
    }
    numbers = {}
    for axis, group in groups.items():
        numbers[f"{axis}_rank"], numbers[f"{axis}_size"] = place(group)
    return Ranks(
        rank=rank,
        world_size=world_size,
        vpp_size=state.get_virtual_pipeline_model_parallel_world_size(),
        dp_cp_group=state.get_data_parallel_group(with_context_parallel=True),
        **numbers,
        **{f"{axis}_group": group for axis, group in groups.items()},
    )
