"""Whatever is unpickled goes through a closed list of classes: a file may hold values, and never names code to run.

Checkpoints, dumps of rollouts and data positions are files that travel. Python's pickle calls whatever a file names; torch's
distributed checkpoints read their metadata and their small objects that way, whatever `weights_only` says elsewhere.
"""

from __future__ import annotations

import enum
import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

_METADATA = {
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict", "defaultdict"),
    "builtins": ("set", "frozenset", "complex", "bytearray"),
}  # fmt: skip
"""What `.metadata` of a torch_dist checkpoint is made of, ours and Megatron-LM's."""


class ClosedUnpickler(pickle.Unpickler):
    """Knows the classes of checkpoint metadata, torch's types, and those below `rooms`. Others: UnpicklingError."""

    def __init__(self, stream: IO[bytes], *, rooms: Sequence[str] = ()) -> None:
        super().__init__(stream)
        self._rooms = tuple(f"{room}." for room in rooms)

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if (module, name) == ("builtins", "getattr"):
            return _member
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype | torch.layout)):
            return getattr(torch, name)
        listed = name in _METADATA.get(module, ())
        # A dotted name would walk from an allowed class to whatever hangs on it.
        if "." in name or not (listed or f"{module}.".startswith(self._rooms or ("\0",))):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no such file needs; nothing of it was run")
        found = super().find_class(module, name)
        if not listed and not (isinstance(found, type) and f"{found.__module__}.".startswith(self._rooms)):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no class of {', '.join(self._rooms)}")
        return found


def _member(owner: object, name: str) -> enum.Enum:
    """What Python below 3.11.4 writes for an enumeration's member is getattr(class, name)."""
    if isinstance(owner, type) and issubclass(owner, enum.Enum) and name in owner.__members__:
        return owner[name]
    raise pickle.UnpicklingError(f"it asks for {name} of {owner}, which is no member of an enumeration; nothing of it was run")


def load_pickle(stream: IO[bytes], *, rooms: Sequence[str] = ()) -> Any:
    """pickle.load by the closed list. rooms: packages of our own whose classes may be named, `slime`."""
    return ClosedUnpickler(stream, rooms=rooms).load()


def value_classes() -> list[Any]:
    """Classes that values in our torch files are made of beyond torch's own list: NumPy's arrays and numbers, and the values
    that a column of a data set may have."""
    import datetime
    import decimal
    import uuid

    import numpy as np
    from numpy._core.multiarray import _reconstruct, scalar

    kinds = [kind for name in dir(np.dtypes) if isinstance(kind := getattr(np.dtypes, name), type)]
    columns = [
        datetime.date,
        datetime.datetime,
        datetime.time,
        datetime.timedelta,
        datetime.timezone,
        decimal.Decimal,
        uuid.UUID,
    ]
    return [
        *columns,
        np.ndarray,
        np.dtype,
        _reconstruct,
        scalar,
        *(kind for kind in kinds if kind is not np.dtypes.ObjectDType),
    ]


def foreign_classes(value: Any) -> list[str]:
    """Classes in `value` that `load_values` would refuse, so that a save can say so while the values are still there."""
    import torch

    torch.serialization.add_safe_globals(value_classes())
    written = io.BytesIO()
    torch.save(value, written)
    written.seek(0)
    return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(written))


def load_values(path: str | Path) -> Any:
    """torch.load of a file of values: containers, numbers, texts, tensors, NumPy's arrays.

    Raises ValueError in one line for a file that is torn, or that names another class; none of it is run.
    """
    import torch

    # For good: torch's context manager would take away at its end what somebody else had added before.
    torch.serialization.add_safe_globals(value_classes())
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torn and foreign files fail in torch, zipfile or pickle, each with its own exception
        raise ValueError(f"{path} cannot be read: {_cause(path, error)}") from None


def _cause(path: str | Path, error: Exception) -> str:
    import torch

    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # not even a list of its classes can be read: it is torn
        foreign = []
    if foreign:
        return f"it names {', '.join(foreign[:3])}, and such a file may hold plain values alone; nothing of it was run"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'the file is cut short'}"


def close_torch_checkpoints() -> None:
    """torch's readers of distributed checkpoints unpickle `.metadata` and small objects by the closed lists."""
    import torch
    from torch.distributed.checkpoint import default_planner, filesystem

    class Pickle:
        """Stands for the module pickle inside torch's reader."""

        load = staticmethod(load_pickle)

        def __getattr__(self, name: str) -> Any:
            return getattr(pickle, name)

    def load_bytes(self: Any, read_item: Any, value: Any) -> None:
        read = torch.load(value, weights_only=True)
        name = read_item.dest_index.fqn
        if self.flatten_state_dict:
            default_planner.set_element(self.original_state_dict, self.mappings[name], read)
        else:
            self.state_dict[name] = read

    torch.serialization.add_safe_globals(value_classes())
    filesystem.pickle = Pickle()
    default_planner.DefaultLoadPlanner.load_bytes = load_bytes
