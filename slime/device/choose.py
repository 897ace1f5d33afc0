"""Which device this process uses; decided once."""

from __future__ import annotations

import functools

import torch

from slime.device.base import Device


@functools.cache
def get_device() -> Device:
    """cuda where torch sees a CUDA device, otherwise host; the same object at every call."""
    if torch.cuda.is_available():
        from slime.device.cuda import CudaDevice

        return CudaDevice()
    from slime.device.host import HostDevice

    return HostDevice()
