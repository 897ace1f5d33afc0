"""Ranks in processes of their own, which may use CUDA where the test process must stay able to fork.

    results = run_processes(2, fn, *args, folder=tmp_path / "two")        # each rank on its own GPU, over NCCL
    results = run_processes(1, fn, *args, folder=..., on_host=True)       # gloo, no GPU visible

`fn(rank, *args)` is a function of a module; arguments and results travel through files (torch.save), results on the CPU.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_processes(
    world: int, fn: Callable[..., Any], *args: Any, folder: Path, on_host: bool = False, timeout: float = 900.0
) -> list[Any]:
    """The results in rank order; an AssertionError with the end of every rank's output where one fails."""
    folder.mkdir(parents=True)
    job = dict(module=fn.__module__, function=fn.__name__, args=args, world=world, store=str(folder / "store"))
    torch.save(job, folder / "JOB.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if on_host:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(folder), str(rank)], env=environment, stderr=subprocess.PIPE)
        for rank in range(world)
    ]
    try:
        errors = [rank.communicate(timeout=timeout)[1].decode()[-3000:] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(errors)
    return [torch.load(folder / f"RESULT-{rank}.pt", weights_only=False, map_location="cpu") for rank in range(world)]


def _main(folder: Path, rank: int) -> None:
    from slime.compat.megatron import prepare
    from slime.device import get_device

    prepare()  # before arguments are read, whose classes may want megatron-core
    job = torch.load(folder / "JOB.pt", weights_only=False)
    device = get_device()
    device.init_process(rank)
    store = dist.FileStore(job["store"], job["world"])
    dist.init_process_group(device.backend, store=store, rank=rank, world_size=job["world"])
    fn = getattr(importlib.import_module(job["module"]), job["function"])
    torch.save(fn(rank, *job["args"]), folder / f"RESULT-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
