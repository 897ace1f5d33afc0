"""Hugging Face files: read (BF16 or block FP8), load into sharded chunks, save."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from slime.model.coverage import check_files
from slime.model.export import export_weights
from slime.model.hf_config import read_hf_config
from slime.model.hf_headers import INDEX
from slime.model.hf_reader import SafetensorsReader
from slime.model.layout import merge, shard
from slime.model.local import VALUE_HEAD, LocalTensor, check_shapes, local_tensors, split_of
from slime.model.names import Entry, NameTable
from slime.parallel import Ranks

logger = logging.getLogger(__name__)


def load_hf(
    chunks: list[torch.nn.Module],
    table: NameTable,
    reader: SafetensorsReader,
    ranks: Ranks,
    *,
    padded_vocab: int,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Fill this rank's tensors from the HF files; returns how many Megatron tensors were written.

    Reads only what this rank holds, one tensor at a time. FP8 is de-quantised through bf16 for bf16 models, straight to float32
    for float32 ones. Raises ValueError listing tensors that are missing, unexpected, of another shape or unreadable, before
    anything is written. A critic's value head is in no file and stays as it is.
    """
    prove(chunks, table, reader, ranks)
    check_shapes(chunks, table, ranks, padded_vocab)
    todo = [local for local in local_tensors(chunks, ranks) if local.name != VALUE_HEAD]
    for done, local in enumerate(todo):
        _fill(local, table, reader, ranks, padded_vocab)
        if progress is not None:
            progress(done + 1, len(todo))
    return len(todo)


def prove(chunks: list[torch.nn.Module], table: NameTable, reader: SafetensorsReader, ranks: Ranks) -> None:
    """The files hold what these chunks need; see check_files and check_copies."""
    needs_mtp = any(local.name.startswith("mtp.") for local in local_tensors(chunks, ranks, experts=False))
    coverage = check_files(table, reader, needs_mtp=needs_mtp)
    if ranks.rank == 0:
        if coverage.mtp_note:
            logger.info("%s: %s", reader.folder, coverage.mtp_note)
        check_copies(table, reader)
    if needs_mtp and ranks.is_dense_source:
        check_copies(table, reader, mtp=True)


def check_copies(table: NameTable, reader: SafetensorsReader, *, mtp: bool = False) -> None:
    """Copies that some releases store beside their owner must equal it, for the owner alone is loaded. In one process.

    mtp: those of the multi-token-prediction layer too. Raises ValueError naming a copy that differs.
    """
    present = set(reader.names())
    for copy, owner in table.duplicates.items():
        if copy not in present or owner not in present or not (mtp or copy == "lm_head.weight"):
            continue
        first, second = reader.raw(copy), reader.raw(owner)
        if first.dtype != second.dtype or not torch.equal(first, second):
            why = "tie_word_embeddings is true" if copy == "lm_head.weight" else "the layer shares it"
            raise ValueError(
                f"{reader.folder}: {copy} is stored beside {owner}, whose copy it should be ({why}), and differs from it; "
                "a head of its own wants tie_word_embeddings false in config.json"
            )


@torch.no_grad()
def _fill(local: LocalTensor, table: NameTable, reader: SafetensorsReader, ranks: Ranks, padded_vocab: int) -> None:
    entry = table[local.name]
    copy_shard(local.tensor, entry, read_whole(entry, reader, local.tensor.dtype), ranks, padded_vocab=padded_vocab)


def read_whole(entry: Entry, reader: SafetensorsReader, dtype: torch.dtype) -> Tensor:
    """The whole Megatron tensor in `dtype`, unpadded; see SafetensorsReader.read."""
    return merge(entry, [reader.read(tensor, dtype) for tensor in entry.hf]).to(dtype)


def copy_shard(into: Tensor, entry: Entry, whole: Tensor, ranks: Ranks, *, padded_vocab: int) -> None:
    """This rank's part of a whole Megatron tensor."""
    position, size = split_of(entry, ranks)
    into.copy_(shard(entry, whole, position, size, padded_vocab=padded_vocab))


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file that whoever may read the folder's other files may read too: with the mode that the umask gives.

    The library makes its files through a temporary one, which is its owner's alone.
    """
    path.unlink(missing_ok=True)
    path.touch()
    usual = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(tensors, str(path), metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk among others
        raise OSError(f"{path} could not be written ({error})") from None
    path.chmod(usual)


class HfWriter:
    """Writes HF tensors into safetensors files of at most `max_bytes`, then the index; `close` makes the folder valid.

    Files carry temporary names until the number of all files is known; the index is written last. With several writers (one per
    rank, `part` tells them apart, on a file system that all see) each adds its tensors and calls `flush`; `publish` then joins
    them.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int = 5 * 2**30, part: int = 0) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.max_bytes, self.part = max_bytes, part
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._written: list[list[str]] = []
        self._seen: set[str] = set()
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self._seen:
            raise ValueError(f"{name} would be written twice")
        self._seen.add(name)
        tensor = tensor.detach().to("cpu").contiguous()
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self.flush()
        # A view would drag its whole storage into the file, and safetensors refuses shared ones. A view of the trained weights
        # would also change under us if it waited for its file across an optimizer step.
        self._pending[name] = tensor.clone() if tensor.untyped_storage().nbytes() != size else tensor
        self._pending_bytes += size
        self.total_bytes += size

    def flush(self) -> list[tuple[str, list[str]]]:
        """Write what is pending. Returns every file of this writer so far: (temporary name, tensors in it)."""
        if self._pending:
            write_tensors(self._pending, self.folder / self._temporary(len(self._written)))
            self._written.append(list(self._pending))
            self._pending, self._pending_bytes = {}, 0
        return [(self._temporary(number), names) for number, names in enumerate(self._written)]

    def _temporary(self, number: int) -> str:
        return f".writing-{self.part:05d}-{number:05d}.safetensors"

    def close(self, table: NameTable) -> None:
        """Of a single writer: flush and publish."""
        publish(self.folder, self.flush(), self.total_bytes, table)


