"""Corrections of megatron-core's own bugs on the path without TransformerEngine and apex.

Each `Guard` says why, for which versions, where upstream the bug is, and which test notices that it is no longer needed
(the test exercises the published code without the guard and expects the bug).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from slime.compat.pickles import close_torch_checkpoints

Version = tuple[int, ...]


@dataclass(frozen=True)
class Guard:
    name: str
    reason: str
    place: str
    """File and line in megatron-core 0.16.1, relative to megatron/core/."""
    first: Version
    last: Version
    host_only: bool
    test: str
    """The test in tests/model/test_compat_megatron.py that fails when this guard is obsolete."""
    apply: Callable[[], None]

    def applies(self, version: Version, on_host: bool) -> bool:
        return self.first <= version <= self.last and (on_host or not self.host_only)


def _has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def _name_te_general_gemm() -> None:
    import megatron.core.transformer.moe.moe_utils as moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _split_sizes_become_numpy() -> None:
    import torch
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def move(tensor, as_numpy: bool = False, record_stream: bool = False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = move


def _rng_state_of_the_host() -> None:
    import torch
    from megatron.core.tensor_parallel import random

    def set_state(new_state, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._set_cuda_rng_state = set_state


class _TrackerNoiseFilter:
    """Drops the one record of random.py:262; on the host the "GPU" generator *is* the CPU's, so it would come at every fork."""

    def filter(self, record) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def _quiet_rng_tracker() -> None:
    import logging

    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_TrackerNoiseFilter())


