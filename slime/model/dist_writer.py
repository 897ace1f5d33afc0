"""Files of a torch_dist checkpoint, written by processes of their own while this one goes on.

One process per file is forked from the rank. The fork is the snapshot: it sees the tensors as they were at that moment,
whatever training does to them afterwards (device tensors and memory shared with other processes are copied first). A process
that is killed is noticed at once, and none outlives its rank.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import time
import zlib
from multiprocessing.connection import Connection
from pathlib import Path

from torch import Tensor

from slime.compat.megatron import prepare
from slime.observability.memory_kills import BY_THE_KERNEL, killed_for_memory

prepare()

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest  # noqa: E402
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync  # noqa: E402

FileSum = tuple[int, int | None]
"""(bytes, crc32); no checksum where none was asked for."""

_PR_SET_PDEATHSIG = 1


def crc32_of(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            value = zlib.crc32(block, value)
    return value


class Writing:
    """One rank's share of a save: `done` may be asked at any time, `collect` waits, `finish` is collective and comes last."""

    def __init__(self, request: AsyncRequest, *, checksums: bool) -> None:
        """Starts the writers. request: what megatron-core planned for this rank (`async_sharded_save=True`)."""
        self._finalize = request.finalize_fns
        self._results = None
        self._writers: list[tuple[str, multiprocessing.Process, Connection]] = []
        if request.async_fn is None:
            return
        transforms = request.async_fn.args[0]
        _, planned, self._results = request.async_fn_args
        buckets = [_staged(bucket) for bucket in request.preload_fn()]
        try:
            self._start(transforms, buckets, checksums)
        except BaseException:
            self.stop()
            raise
        # megatron-core counts the buckets later on, but their tensors now live in the writers alone.
        for _, _, (_, tensors) in planned:
            tensors.clear()

    def _start(self, transforms: list, buckets: list, checksums: bool) -> None:
        fork, self._began = multiprocessing.get_context("fork"), time.monotonic()
        collects = gc.isenabled()
        # A collection in the child would free device tensors that belong to this process.
        gc.disable()
        try:
            for bucket in buckets:
                reader, writer = fork.Pipe(duplex=False)
                arguments = (transforms, bucket, checksums, writer, os.getpid())
                process = fork.Process(target=_write, args=arguments, daemon=True)
                process.start()
                writer.close()
                self._writers.append((Path(bucket[0]).name, process, reader))
        finally:
            if collects:
                gc.enable()

    def _killed(self, writer: multiprocessing.process.BaseProcess) -> bool:
        return writer.exitcode == -signal.SIGKILL and bool(killed_for_memory([writer.pid], since=self._began))

    def done(self) -> bool:
        """Every writer of this rank has answered or ended."""
        return all(reader.poll() for _, _, reader in self._writers)

    def collect(self) -> dict[str, FileSum]:
        """Wait for this rank's files. Raises OSError or RuntimeError with what stopped a writer."""
        results, sums, failure = {}, {}, None
        for number, (name, process, reader) in enumerate(self._writers):
            try:
                answer, file_sum = reader.recv()
            except EOFError:
                process.join()
                why = f" (killed{BY_THE_KERNEL})" if self._killed(process) else ""
                told = f"ended with exit code {process.exitcode}{why} before the file was whole"
                answer, file_sum = RuntimeError(f"the process that wrote {name} {told}"), None
            process.join()
            reader.close()
            if isinstance(answer, Exception):
                failure = failure or answer
            results[number], sums[name] = answer, file_sum
        self._writers = []
        if failure is not None:
            raise failure
        if self._results is not None:
            self._results.put(results)
        return sums

    def finish(self) -> None:
        """After every rank's `collect`: rank 0 writes the checkpoint's own metadata. All ranks call it."""
        for step in self._finalize:
            step()

    def stop(self) -> None:
        """End the writers; what they have written is not a checkpoint."""
        for _, process, reader in self._writers:
            process.kill()
            process.join()
            reader.close()
        self._writers = []


def _staged(bucket: tuple) -> tuple:
    path, key, (values, tensors) = bucket
    return path, key, (values, [(item, _private(tensor)) for item, tensor in tensors])


def _private(tensor: Tensor) -> Tensor:
    # A fork shares such memory instead of copying it when someone writes to it.
    return tensor.clone() if tensor.is_shared() or tensor.is_pinned() else tensor


class _Box:
    """Stands for the two queues through which megatron-core's writer reports to the process that started it."""

    value: object = None

    def put(self, value: object) -> None:
        self.value = value

    def get(self) -> None: ...

    def task_done(self) -> None: ...


def _write(transforms: list, bucket: tuple, checksum: bool, answer: Connection, parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    box = _Box()
    FileSystemWriterAsync.write_preloaded_data(
        transforms, 0, bucket, results_queue=box, count_queue=box, use_fsync=True
    )  # fmt: skip
    _, told = box.value
    file_sum = None
    if not isinstance(told, Exception):
        path = Path(bucket[0])
        file_sum = (path.stat().st_size, crc32_of(path) if checksum else None)
    try:
        answer.send((told, file_sum))
    except Exception:  # an exception that cannot be pickled
        answer.send((RuntimeError(f"{type(told).__name__}: {told}"), None))
