"""Headers of safetensors files: which tensor lies in which file, of what type and shape.

No torch and no weights are read, so 744B are looked through in seconds. Whatever is torn is one line with the file, and the
tensor where one is at fault.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

INDEX = "model.safetensors.index.json"
BYTES = {
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U16": 2,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
"""Type in a header -> bytes of one number. Others exist (packed ones too); nothing here reads them."""

_SHOWN = 5
_LFS = b"version https://git-lfs"
# The longest header that the safetensors library takes; a longer one is another kind of file.
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    name: str
    dtype: str
    """As safetensors spells it: BF16, F8_E4M3 ..."""
    shape: tuple[int, ...]
    file: str

    @property
    def num_bytes(self) -> int:
        """0 for a type that nothing here reads."""
        return math.prod(self.shape) * BYTES.get(self.dtype, 0)


def check_start(path: Path) -> tuple[int, int]:
    """(bytes of the file, of its header). Raises ValueError for an empty or torn file, a git-lfs pointer, or another format."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(len(_LFS))
    if start == _LFS:
        raise ValueError(f"{path} is a git-lfs pointer, not the file itself; run git lfs pull there, or download it again")
    if size < 8:
        raise ValueError(f"{path} has {size} bytes and no header; download it again")
    (length,) = struct.unpack("<Q", start[:8])
    if length > _LONGEST_HEADER:
        raise ValueError(f"{path} is no safetensors file (it begins with {start[:8]!r}); download it again")
    if 8 + length > size:
        raise ValueError(f"{path} is cut short: {size} bytes, its header alone needs {8 + length}; download it again")
    return size, length


def read_header(path: Path) -> list[TensorInfo]:
    """What one safetensors file holds. Raises ValueError naming the file, and the tensor, where it is not whole."""
    return _read(path)[0]


def places(path: Path) -> dict[str, tuple[int, int]]:
    """Tensor -> (first byte, byte behind it) in the file. Raises ValueError as `read_header` does."""
    found, spans = _read(path)
    return {tensor.name: span for tensor, span in zip(found, spans, strict=True)}


def _read(path: Path) -> tuple[list[TensorInfo], list[tuple[int, int]]]:
    size, length = check_start(path)
    with open(path, "rb") as file:
        file.seek(8)
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        found = [TensorInfo(name, str(one["dtype"]), tuple(one["shape"]), path.name) for name, one in header.items()]
        spans = [tuple(one["data_offsets"]) for one in header.values()]
        end = max((last for _, last in spans), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: its header is damaged; download it again") from None
    for tensor, (first, last) in zip(found, spans, strict=True):
        if tensor.dtype in BYTES and last - first != tensor.num_bytes:
            raise ValueError(
                f"{path}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}, {tensor.num_bytes} bytes, and has a place of "
                f"{last - first}; download the file again"
            )
    if size != 8 + length + end:
        what = "is cut short" if size < 8 + length + end else "has more than its header says"
        raise ValueError(f"{path} {what}: {size} bytes, its header needs {8 + length + end}; download it again")
    return found, [(8 + length + first, 8 + length + last) for first, last in spans]


def read_index(folder: Path) -> Mapping[str, str] | None:
    """Tensor -> file, as the index says; None without an index. Raises ValueError for one that cannot be read."""
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        listed = json.loads(path.read_bytes())["weight_map"]
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} has no weight_map of tensors to files; download it again") from None
    return listed


def stored_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint folder by name, as the index lists them, each found where it should be.

    Raises ValueError for a file or an index that is torn, a tensor that is not where the index says, or one that comes twice.
    """
    index = read_index(folder)
    names = sorted({*index.values()} if index is not None else {path.name for path in folder.glob("*.safetensors")})
    if not names:
        other = ", ".join(sorted(path.name for path in folder.glob("*.bin"))[:3])
        told = f"{other}: only safetensors are read" if other else "is the download complete?"
        raise ValueError(f"{folder} holds neither {INDEX} nor *.safetensors ({told})")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder / INDEX} names files that are not there: {', '.join(absent[:_SHOWN])} ({len(absent)} in all)"
        )
    found: dict[str, TensorInfo] = {}
    for tensor in (tensor for name in names for tensor in read_header(folder / name)):
        before = found.get(tensor.name)
        if before is not None and (index is None or index.get(tensor.name) not in (before.file, tensor.file)):
            raise ValueError(f"{folder}: {tensor.name} is in {before.file} and in {tensor.file}")
        if before is None or (index is not None and index.get(tensor.name) == tensor.file):
            found[tensor.name] = tensor
    if index is None:
        return found
    misplaced = [
        f"{name} is said to be in {file}, it is in {found[name].file if name in found else 'no file'}"
        for name, file in index.items()
        if name not in found or found[name].file != file
    ]
    if misplaced:
        raise ValueError(f"{folder / INDEX} is wrong about {len(misplaced)} tensors: {'; '.join(misplaced[:_SHOWN])}")
    return {name: found[name] for name in index}
