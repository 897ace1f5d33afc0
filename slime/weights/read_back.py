"""Whether an engine holds what was sent: expected values from the wire tensors, and their comparison with what it gives back.

Equal means to the bit. Block FP8 travels as codes and scales and is compared de-quantised in float32, which is what an engine
without FP8 arithmetic holds. An engine answers with the part of its first rank, which is the leading part of a split tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slime.ops.fp8 import dequantize_blockwise, scale_shape

SCALE = "_scale_inv"
TENSOR_VALUES = 2**18
"""Of a larger tensor the leading rows are compared."""
TOTAL_VALUES = 2**24
"""64 MiB in float32; tensors beyond it are not compared, for they travel back as text."""


@dataclass(frozen=True)
class Difference:
    name: str
    largest: float
    """NaN where the engine holds something that is no number."""


@dataclass
class Expected:
    """What the engines must give back after one version: float32 values on the host, per Hugging Face name."""

    block: int
    values: dict[str, Tensor] = field(default_factory=dict)
    sent: int = 0
    """Tensors that were sent, a weight with its scale as one."""
    cut: bool = False
    """Of some the leading rows alone are kept."""
    _kept: int = 0

    def add(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """The tensors of one bucket; a weight and its scale are always in the same one."""
        wire = dict(named)
        for name, tensor in wire.items():
            if name.endswith(SCALE) and name.removesuffix(SCALE) in wire:
                continue
            self.sent += 1
            sample = self._leading(tensor)
            self.cut |= len(sample) < len(tensor)
            if self._kept + sample.numel() > TOTAL_VALUES:
                continue
            self._kept += sample.numel()
            self.values[name] = expected_value(sample, wire.get(f"{name}{SCALE}"), self.block)

    @staticmethod
    def _leading(tensor: Tensor) -> Tensor:
        per_row = max(tensor[0].numel(), 1)
        return tensor[: max(TENSOR_VALUES // per_row, 1)]


def expected_value(sample: Tensor, scale_inv: Tensor | None, block: int) -> Tensor:
    """The leading rows of a wire tensor, with the whole tensor's scale if it is FP8 -> a float32 copy on the host."""
    sample = sample.cpu()
    if scale_inv is None:
        return sample.float().clone()
    tile_rows, _ = scale_shape(sample.shape, block)
    return dequantize_blockwise(sample, scale_inv[:tile_rows].cpu(), block, torch.float32)


def compare(expected: Mapping[str, Tensor], answers: Mapping[str, Tensor], *, num_ranks: int) -> list[Difference]:
    """Every tensor whose answer (see `answered`) is not what was sent, the worst first.

    An engine of `num_ranks` processes may answer with a leading part of at least that share; another shape is a difference
    without end.
    """
    found = []
    for name, answer in answers.items():
        gap = _largest_gap(expected[name], answer, num_ranks)
        if not gap == 0.0:
            found.append(Difference(name, gap))
    return sorted(found, key=lambda difference: (difference.largest == difference.largest, -difference.largest))


def _largest_gap(want: Tensor, got: Tensor, num_ranks: int) -> float:
    fits = got.dim() == want.dim() and all(have <= size for have, size in zip(got.shape, want.shape, strict=True))
    if not fits or got.numel() * num_ranks < want.numel():
        return float("inf")
    part = want[tuple(slice(size) for size in got.shape)]
    return (got - part).abs().max().item()


def answered(answer: list) -> Tensor:
    """An engine's nested lists, None for NaN and infinity, as float32: a list takes eight times the memory."""
    try:
        return torch.tensor(answer, dtype=torch.float32)
    except TypeError:  # JSON has no NaN
        return torch.tensor(_with_nan(answer), dtype=torch.float32)


def _with_nan(answer: list | float | None) -> list | float:
    if isinstance(answer, list):
        return [_with_nan(item) for item in answer]
    return float("nan") if answer is None else answer


@dataclass(frozen=True)
class ReadBack:
    """One engine, compared by name."""

    engine: str
    line: str
    """For the log; "" where nothing came back: SGLang offers it for some models only."""
    complete: bool
    """Every tensor that was sent was compared, with what every rank holds of it."""


def read_back(engine: str, version: int, expected: Expected, answers: Mapping[str, Tensor], *, num_ranks: int) -> ReadBack:
    """Raises RuntimeError naming what the engine holds otherwise than it was sent."""
    if not answers:
        return ReadBack(engine, "", complete=False)
    differences = compare(expected.values, answers, num_ranks=num_ranks)
    if differences:
        shown = ", ".join(f"{item.name} (largest difference {item.largest:.6g})" for item in differences[:5])
        raise RuntimeError(
            f"{engine} does not hold weights v{version} as they were sent: "
            f"{len(differences)} of {len(answers)} tensors differ: {shown}; the engines stay paused. "
            "Look at the engine's log and start the run again: it resumes from the last checkpoint."
        )
    refused, left_out = len(expected.values) - len(answers), expected.sent - len(expected.values)
    rest = [f"{refused} it cannot give back by name"] * bool(refused) + [f"{left_out} beyond the sample"] * bool(left_out)
    line = f"weights v{version}: {len(answers)} of {expected.sent} tensors read back equal from {engine}" + (
        f" ({', '.join(rest)})" if rest else ""
    )
    return ReadBack(engine, line, complete=len(answers) == expected.sent and num_ranks == 1 and not expected.cut)
