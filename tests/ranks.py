"""Several gloo ranks in one test: forked from a process that has already imported everything, with a hard time-out.

    def total(rank: int, offset: int) -> float:
        x = torch.tensor([float(rank + offset)])
        dist.all_reduce(x)
        return x.item()

    assert run_ranks(4, total, 10) == [46.0] * 4

`fn(rank, *args)` runs with torch.distributed initialised (gloo over loopback) and may be a closure; its result is pickled.
The first rank to fail ends all others, and its traceback becomes the test's. Each rank leads a process group of its own, so
that helpers it started (checkpoint managers) end with it.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class RankFailed(AssertionError):
    """A rank raised, died or did not finish in time."""


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Run `fn(rank, *args)` on `world` forked gloo ranks and return their results in rank order.

    Raises RankFailed with the traceback of the rank that failed first, or, after `timeout` seconds, with the stacks of the
    ranks that had not finished.
    """
    fork = mp.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        port = _free_port()
        ranks = []
        # A collection in a rank would visit, and so copy, whatever the rank has from this process.
        gc.freeze()
        try:
            for rank in range(world):
                reader, writer = fork.Pipe(duplex=False)
                process = fork.Process(target=_main, args=(rank, world, port, folder, writer, fn, args, timeout), daemon=False)
                process.start()
                writer.close()
                ranks.append((process, reader))
        finally:
            gc.unfreeze()
        try:
            return _collect(ranks, folder, timeout)
        finally:
            for process, reader in ranks:
                _end(process)
                reader.close()


def end_grid() -> None:
    """Within a rank: end megatron-core's grid, if there is one, so that another can be made. Called by all ranks together.

    Each gloo group keeps threads of its own, so the groups go too: a rank that tries ten layouts would otherwise have hundreds.
    """
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return
    parallel_state.destroy_model_parallel()
    dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _main(rank: int, world: int, port: int, folder: str, writer: Any, fn: Callable, args: tuple, timeout: float) -> None:
    os.setpgid(0, 0)
    stacks = open(os.path.join(folder, f"stack-{rank}"), "w")  # noqa: SIM115  (faulthandler needs the file for as long as we live)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
        GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        # A file store: no port to lose between choosing and binding it.
        store = dist.FileStore(os.path.join(folder, "store"), world)
        # Longer than the test waits: where everybody stands is told by `_late`, not by whichever collective gives up first.
        patience = timedelta(seconds=timeout + 30)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience)
        answer = (True, fn(rank, *args))
        dist.barrier()
        dist.destroy_process_group()
        payload = pickle.dumps(answer)
    except BaseException:
        payload = pickle.dumps((False, traceback.format_exc()))
    # Plain pickle: torch's own reduction would hand over file descriptors of a process that is about to end.
    writer.send_bytes(payload)
    writer.close()
    sys.stdout.flush()
    sys.stderr.flush()
    from multiprocessing import util

    util._exit_function()  # os._exit skips it, and it is what ends manager processes of distributed checkpointing
    os._exit(0)


def _collect(ranks: list, folder: str, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(ranks):
        waiting = {reader: rank for rank, (_, reader) in enumerate(ranks) if rank not in results}
        ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(_late(ranks, sorted(waiting.values()), folder, timeout))
        for reader in ready:
            rank = waiting[reader]
            try:
                done, value = pickle.loads(reader.recv_bytes())
            except EOFError:
                ranks[rank][0].join(5)
                raise RankFailed(f"rank {rank} of {len(ranks)} died with exit code {ranks[rank][0].exitcode}") from None
            if not done:
                raise RankFailed(f"rank {rank} of {len(ranks)} failed first:\n{value}")
            results[rank] = value
    for process, _ in ranks:
        process.join(20)
    return [results[rank] for rank in range(len(ranks))]


def _late(ranks: list, late: list[int], folder: str, timeout: float) -> str:
    report = [f"ranks {late} of {len(ranks)} did not finish within {timeout:g} s; where they are:"]
    for rank in late:
        if ranks[rank][0].is_alive():
            os.kill(ranks[rank][0].pid, signal.SIGUSR1)
    time.sleep(0.5)
    for rank in late:
        with open(os.path.join(folder, f"stack-{rank}")) as stack:
            report.append(f"-- rank {rank}\n{stack.read()}")
    return "\n".join(report)


def _end(process: Any) -> None:
    """Kill the rank's whole process group; nothing to do where it left by itself."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.join(5)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
