"""A step that is not finite, or that jumps, is never skipped silently: step, rank, first bad parameter, samples are named."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from slime.model.local import local_tensors
from slime.parallel import Ranks
from slime.training.spikes import Spikes

log = logging.getLogger(__name__)

TOLD_RANKS = 8  # ranks spelled out in a message; a NaN in a forward pass reaches all of them


class NonFiniteGradient(RuntimeError):
    """A step that could not be taken; every rank raises it together."""


class SpikedStep(RuntimeError):
    """A step that jumped, when no more may be skipped; every rank raises it together."""


@dataclass
class Finding:
    """What one rank saw in one step, before gradients were summed over ranks."""

    rank: int
    parameter: str | None = None
    """First parameter with a NaN or infinity in this rank's own gradient."""
    samples: tuple[int, ...] = ()
    """Samples of the first micro-batch whose loss is not finite."""
    largest: tuple[float, tuple[int, ...]] = (0.0, ())
    """The largest |loss| of a micro-batch, and its samples."""

    @property
    def is_bad(self) -> bool:
        return self.parameter is not None or bool(self.samples)

    def __str__(self) -> str:
        told = []
        if self.samples:
            told.append(f"the loss of samples {list(self.samples[:16])} is not finite")
        if self.parameter:
            told.append(f"first bad gradient: {self.parameter}")
        return f"rank {self.rank}: {'; '.join(told)}"


@dataclass
class Guard:
    """Watches every step. `limit` non-finite steps may be skipped in a run; the next one raises. 0 raises at the first."""

    rank: int
    limit: int
    spikes: Spikes = field(default_factory=lambda: Spikes(None))
    spike_limit: int = 0
    """The same for steps that jump; both kinds are counted together."""
    skipped: int = 0
    """Steps skipped so far."""
    _own: Finding = field(init=False)

    def __post_init__(self) -> None:
        self._own = Finding(self.rank)

    def scan(self, chunks: Sequence[torch.nn.Module], ranks: Ranks) -> None:
        """Look at this rank's gradients before they are summed with others', where the culprit can still be told."""
        self._own = Finding(self.rank, parameter=_first_bad_parameter(chunks, ranks))

    def note_loss(self, losses: Sequence[Tensor], samples: Sequence[tuple[int, ...]]) -> None:
        """losses: one scalar per micro-batch on the last stage; samples: the sample ids of each."""
        for loss, ids in zip(map(float, losses), samples, strict=True):
            if not math.isfinite(loss):
                self._own.samples = ids
                return
            self._own.largest = max(self._own.largest, (abs(loss), ids))

    def allows(self, step: str, figures: Mapping[str, float], all_samples: Sequence[int], device: torch.device) -> bool:
        """True where the step may be taken. Called by all ranks together; all get the same answer or the same error.

        figures: "gradient norm", and others that may spike; equal on all ranks but for rounding. Raises NonFiniteGradient or
        SpikedStep where no (further) skip is allowed.
        """
        grad_norm, jump = figures["gradient norm"], self.spikes.judge(figures)
        bad = torch.tensor([float(self._own.is_bad), float(jump is not None)], device=device)
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        is_bad, jumps = bad.tolist()
        if is_bad or not math.isfinite(grad_norm):
            return self._refuse_non_finite(step, grad_norm, all_samples)
        if jumps:
            return self._refuse_spike(step, jump or "a figure is a spike on another rank", all_samples)
        self.spikes.accept(figures)
        return True

    def _refuse_spike(self, step: str, jump: str, all_samples: Sequence[int]) -> bool:
        largest: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * dist.get_world_size()
        dist.all_gather_object(largest, self._own.largest)
        loss, samples = max(largest)
        message = f"{step}: {jump}; the largest loss of a micro-batch, {loss:.4g}, is that of samples {list(samples[:16])}, "
        message += f"of {len(all_samples)}"
        if self.skipped >= self.spike_limit:
            raise SpikedStep(
                f"{message}; weights are as before this step ({self.skipped} were skipped before, --max-skipped-steps); look "
                "at these samples, lower --lr or raise --skip-spike"
            )
        self._count(message, self.spike_limit)
        return False

    def _refuse_non_finite(self, step: str, grad_norm: float, all_samples: Sequence[int]) -> bool:
        found: list[Finding] = [Finding(-1)] * dist.get_world_size()
        dist.all_gather_object(found, self._own)
        bad_ranks = [finding for finding in found if finding.is_bad]
        told = "; ".join(str(finding) for finding in bad_ranks[:TOLD_RANKS])
        if len(bad_ranks) > TOLD_RANKS:
            told += f"; and {len(bad_ranks) - TOLD_RANKS} more ranks"
        if not told:
            told = "every rank's own gradient is finite, so the sum over ranks overflowed"
        culprits = next((finding.samples for finding in found if finding.samples), tuple(all_samples))
        message = f"{step}: gradient norm {grad_norm}; {told}; samples {list(culprits[:16])}"
        if self.skipped >= self.limit:
            how = (
                "allow some with --no-check-for-nan-in-loss-and-grad"
                if self.limit == 0
                else f"{self.limit} were skipped before, --max-skipped-steps"
            )
            raise NonFiniteGradient(f"{message}; weights are as before this step ({how})")
        self._count(message, self.limit)
        return False

    def _count(self, message: str, limit: int) -> None:
        self.skipped += 1
        if self.rank == 0:
            log.error("%s; step skipped, %d of %d allowed", message, self.skipped, limit)


def _first_bad_parameter(chunks: Sequence[torch.nn.Module], ranks: Ranks) -> str | None:
    """Under its global name, experts one by one."""
    # One sum per buffer: any NaN or infinity survives it, and it needs no memory. Not in float64: torch would first copy the
    # whole buffer to 8 bytes a number. A float32 sum that overflows on finite gradients only leads to the exact look below.
    buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    if all(math.isfinite(float(buffer.grad_data.sum(dtype=torch.float32))) for buffer in buffers):
        return None
    for local in local_tensors(list(chunks), ranks, of=_gradient):
        if local.parameter is not None and not bool(torch.isfinite(local.tensor).all()):
            return local.name
    return None


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    """Its main gradient; of a frozen parameter a zero for every row, so that an expert's is one too."""
    gradient = getattr(parameter, "main_grad", None)
    return parameter.new_zeros(len(parameter)) if gradient is None else gradient
