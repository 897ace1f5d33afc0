"""The CPU as the device: gloo, float32, nothing to sleep."""

from __future__ import annotations

import ctypes
import io
import os
import pickle
import resource
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from slime.device.base import Device, MemoryUse, SleepReport


class HostDevice(Device):
    kind = "host"
    backend = "gloo"
    reason = "torch sees no CUDA device"
    default_params_dtype = torch.float32
    default_params_dtype_reason = "bf16 matrix products are slower than float32 on CPUs, and gloo sums them at the same price"

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    def init_process(self, local_rank: int) -> None:
        """Threads stay as OMP_NUM_THREADS says: one per rank unless the user knows better."""
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)

    def memory(self) -> MemoryUse:
        page = os.sysconf("SC_PAGE_SIZE")
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[1]) * page
        peak = max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, used)
        return MemoryUse(
            used=used,
            peak=peak,
            peak_reserved=peak,
            free=os.sysconf("SC_AVPHYS_PAGES") * page,
            total=os.sysconf("SC_PHYS_PAGES") * page,
        )

    def reset_peak(self) -> None:
        """Linux forgets the high-water mark of resident memory; a sandbox that forbids it leaves `peak` counting from start.

        What was freed is given back first, or an earlier peak would stay in every later one.
        """
        self.empty_cache()
        try:
            with open("/proc/self/clear_refs", "w") as kernel:
                kernel.write("5")
        except OSError:
            pass

    def empty_cache(self) -> None:
        """glibc keeps most of what is freed for later; other libraries are left to themselves."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    def synchronize(self) -> None:
        """Every operation is complete when it returns."""

    def sleep(self, tensors: Mapping[str, Tensor], *, unread: Mapping[str, Tensor] = MappingProxyType({})) -> SleepReport:
        return SleepReport(
            0, 0.0, "host: trainer and engines share the machine's memory, so there is nowhere to move weights to"
        )

    def wake(self) -> SleepReport:
        return SleepReport(0, 0.0, "host: nothing slept")

    def share(self, value: object) -> bytes:
        # torch's own reduction would pass file descriptors, which only a child process can receive.
        buffer = io.BytesIO()
        _PlainPickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
        return buffer.getvalue()


class _PlainPickler(pickle.Pickler):
    """Plain pickle; a view is copied first, or the whole storage behind it would travel."""

    def reducer_override(self, value: object):
        if isinstance(value, Tensor) and value.untyped_storage().nbytes() != value.numel() * value.element_size():
            return value.detach().clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented
