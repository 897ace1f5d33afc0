"""What every device offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor


@dataclass(frozen=True)
class MemoryUse:
    """Bytes, of this process unless said otherwise."""

    used: int
    """Held by live tensors (cuda) or resident (host)."""
    peak: int
    """Largest `used` since start or the last `reset_peak`."""
    peak_reserved: int
    """The same of what the allocator holds, blocks that it caches included (host: as `peak`)."""
    free: int
    """Free on the whole device, other processes included."""
    total: int

    def __str__(self) -> str:
        return (
            f"{self.used / 2**30:.2f} GiB used, peak {self.peak / 2**30:.2f}, {self.free / 2**30:.2f} of "
            f"{self.total / 2**30:.2f} free"
        )


@dataclass(frozen=True)
class SleepReport:
    """What one sleep or wake did."""

    nbytes: int
    seconds: float
    note: str


class Device(ABC):
    """One kind of machine. `kind` is "cuda" or "host"; `backend` the torch.distributed backend; `reason` why it was chosen."""

    kind: str
    backend: str
    reason: str
    default_params_dtype: torch.dtype
    default_params_dtype_reason: str

    @property
    @abstractmethod
    def torch_device(self) -> torch.device:
        """Where this rank's tensors live."""

    @abstractmethod
    def init_process(self, local_rank: int) -> None:
        """Bind this process to its device; before the first tensor and the first collective."""

    @abstractmethod
    def memory(self) -> MemoryUse:
        """Memory now."""

    @abstractmethod
    def reset_peak(self) -> None:
        """Let `peak` count from here."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Return cached blocks to the device, so that another process can have them."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all work that this process queued."""

    @abstractmethod
    def sleep(self, tensors: Mapping[str, Tensor], *, unread: Mapping[str, Tensor] = MappingProxyType({})) -> SleepReport:
        """Move the storages of `tensors` out of the device's memory; the tensors must not be used until `wake`.

        Tensors that share a storage are moved once, together with every other view of it. `unread` are tensors whose values
        nobody will read: their memory is given up without a copy, and they wake with any content.
        """

    @abstractmethod
    def wake(self) -> SleepReport:
        """Bring back everything that `sleep` moved, to the same tensor objects."""

    @abstractmethod
    def share(self, value: object) -> bytes:
        """Pickle tensors (or a container of them) for a process on the same machine.

        cuda: CUDA IPC handles, no copy; the sender keeps the tensors alive until the receiver has answered. host: the bytes
        themselves.
        """
