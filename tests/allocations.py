"""Memory that torch takes from the CPU's allocator, to the byte: a profiler's record of every allocation and release."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(fn: Callable[[], Any]) -> int:
    """The most that fn() held at once beyond what was held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = fn()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    del kept
    return max(accumulate((event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())), initial=0))
