"""Read single whole tensors of a torch_dist checkpoint without a process group, whatever layout wrote it."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from slime.model.dist_ckpt import TRACKER, check_description, checkpoint_folder, read_tracker
from slime.model.hf_config import HfConfig

_EXPERT = re.compile(r"^(.*\.mlp\.experts\.linear_fc[12]\.weight)(\d+)$")
_NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state")


class TorchDistReader:
    """Global Megatron names, experts numbered (see slime.model.names). Keeps the last stacked tensor, since its experts come in
    a row."""

    def __init__(self, folder: str | Path, hf: HfConfig | None = None) -> None:
        """folder: a checkpoint, or a folder of them with a tracker. hf: raise ValueError where it holds another model."""
        folder = Path(folder)
        if not (folder / ".metadata").is_file():
            tracker = read_tracker(folder)
            if tracker is None:
                raise ValueError(
                    f"{folder} is neither a torch_dist checkpoint (.metadata) nor a folder of them ({TRACKER} is missing)"
                )
            folder = checkpoint_folder(folder, tracker)
        self.folder = folder
        if hf is not None:
            check_description(hf, folder)
        self._storage = dcp.FileSystemReader(str(folder))
        stored = self._storage.read_metadata().state_dict_metadata
        self._sizes = {
            name: meta
            for name, meta in stored.items()
            if isinstance(meta, TensorStorageMetadata) and not name.startswith(_NOT_WEIGHTS)
        }
        self._kept: tuple[str, Tensor] | None = None

    def names(self) -> list[str]:
        return list(self._sizes)

    def __contains__(self, name: str) -> bool:
        return self._key(name)[0] in self._sizes

    def read(self, name: str) -> Tensor:
        """The whole tensor, in the dtype it was saved in."""
        key, expert = self._key(name)
        if self._kept is None or self._kept[0] != key:
            meta = self._sizes[key]
            self._kept = (key, self._load(key, torch.empty(meta.size, dtype=meta.properties.dtype)))
        return self._kept[1] if expert is None else self._kept[1][expert]

    def _load(self, key: str, into: Tensor) -> Tensor:
        dcp.load({key: into}, storage_reader=self._storage, no_dist=True)
        return into

    @staticmethod
    def _key(name: str) -> tuple[str, int | None]:
        match = _EXPERT.match(name)
        return (match.group(1), int(match.group(2))) if match else (name, None)
