"""Proof that names, shapes and formats fit: every tensor of a checkpoint is accounted for exactly once.

The multi-token-prediction (MTP) layer is the one thing that a checkpoint may hold or lack whatever its config.json says:
releases have it, a re-save by transformers or an export of a trained model often has not. Only training it needs it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from slime.model.names import HfTensor, NameTable

_SHOWN = 12
_MTP_LAYER = re.compile(r"(model\.layers\.\d+\.)eh_proj\.weight")


class TensorSource(Protocol):
    """What a checkpoint reader offers here."""

    folder: object

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def fault(self, tensor: HfTensor) -> str | None: ...
    def is_fp8(self, name: str) -> bool: ...
    @property
    def promises_fp8(self) -> bool: ...


@dataclass(frozen=True)
class Coverage:
    """What was compared. `scales`: FP8 scale tensors among the files."""

    tensors: int
    scales: int
    duplicates: int
    mtp_note: str = ""
    """Where config.json and files disagree about the multi-token-prediction layer: what that means."""

    def __str__(self) -> str:
        extra = f", {self.duplicates} tied duplicates" if self.duplicates else ""
        note = f"; {self.mtp_note}" if self.mtp_note else ""
        return f"{self.tensors} tensors, {self.scales} FP8 scales{extra}: each accounted for once{note}"


def mtp_is_absent(table: NameTable, present: set[str]) -> bool:
    """The table has a multi-token-prediction layer of which a checkpoint holds not one tensor."""
    names = [tensor.name for entry in table.entries if entry.is_mtp for tensor in entry.hf]
    return bool(names) and not present.intersection(names)


def unnamed_mtp(table: NameTable, present: set[str]) -> set[str]:
    """Tensors of a multi-token-prediction layer that the table does not have: config.json announces none, or it is MiMo's.

    A layer with an `eh_proj` is one; other layers beyond the last are a mistake of somebody's.
    """
    layers = tuple(match.group(1) for name in present if (match := _MTP_LAYER.fullmatch(name)) and not table.by_hf(name))
    layers += ("model.mtp_layers.",) if table.model_type == "mimo" else ()
    return {name for name in present if layers and name.startswith(layers)}


def check_files(table: NameTable, source: TensorSource, *, needs_mtp: bool = False) -> Coverage:
    """Compare a checkpoint's files with the table; headers alone are read.

    Raises ValueError listing missing, unexpected, mis-shaped and unreadable tensors, and where needs_mtp for a layer that is
    not there.
    """
    present, note = set(source.names()), ""
    expected = {tensor.name: tensor for tensor in table.hf_tensors()}
    if mtp_is_absent(table, present):
        if needs_mtp:
            raise ValueError(
                f"{source.folder} holds no multi-token-prediction layer, though its config.json announces one; leave out "
                "--mtp-num-layers and --enable-mtp-training, or take a checkpoint that has it"
            )
        expected = {tensor.name: tensor for entry in table.entries if not entry.is_mtp for tensor in entry.hf}
        note = "without the multi-token-prediction layer that config.json announces"
    spare = unnamed_mtp(table, present)
    if spare:
        note = f"{len(spare)} tensors of a multi-token-prediction layer that cannot be trained here are left out"
    scales = {tensor.scale_name for tensor in expected.values() if tensor.fp8}
    missing = [name for name in expected if name not in present]
    duplicates = present & set(table.duplicates)
    unexpected = sorted(present - set(expected) - scales - duplicates - spare)
    misshaped, unreadable = [], []
    for name, tensor in expected.items():
        if name not in present:
            continue
        if tuple(source.shape(name)) != tensor.shape:
            misshaped.append(f"{name}: file {list(source.shape(name))}, config {list(tensor.shape)}")
        elif wrong := source.fault(tensor):
            unreadable.append(wrong)
    if source.promises_fp8 and not any(source.is_fp8(name) for name in expected if name in present):
        raise ValueError(
            f"{source.folder}: config.json has a quantization_config of FP8, and no tensor is FP8; remove it beside BF16 "
            "weights, or take the FP8 files"
        )
    found = (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped), ("unreadable", unreadable))
    parts = [
        f"{len(names)} {kind} tensors: " + "; ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
        for kind, names in found
        if names
    ]
    if parts:
        raise ValueError(
            f"{source.folder} does not hold the {table.model_type} model its config.json describes:\n  " + "\n  ".join(parts)
        )
    return Coverage(len(expected), len(present & scales), len(duplicates), note)
