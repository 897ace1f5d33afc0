"""NVIDIA GPUs: NCCL, bf16, sleep to pinned host memory, CUDA IPC."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from types import MappingProxyType

import torch
from torch import Tensor

from slime.device.base import Device, MemoryUse, SleepReport


@dataclass(frozen=True)
class _Asleep:
    """A storage without memory, and where its bytes are (None: they need not come back)."""

    storage: torch.UntypedStorage
    nbytes: int
    kept: Tensor | None


class CudaDevice(Device):
    kind = "cuda"
    backend = "nccl"
    default_params_dtype = torch.bfloat16
    default_params_dtype_reason = "tensor cores: bf16 parameters and activations, float32 main parameters and gradients"

    def __init__(self) -> None:
        self.reason = f"torch sees {torch.cuda.device_count()} CUDA device(s), {torch.cuda.get_device_name(0)}"
        self._asleep: dict[int, _Asleep] = {}

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def init_process(self, local_rank: int) -> None:
        """With one visible device per process (how Ray starts actors) that device is number 0 whatever the local rank."""
        visible = torch.cuda.device_count()
        if visible == 0:
            raise ValueError(f"local rank {local_rank}: no CUDA device is visible to this process; check CUDA_VISIBLE_DEVICES")
        if visible > 1 and local_rank >= visible:
            raise ValueError(
                f"local rank {local_rank}, but only {visible} CUDA devices are visible; start at most {visible} ranks here"
            )
        torch.cuda.set_device(local_rank if visible > 1 else 0)

    def memory(self) -> MemoryUse:
        free, total = torch.cuda.mem_get_info()
        return MemoryUse(
            used=torch.cuda.memory_allocated(),
            peak=torch.cuda.max_memory_allocated(),
            peak_reserved=torch.cuda.max_memory_reserved(),
            free=free,
            total=total,
        )

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def empty_cache(self) -> None:
        # Shared memory that its receivers have let go of is cached only after it was collected.
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def sleep(self, tensors: Mapping[str, Tensor], *, unread: Mapping[str, Tensor] = MappingProxyType({})) -> SleepReport:
        begin = time.monotonic()
        torch.cuda.synchronize()
        falling_asleep = []
        for copied, group in ((True, tensors), (False, unread)):
            for tensor in group.values():
                storage = tensor.untyped_storage()
                nbytes = storage.nbytes()
                # Views of one storage share the StorageImpl: its address is the identity, the data pointer may be reused.
                if storage.device.type != "cuda" or nbytes == 0 or storage._cdata in self._asleep:
                    continue
                kept = None
                if copied:
                    kept = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
                    kept.copy_(_bytes_of(storage, tensor.device), non_blocking=True)
                self._asleep[storage._cdata] = _Asleep(storage, nbytes, kept)
                falling_asleep.append(storage)
        # The copies must have ended before their sources are freed.
        torch.cuda.synchronize()
        moved = sum(storage.nbytes() for storage in falling_asleep)
        for storage in falling_asleep:
            storage.resize_(0)
        self.empty_cache()
        return SleepReport(moved, time.monotonic() - begin, "cuda: storages moved to pinned host memory")

    def wake(self) -> SleepReport:
        begin = time.monotonic()
        torch.cuda.ipc_collect()
        for one in self._asleep.values():
            one.storage.resize_(one.nbytes)
            if one.kept is not None:
                _bytes_of(one.storage, one.storage.device).copy_(one.kept, non_blocking=True)
        torch.cuda.synchronize()
        moved = sum(one.nbytes for one in self._asleep.values())
        self._asleep.clear()
        return SleepReport(moved, time.monotonic() - begin, "cuda: storages back on the device")

    def share(self, value: object) -> bytes:
        # Importing the reductions registers them with ForkingPickler; a CUDA tensor then becomes its IPC handle.
        import torch.multiprocessing.reductions  # noqa: F401

        # A sender notices only here that receivers have let go of what it shared before; buckets would pile up until the end.
        torch.cuda.ipc_collect()

        buffer = io.BytesIO()
        ForkingPickler(buffer).dump(value)
        return buffer.getvalue()


def _bytes_of(storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (storage.nbytes(),), (1,))
