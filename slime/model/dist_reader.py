"""Read single whole tensors of a torch_dist checkpoint without a process group, whatever layout wrote it.

The metadata is read once. A tensor is put together from the pieces that ranks wrote, each read from its place in its file; of
stacked experts only the wanted one is touched.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from slime.model.dist_ckpt import TRACKER, check_description, checkpoint_folder, is_foreign, read_metadata, read_tracker
from slime.model.hf_config import HfConfig
from slime.model.names import NameTable

_EXPERT = re.compile(r"^(.*\.mlp\.experts\.linear_fc[12]\.weight)(\d+)$")
_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)\.(.*)$")
_NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state")


def checkpoint_of(folder: str | Path) -> Path:
    """The checkpoint itself: `folder`, or the one that its tracker names. Raises ValueError where there is none."""
    folder = Path(folder)
    if (folder / ".metadata").is_file():
        return folder
    tracker = read_tracker(folder)
    if tracker is None:
        raise ValueError(f"{folder} is neither a torch_dist checkpoint (.metadata) nor a folder of them ({TRACKER} is missing)")
    return checkpoint_folder(folder, tracker)


class TorchDistReader:
    """Global Megatron names, experts numbered (see slime.model.names). Keeps no tensor.

    Checkpoints of Megatron-LM, and of the slime that trains with it, are read under the same names: experts one level deeper,
    layers stacked along a first axis.
    """

    def __init__(self, folder: str | Path, hf: HfConfig | None = None) -> None:
        """folder: a checkpoint, or a folder of them with a tracker. hf: raise ValueError where it holds another model.

        A foreign checkpoint does not say which model it holds: its tensors are compared with the weight table instead, and it
        is refused for a sparse-attention model, whose indexer has its rows in another order there.
        """
        self.folder = folder = checkpoint_of(folder)
        self.is_foreign = hf is not None and not hf.has_indexer and is_foreign(folder)
        if hf is not None and not self.is_foreign:
            check_description(hf, folder)
        metadata = read_metadata(folder)
        self._places = metadata.storage_data
        self._stored = {
            name: meta
            for name, meta in metadata.state_dict_metadata.items()
            if isinstance(meta, TensorStorageMetadata) and not name.startswith(_NOT_WEIGHTS)
        }
        if self.is_foreign:
            self._check_tensors(NameTable.for_model(hf, with_mtp=any(name.startswith("mtp.") for name in self._stored)))

    def _check_tensors(self, table: NameTable) -> None:
        """Every tensor of the model is there with its shape, and there is no other."""
        used, wrong = set(), []
        for entry in table.entries:
            key, index = self._place(entry.name)
            if key not in self._stored:
                wrong.append(f"{entry.name} is not there")
                continue
            used.add(key)
            shape = tuple(self._stored[key].size[len(index) :])
            rows = shape[:1] if entry.split == "vocab" else ()  # a vocabulary is padded
            if shape != entry.shape and not (rows and rows >= entry.shape[:1] and shape[1:] == entry.shape[1:]):
                wrong.append(f"{key} is {list(shape)}, config.json says {list(entry.shape)}")
        tied = {name for name in table.aliases if table.aliases[name] in used}
        wrong += [f"{key} is no tensor of this model" for key in sorted(set(self._stored) - used - tied)]
        if wrong:
            raise ValueError(
                f"{self.folder} does not hold the {table.model_type} model of config.json as Megatron-LM saves it: "
                f"{'; '.join(wrong[:8])}{' ...' if len(wrong) > 8 else ''}"
            )

    def names(self) -> list[str]:
        return list(self._stored)

    def __contains__(self, name: str) -> bool:
        return self._place(name)[0] in self._stored

    def read(self, name: str) -> Tensor:
        """The whole tensor, in the dtype it was saved in.

        In memory are it and, where several ranks wrote it, one of their pieces. Raises ValueError where a piece is missing.
        """
        key, index = self._place(name)
        size = self._stored[key].size
        rest = size[len(index) :]
        found = self._region(
            key, ChunkStorageMetadata(torch.Size([*index, *[0] * len(rest)]), torch.Size([*[1] * len(index), *rest]))
        )
        return found.reshape(rest) if index else found

    def _region(self, key: str, wanted: ChunkStorageMetadata) -> Tensor:
        meta = self._stored[key]
        items = create_read_items_for_chunk_list(key, meta, [wanted])
        if sum(item.lengths.numel() for item in items) != wanted.sizes.numel():
            raise ValueError(f"{self.folder} holds only a part of {key} {list(meta.size)}")
        if len(items) == 1:
            return _narrow(self._piece(items[0].storage_index), items[0].storage_offsets, items[0].lengths)
        into = torch.empty(wanted.sizes, dtype=meta.properties.dtype)
        for item in items:
            piece = _narrow(self._piece(item.storage_index), item.storage_offsets, item.lengths)
            _narrow(into, item.dest_offsets, item.lengths).copy_(piece)
        return into

    def _piece(self, index: MetadataIndex) -> Tensor:
        place = self._places[index]
        path = self.folder / place.relative_path
        try:
            with _Slice(path, place.offset, place.length) as stored:
                return torch.load(stored, map_location="cpu", weights_only=True)
        except (EOFError, OSError, RuntimeError, pickle.UnpicklingError, ValueError) as torn:
            told = str(torn).strip().splitlines()[0] if str(torn).strip() else "its end is missing"
            raise ValueError(f"{path}: {index.fqn} cannot be read ({told}); the file is cut short or damaged") from None

    def _place(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(key, position along its first axes) of a global name; the plain one where it is nowhere."""
        match = _EXPERT.match(name)
        key, index = (match.group(1), (int(match.group(2)),)) if match else (name, ())
        for candidate in (key, key.replace(".mlp.experts.", ".mlp.experts.experts.")):
            if candidate in self._stored:
                return candidate, index
            if self.is_foreign and (layer := _LAYER.match(candidate)):
                stacked = f"{layer.group(1)}{layer.group(3)}"
                if stacked in self._stored:
                    return stacked, (int(layer.group(2)), *index)
        return key, index


def _narrow(tensor: Tensor, offsets: torch.Size, lengths: torch.Size) -> Tensor:
    for axis, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(axis, offset, length)
    return tensor


class _Slice(io.RawIOBase):
    """`length` bytes of a file from `begin`, as a file of its own; torch reads tensors from it without a copy between."""

    def __init__(self, path: Path, begin: int, length: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed in close)
        self._begin, self._length, self._at = begin, length, 0

    def close(self) -> None:
        self._file.close()
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._begin + self._at)
        count = self._file.readinto(view)
        self._at += count
        return count
