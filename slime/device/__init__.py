"""The one room in which machines differ: CUDA GPUs, or the host's CPU.

In: nothing. Out: `get_device()`, chosen once per process. Rooms above receive a `Device` and ask it for the collectives
backend, the default dtype, memory figures and peaks, sleep and wake, and for a tensor's hand-over to another process.
Must never know: models, configs, ranks.
"""

from slime.device.base import Device, MemoryUse, SleepReport
from slime.device.choose import get_device
from slime.device.peaks import Peaks, PhasePeak

__all__ = ["Device", "MemoryUse", "Peaks", "PhasePeak", "SleepReport", "get_device"]