def publish(folder: str | Path, files: list[tuple[str, list[str]]], total_bytes: int, table: NameTable) -> None:
    """Give temporary files their final names and write the index, in one process, after all are on disk.

    Raises ValueError, with nothing renamed, when a tensor of the table is missing or one came twice. Older weight files go.
    """
    folder = Path(folder)
    names = [name for _, tensors in files for name in tensors]
    if len(set(names)) != len(names):
        raise ValueError(f"written twice: {', '.join(sorted(name for name in set(names) if names.count(name) > 1)[:5])}")
    missing = [name for name in table.hf_names() if name not in set(names)]
    if missing:
        raise ValueError(f"{len(missing)} tensors were never written, e.g. {', '.join(missing[:5])}")
    for old in [*folder.glob("*.safetensors"), folder / INDEX]:
        if not old.name.startswith(".writing-"):
            old.unlink(missing_ok=True)
    weight_map = {}
    for number, (temporary, tensors) in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        os.replace(folder / temporary, folder / final)
        weight_map.update(dict.fromkeys(tensors, final))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    partial = folder / f".{INDEX}"
    partial.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    os.replace(partial, folder / INDEX)


def copy_assets(
    origin: str | Path,
    target: str | Path,
    *,
    config_changes: Mapping[str, object] | None = None,
    quantized: bool = False,
) -> None:
    """Tokenizer, templates, generation config and config.json of `origin`; never weights nor hidden files.

    config.json loses `quantization_config`, unless the weights beside it are `quantized`; `config_changes` are written over the
    fields that it has.
    """
    origin, target = Path(origin), Path(target)
    if origin.resolve() == target.resolve():
        raise ValueError(f"{target} is the checkpoint that is read from; choose another folder to save to")
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(origin.iterdir()):
        weights = path.suffix in (".safetensors", ".bin", ".pt") or path.name == INDEX
        if path.is_file() and not weights and not path.name.startswith(".") and path.name != "config.json":
            shutil.copyfile(path, target / path.name)  # its content alone: a private original makes no private copy
    config = json.loads((origin / "config.json").read_text())
    if not quantized:
        config.pop("quantization_config", None)
    config.update((name, value) for name, value in (config_changes or {}).items() if name in config)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_hf(
    chunks: list[torch.nn.Module],
    table: NameTable,
    ranks: Ranks,
    folder: str | Path,
    *,
    origin: str | Path,
    max_bytes: int = 5 * 2**30,
) -> None:
    """The trained weights as a Hugging Face checkpoint; every rank calls it, on a file system that all of them see.

    Every rank that is the source of weights writes its own files; rank 0 checks the union, numbers them and writes the index.
    `origin`'s tokenizer and config.json come along. Weights have the trained dtype, except that float32 trainers of a bf16
    origin write bf16. Raises ValueError on all ranks when a tensor is missing.
    """
    writer = HfWriter(folder, max_bytes=max_bytes, part=ranks.rank)
    dtype = torch.float32 if read_hf_config(origin).is_float32 else torch.bfloat16
    for group in export_weights(chunks, table, ranks):
        for name, tensor in group:
            writer.add(name, tensor if table.by_hf(name).float32 else tensor.to(dtype))
    parts: list = [None] * ranks.world_size
    dist.all_gather_object(parts, (writer.flush(), writer.total_bytes))
    failure: list[str | None] = [None]
    if ranks.rank == 0:
        try:
            publish(folder, [file for files, _ in parts for file in files], sum(size for _, size in parts), table)
            kept = any(entry.is_mtp for entry in table.entries)
            copy_assets(origin, folder, config_changes=None if kept else {"num_nextn_predict_layers": 0})
        except (OSError, ValueError) as wrong:
            failure = [f"{folder}: {wrong}"]
    dist.broadcast_object_list(failure, src=0)
    if failure[0]:
        raise ValueError(failure[0])


def write_hf(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    origin: str | Path,
    table: NameTable,
    mtp_kept: bool,
    max_bytes: int = 5 * 2**30,
) -> int:
    """A complete HF checkpoint: weights, index, assets. Returns the number of weight bytes.

    mtp_kept: whether `tensors` include the multi-token-prediction layers; if not, config.json stops announcing them.
    """
    writer = HfWriter(folder, max_bytes=max_bytes)
    for name, tensor in tensors:
        writer.add(name, tensor)
    writer.close(table)
    copy_assets(origin, folder, config_changes=None if mtp_kept else {"num_nextn_predict_layers": 0})
    return writer.total_bytes