def _uneven_shares_over_gloo() -> None:
    import torch
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings

    published_gather, published_reduce = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(input_, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return published_gather(input_, group, output_split_sizes, use_global_buffer)
        # All-to-all takes unequal shares on every backend: each rank sends all it has to everybody.
        sizes = [int(size) for size in output_split_sizes]
        output = input_.new_empty(sum(sizes), *input_.shape[1:])
        everybody = input_.repeat(group.size(), *[1] * (input_.dim() - 1))
        dist.all_to_all_single(output, everybody, sizes, [len(input_)] * group.size(), group=group)
        return output

    def reduce_scatter(input_, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return published_reduce(input_, group, input_split_sizes, use_global_buffer)
        whole = input_.clone()
        dist.all_reduce(whole, group=group)
        return torch.split(whole, [int(size) for size in input_split_sizes])[group.rank()].contiguous()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, reduce_scatter


def _steps_of_torch_adam() -> None:
    """Four faults of DistributedOptimizer with torch.optim.AdamW inside, see the reasons in GUARDS."""
    if _has_transformer_engine() or importlib.util.find_spec("apex") is not None:
        return
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    published_state_dict, published_load = DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict
    published_set = DistributedOptimizer._set_main_param_and_optimizer_states

    def state_dict(self):
        if self.optimizer is not None and not any(group["params"] for group in self.optimizer.param_groups):
            # Of a stage without experts, say: no parameter knows the step; slime.training.state asks the other ranks.
            rest = {key: value for key, value in self.optimizer.state_dict().items() if key != "state"}
            for group in rest["param_groups"]:
                del group["params"]
                group["step"] = group.get("step", 0)
            return {"optimizer": rest}
        if self.optimizer is not None and not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for param in group["params"]:
                    # An offloading optimizer updates a float32 copy elsewhere, and keeps it among the state.
                    updated = getattr(self.optimizer, "param_to_inner_param", {}).get(param, param)
                    moments = {name: torch.zeros_like(updated.data) for name in ("exp_avg", "exp_avg_sq")}
                    copy = {} if updated is param else {"master_param": updated}
                    self.optimizer.state[param] = {"step": torch.tensor(0.0), **moments, **copy}
        return published_state_dict(self)

    def load_state_dict(self, state):
        published_load(self, state)
        if self.optimizer is not None:
            for moments in self.optimizer.state.values():
                if torch.is_tensor(moments.get("step")):
                    moments["step"] = moments["step"].clone()

    def set_states(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        step = self.optimizer.state[main].get("step")
        published_set(self, model_param, tensors if "step" in tensors or step is None else {**tensors, "step": step})

    DistributedOptimizer.state_dict = state_dict
    DistributedOptimizer.load_state_dict = load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def _no_classes_in_checkpoints() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    published = DistributedOptimizer.state_dict

    def state_dict(self):
        state = published(self)
        for group in state["optimizer"]["param_groups"]:
            for name in [name for name, value in group.items() if isinstance(value, type)]:
                del group[name]
        return state

    DistributedOptimizer.state_dict = state_dict


def _results_stay_in_the_process() -> None:
    import queue

    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._get_write_results_queue = queue.SimpleQueue


def _no_version_of_transformer_engine() -> None:
    if _has_transformer_engine():
        return
    import megatron.core.utils as utils
    from packaging.version import Version as PackageVersion

    utils.get_te_version = lambda: PackageVersion("0")


GUARDS: tuple[Guard, ...] = (
    Guard(
        name="te_version",
        reason="without TransformerEngine its version is None, which --use-precision-aware-optimizer compares (TypeError)",
        place="utils.py:348, optimizer/optimizer_config.py:383",
        first=(0, 16, 0),
        last=(0, 19, 99),
        host_only=False,
        test="test_transformer_engines_missing_version_still_cannot_be_compared",
        apply=_no_version_of_transformer_engine,
    ),
    Guard(
        name="te_general_gemm",
        reason="the router's linear names te_general_gemm, which is never bound without TransformerEngine (NameError)",
        place="transformer/moe/moe_utils.py:1192",
        first=(0, 16, 0),
        last=(0, 19, 99),
        host_only=False,
        test="test_router_gating_still_needs_te_general_gemm",
        apply=_name_te_general_gemm,
    ),
    Guard(
        name="split_sizes",
        reason="all_to_all split sizes stay tensors when they already are on the CPU, which the collective rejects",
        place="transformer/moe/moe_utils.py:1094",
        first=(0, 16, 0),
        last=(0, 19, 99),
        host_only=True,
        test="test_split_sizes_still_stay_tensors_on_the_cpu",
        apply=_split_sizes_become_numpy,
    ),
    Guard(
        name="rng_state",
        reason="the RNG tracker restores a CUDA generator; on the host it must restore the CPU's",
        place="tensor_parallel/random.py:90",
        first=(0, 16, 0),
        last=(0, 19, 99),
        host_only=True,
        test="test_rng_tracker_still_restores_a_cuda_generator",
        apply=_rng_state_of_the_host,
    ),
    Guard(
        name="rng_noise",
        reason="the tracker warns at every fork that the CPU generator moved, which on the host is its purpose",
        place="tensor_parallel/random.py:262",
        first=(0, 16, 0),
        last=(0, 19, 99),
        host_only=True,
        test="test_rng_tracker_still_warns",
        apply=_quiet_rng_tracker,
    ),
    Guard(
        name="uneven_shares",
        reason="expert-TP with EP gathers and reduce-scatters unequal numbers of tokens, which NCCL can and gloo cannot",
        place="tensor_parallel/mappings.py:150, 193",
        first=(0, 16, 0),
        last=(0, 19, 99),
        host_only=True,
        test="test_gloo_still_cannot_gather_unequal_shares",
        apply=_uneven_shares_over_gloo,
    ),
    Guard(
        name="adam_steps",
        reason="DistributedOptimizer over torch AdamW: neither a fresh optimizer nor one without parameters (experts, in a "
        "stage that has none) can be saved; one shared `step` tensor after a load counts once per parameter; the reshardable "
        "loaders miss `step`",
        place="optimizer/distrib_optimizer.py:641, 825, 911",
        first=(0, 16, 0),
        last=(0, 19, 99),
        host_only=False,
        test="test_adam_steps_still_shared_after_a_load",
        apply=_steps_of_torch_adam,
    ),
    Guard(
        name="classes_in_checkpoints",
        reason="--optimizer-cpu-offload saves optimizer classes among the values, and torch refuses to load classes: such a "
        "checkpoint could not be continued",
        place="optimizer/cpu_offloading/hybrid_optimizer.py:54, dist_checkpointing/strategies/common.py:89",
        first=(0, 16, 0),
        last=(0, 19, 99),
        host_only=False,
        test="test_classes_of_an_offloading_optimizer_are_still_saved",
        apply=_no_classes_in_checkpoints,
    ),
    Guard(
        name="results_queue",
        reason="every rank that saves starts a manager process for one queue, which outlives a killed rank and hands a failed "
        "save's results to the next; slime.model.dist_writer needs no queue between processes",
        place="dist_checkpointing/strategies/filesystem_async.py:52",
        first=(0, 16, 0),
        last=(0, 19, 99),
        host_only=False,
        test="test_a_save_still_starts_a_manager_process",
        apply=_results_stay_in_the_process,
    ),
    Guard(
        name="closed_pickles",
        reason="torch unpickles the metadata and the small objects of a checkpoint, which runs whatever they name; here by the "
        "closed list of slime.compat.pickles",
        place="dist_checkpointing/strategies/torch.py:827 (torch: distributed/checkpoint/filesystem.py, default_planner.py)",
        first=(0, 16, 0),
        last=(0, 19, 99),
        host_only=False,
        test="test_a_checkpoints_metadata_still_runs_what_it_names",
        apply=close_torch_checkpoints,
    ),
)
