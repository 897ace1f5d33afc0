"""Proof that names and shapes fit: every tensor of a checkpoint is accounted for exactly once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from slime.model.names import NameTable

_SHOWN = 12


class TensorSource(Protocol):
    """What a checkpoint reader offers here."""

    folder: object

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Coverage:
    """What was compared. `scales`: FP8 scale tensors among the files."""

    tensors: int
    scales: int
    duplicates: int

    def __str__(self) -> str:
        extra = f", {self.duplicates} tied duplicates" if self.duplicates else ""
        return f"{self.tensors} tensors, {self.scales} FP8 scales{extra}: each accounted for once"


def check_files(table: NameTable, source: TensorSource) -> Coverage:
    """Compare a checkpoint's files with the table. Raises ValueError listing missing, unexpected and mis-shaped tensors."""
    present = set(source.names())
    expected = {tensor.name: tensor for tensor in table.hf_tensors()}
    scales = {tensor.scale_name for tensor in expected.values() if tensor.fp8}
    missing = [name for name in expected if name not in present]
    duplicates = present & set(table.duplicates)
    unexpected = sorted(present - set(expected) - scales - duplicates)
    misshaped = [
        f"{name}: file {list(source.shape(name))}, config {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in present and tuple(source.shape(name)) != tensor.shape
    ]
    if missing or unexpected or misshaped:
        parts = [
            f"{len(found)} {kind} tensors: " + "; ".join(found[:_SHOWN]) + (" ..." if len(found) > _SHOWN else "")
            for kind, found in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
            if found
        ]
        raise ValueError(
            f"{source.folder} does not hold the {table.model_type} model its config.json describes:\n  " + "\n  ".join(parts)
        )
    return Coverage(len(expected), len(present & scales), len(duplicates))
