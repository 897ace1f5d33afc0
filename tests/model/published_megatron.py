"""Run by test_compat_megatron in a process of its own: megatron-core as published (host build only, no guard); prints what
still fails.

A guard is obsolete when its line here says "works".
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile

import torch
import torch.distributed as dist

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))


def router_gating() -> str:
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    try:
        router_gating_linear(torch.ones(2, 1, 4), torch.ones(3, 4), None, torch.float32)
    except NameError:
        return "NameError"
    return "works"


def split_sizes() -> str:
    from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu

    moved = maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True)
    return "stays a tensor" if torch.is_tensor(moved) else "works"


def results_queue() -> str:
    import multiprocessing

    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._get_write_results_queue()
    return f"{len(multiprocessing.active_children())} processes"


def rng_restore() -> str:
    from megatron.core.tensor_parallel import random

    other = torch.Generator().manual_seed(3)
    random._set_cuda_rng_state(other.get_state())
    return "works" if torch.rand(1) == torch.rand(1, generator=other) else "no effect"


def rng_noise() -> str:
    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    random.initialize_rng_tracker(force_reset=True)
    tracker = random.get_cuda_rng_tracker()
    tracker.add("here", 1)
    records: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addHandler(Keep())
    with tracker.fork("here"):
        torch.rand(1)
    return "warns" if records else "works"


def adam_steps(guarded: bool) -> str:
    """Steps that AdamW counts per parameter after a save and a load following 2 real steps."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not dist.is_initialized():
        store = dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, params_dtype=torch.float32)
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    model = DistributedDataParallel(config=config, ddp_config=ddp, module=module)
    values = OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=True, params_dtype=torch.float32)
    optimizer = get_megatron_optimizer(values, [model])
    inner = optimizer.chained_optimizers[0]
    try:
        inner.state_dict()
        fresh = "saves"
    except AssertionError:
        fresh = "cannot be saved"

    def one_step() -> None:
        model.zero_grad_buffer()
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()

    one_step()
    one_step()
    state = inner.state_dict()
    inner.load_state_dict(state)
    one_step()
    counted = sorted({int(moments["step"].item()) for moments in inner.optimizer.state.values()})
    inner.optimizer.state.clear()
    for group in inner.optimizer.param_groups:
        group["params"] = []
    try:
        inner.state_dict()
        empty = "saves"
    except AssertionError:
        empty = "cannot be saved"
    return f"fresh {fresh}, empty {empty}, step {counted}"


def te_version() -> str:
    from megatron.core.utils import is_te_min_version

    try:
        return "missing" if not is_te_min_version("2.1.0") else "there"
    except TypeError:
        return "TypeError"


def classes_in_checkpoints() -> str:
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    weight = torch.nn.Parameter(torch.ones(2))
    classes = {"cpu_optimizer_cls": torch.optim.AdamW, "gpu_optimizer_cls": torch.optim.AdamW}
    inner = HybridDeviceOptimizer([weight], **classes, pin_cpu_grads=False, overlap_cpu_optimizer_d2h_h2d=False)
    (group,) = inner.state_dict()["param_groups"]
    return "saved" if any(isinstance(value, type) for value in group.values()) else "works"


class Says:
    """Pickled, it is a call of print."""

    def __reduce__(self) -> tuple:
        return print, ("the file was run",)


def closed_pickles() -> str:
    """What torch's own reader does with a `.metadata` that names a function."""
    import contextlib
    import io
    import pickle

    from torch.distributed.checkpoint import FileSystemReader

    out = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(out):
        with open(os.path.join(folder, ".metadata"), "wb") as file:
            pickle.dump(Says(), file)
        try:
            FileSystemReader(folder).read_metadata()
        except pickle.UnpicklingError as refused:
            return str(refused)
        except AttributeError:  # what print returned is no metadata
            pass
    return out.getvalue().strip()


def main() -> None:
    guarded = "--guarded" in sys.argv
    if guarded:
        from slime.compat.megatron import prepare

        prepare()
        found = {"router_gating": router_gating(), "split_sizes": split_sizes(), "rng_restore": rng_restore()}
    else:
        from slime.compat.megatron import host_build

        host_build.install()
        found = {
            "router_gating": router_gating(),
            "split_sizes": split_sizes(),
            "rng_restore": rng_restore(),
            "rng_noise": rng_noise(),
        }
    found["te_version"] = te_version()
    found["classes_in_checkpoints"] = classes_in_checkpoints()
    found["results_queue"] = results_queue()
    found["closed_pickles"] = closed_pickles()
    found["adam_steps"] = adam_steps(guarded)
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
