"""What the rehearsal itself was told; everything else is a flag of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    gpu_memory_gb: float = 80.0
    host_memory_gb: float = 2000.0
    """Main memory of one node (2 TB: the usual size beside eight H100)."""
    checkpoint_index: str | None = None
    hostfile: str | None = None
    head: str | None = None
    """Address of the node that launches, where it is known."""
    engine_version: str | None = None
    length: int | None = None
    """Tokens of the sequence for FLOPs; None takes the longest that the flags allow."""
    rates: tuple[str, ...] = ()
    assume: tuple[str, ...] = ()
    env: Mapping[str, str] | None = None
    """The launcher's environment of the job."""
    build_ranks: bool = True
    quick: bool = False
    """Flags, files, layout and engines alone."""
    weight_map: bool = True
    curves: bool = True
    """What a GPU-hour buys under other flags."""
    gpu: str | None = None
    """Kind of the GPUs, whose rates and memory are taken where nothing else is said."""
    on_its_disks: bool = True
    """The folders of the run are on this machine, where they exist: is there room?"""
    expect_digest: str | None = None
    measured: str | None = None
    """memory.json of a run."""
