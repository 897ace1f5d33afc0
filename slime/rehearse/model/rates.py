"""Rates that the prediction of time assumes. Each is printed with the result and replaced with `--rate NAME=VALUE`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

Numbers = TypeVar("Numbers")


@dataclass(frozen=True)
class Gpu:
    """What a kind of GPU has, by its maker's data sheet."""

    memory_gb: float
    peak_tflops: float
    """Dense bf16."""
    hbm_gb_per_s: float
    nvlink_gb_per_s: float
    """One direction."""


GPUS: Mapping[str, Gpu] = {
    "h100": Gpu(80, 989, 3350, 450),
    "h200": Gpu(141, 989, 4800, 450),
    "h800": Gpu(80, 989, 3350, 200),
    "h20": Gpu(96, 148, 4000, 450),
    "b200": Gpu(180, 2250, 8000, 900),
}


@dataclass(frozen=True)
class Rates:
    """Assumed rates. 0 for one that is worked out unless it is given."""

    peak_tflops: float = 989.0
    """Dense bf16 of one GPU (H100 SXM, data sheet)."""
    training_mfu: float = 0.50
    """Share of the peak that a busy stage reaches while it computes: bubbles, imbalance and exchange between GPUs are apart.
    One H200 without such exchange: 0.53 in a step, recomputation counted, 0.56 in log-probs."""
    prefill_mfu: float = 0.30
    """Share of the peak at which engines read prompts."""
    decode_mfu: float = 0.30
    """Share of the peak at which the matrices of a decode step are multiplied."""
    nic_gb_per_s: float = 50.0
    """Network of one GPU (400 Gbit/s)."""
    nvlink_gb_per_s: float = 450.0
    """Between GPUs of a node, one direction (H100 SXM, data sheet)."""
    hbm_gb_per_s: float = 3350.0
    """Memory of one GPU (H100 SXM, data sheet; an H200 has 4,800)."""
    hbm_share: float = 0.7
    """Share of it that a decode step reaches."""
    engine_load_gb_per_s: float = 50.0
    """At which an engine rank loads weights that lie on its GPU (H200, 12 GB in 1,920 tensors, calls of 2 GiB)."""
    sync_steps_s: float = 0.45
    """What engines take around a weight sync: to pause, open the update, prepare what they loaded, and go on (0.35 to 0.5 s of
    the syncs of two models on H200s, SGLang 0.5.23)."""
    host_link_gb_per_s: float = 50.0
    """GPU to main memory (offload, CPU optimizer)."""
    host_optimizer_gb_per_s: float = 100.0
    """Optimizer state that the CPUs of a node update per second: about 1 of a core (15 of 16 beside an H200), of some 100."""
    disk_gb_per_s: float = 10.0
    """Shared file system, all nodes together."""
    decode_layer_us: float = 250.0
    """Kernels of one layer, one after another, whatever the batch. With the next one it puts a single stream of GLM-4.5 355B
    with DeepEP and drafts at the 60 to 70 tokens/s that slime v0.1.0's announcement gives."""
    exchange_latency_us: float = 50.0
    """One exchange between the GPUs of an engine, before the first byte; DeepEP's table has 77 us for a dispatch within a
    node, bytes included."""
    decode_step_ms: float = 0.0
    """One decode step, whatever engine and batch; 0 works it out from them."""
    tokens_per_decode_step: float = 2.5
    """Accepted tokens of speculative decoding; 1 is taken where the engines do not speculate."""
    mean_response_share: float = 0.5
    """Mean response / --rollout-max-response-len."""


def with_rates(rates: Rates, given: Sequence[str]) -> Rates:
    """NAME=VALUE words replace rates. Raises ValueError naming the legal ones."""
    return replaced(rates, given, flag="--rate")


def rates_of(gpu: str | None) -> Rates:
    """Those of a kind of GPU (an H100 unless said)."""
    kind = GPUS[gpu or "h100"]
    return Rates(peak_tflops=kind.peak_tflops, hbm_gb_per_s=kind.hbm_gb_per_s, nvlink_gb_per_s=kind.nvlink_gb_per_s)


def replaced(values: Numbers, words: Sequence[str], *, flag: str) -> Numbers:
    """A dataclass of numbers with NAME=VALUE words in their fields' place. Raises ValueError naming flag and legal names."""
    known = {item.name for item in fields(values)}
    for word in words:
        name, _, value = word.partition("=")
        if name not in known:
            raise ValueError(f"{flag} {word}: legal names are {', '.join(sorted(known))}")
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"{flag} {word}: {value!r} is no number; write {name}=NUMBER") from None
        if not 0 <= number < math.inf:
            raise ValueError(f"{flag} {word}: give a finite number that is not negative")
        # A latency may be 0; what divides may not, nor be so small that its reciprocal is no number.
        if flag == "--rate" and not name.endswith(("_us", "_ms")) and not 1e-9 <= number <= 1e15:
            raise ValueError(f"{flag} {word}: give a number from 1e-9 to 1e15")
        values = replace(values, **{name: number})
    return values


def rates_shown(rates: Rates) -> Mapping[str, float]:
    return {item.name: getattr(rates, item.name) for item in fields(Rates)}
