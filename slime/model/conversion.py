"""HF files -> this rank's tensors, so that an interrupted conversion goes on where it stopped.

    <save>/.converting/plan.json         what is converted, by which flags and ranks: another plan starts anew
    <save>/.converting/rank_00003.bin    the finished tensors of rank 3, one after another
    <save>/.converting/rank_00003.jsonl  a line for each: name, place, checksum, and the sha256 of the whole tensor

A tensor's line is written after its bytes, and its bytes are compared with the line's checksum before they are taken, so
neither a kill nor a power failure can bring half a tensor back. In memory are the rank's own tensors and one whole HF tensor
(14 bytes per element while FP8 is de-quantised).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from slime.model.dist_reader import TorchDistReader
from slime.model.hf_io import SafetensorsReader, copy_shard, prove, read_whole
from slime.model.local import LocalTensor, check_shapes, local_tensors
from slime.model.names import Entry, NameTable
from slime.parallel import Ranks

WORK = ".converting"


@dataclass(frozen=True)
class TensorRecord:
    """A whole Megatron tensor as the HF files give it, without vocabulary padding. sha256 is of its bytes, row by row."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str
    hf: tuple[str, ...]
    """The HF tensors that it is made of."""


@dataclass(frozen=True)
class Filled:
    """What one rank did."""

    read: int
    """Tensors that came from the HF files."""
    restored: int
    """Tensors that an earlier, interrupted run had finished."""
    records: tuple[TensorRecord, ...]
    """Of the tensors this rank answers for: every tensor of the model is in exactly one rank's, tied copies aside."""


def fill(
    chunks: list[torch.nn.Module],
    table: NameTable,
    reader: SafetensorsReader,
    ranks: Ranks,
    work: Path,
    *,
    padded_vocab: int,
    progress: Callable[[int, int], None] | None = None,
) -> Filled:
    """Fill this rank's tensors from its journal in `work` and, where that ends, from the HF files.

    Raises ValueError listing tensors that are missing, unexpected, of another shape or unreadable, before anything is read.
    """
    prove(chunks, table, reader, ranks)
    check_shapes(chunks, table, ranks, padded_vocab)
    todo = list(local_tensors(chunks, ranks))
    counts = {True: 0, False: 0}
    records = []
    with Journal(work, ranks.rank) as journal:
        for done, local in enumerate(todo):
            restored, record = _fill_one(local, table[local.name], reader, ranks, journal, padded_vocab)
            counts[restored] += 1
            if record is not None:
                records.append(record)
            if progress is not None:
                progress(done + 1, len(todo))
    return Filled(counts[False], counts[True], tuple(records))


@torch.no_grad()
def _fill_one(
    local: LocalTensor, entry: Entry, reader: SafetensorsReader, ranks: Ranks, journal: Journal, padded_vocab: int
) -> tuple[bool, TensorRecord | None]:
    """(came from the journal, record where this rank answers for the tensor)."""
    answers = ranks.is_expert_source if entry.expert is not None else ranks.is_dense_source
    found = journal.take(local.name, local.tensor)
    if found is not None:
        sha256 = found
    else:
        whole = read_whole(entry, reader, local.tensor.dtype)
        sha256 = sha256_of(whole) if answers else ""
        copy_shard(local.tensor, entry, whole, ranks, padded_vocab=padded_vocab)
        journal.note(local.name, local.tensor, sha256)
    if not answers:
        return found is not None, None
    dtype = str(local.tensor.dtype).removeprefix("torch.")
    return found is not None, TensorRecord(entry.name, entry.shape, dtype, sha256, tuple(t.name for t in entry.hf))


class Journal:
    """The finished tensors of one rank, on disk."""

    def __init__(self, work: Path, rank: int) -> None:
        self._lines = work / f"rank_{rank:05d}.jsonl"
        self._data = work / f"rank_{rank:05d}.bin"
        self._known: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Journal:
        for file in (self._data, self._lines):
            file.touch()
        whole = 0
        with open(self._lines, "rb") as lines:
            for line in lines:
                entry = _parsed(line)
                if entry is None:  # the line that was being written when the run ended
                    break
                self._known[entry["name"]] = entry
                whole += len(line)
        end = max((entry["offset"] + entry["bytes"] for entry in self._known.values()), default=0)
        self._to_lines = open(self._lines, "r+b")  # noqa: SIM115  (closed in __exit__)
        self._to_lines.truncate(whole)
        self._to_lines.seek(whole)
        self._to_data = open(self._data, "r+b")  # noqa: SIM115
        self._to_data.seek(end)
        return self

    def __exit__(self, *exc: object) -> None:
        self._to_lines.close()
        self._to_data.close()

    def take(self, name: str, into: Tensor) -> str | None:
        """Fill `into` with the tensor of an earlier run: its sha256 ("" where none was due), or None if there is none, or not
        whole."""
        entry = self._known.get(name)
        if entry is None or entry["shape"] != list(into.shape) or entry["dtype"] != str(into.dtype):
            return None
        target = into if into.is_contiguous() and into.device.type == "cpu" else torch.empty(into.shape, dtype=into.dtype)
        with open(self._data, "rb") as data:
            data.seek(entry["offset"])
            read = data.readinto(bytes_of(target))
        if read != entry["bytes"] or zlib.crc32(bytes_of(target)) != entry["crc32"]:
            return None
        if target is not into:
            into.copy_(target)
        return entry["sha256"]

    def note(self, name: str, tensor: Tensor, sha256: str) -> None:
        """Keep a finished tensor. Raises OSError on a full disk."""
        data = bytes_of(tensor.contiguous().cpu())
        offset = self._to_data.tell()
        self._to_data.write(data)
        self._to_data.flush()
        entry = {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype), "offset": offset,
                 "bytes": data.nbytes, "crc32": zlib.crc32(data), "sha256": sha256}  # fmt: skip
        self._to_lines.write(json.dumps(entry).encode() + b"\n")
        self._to_lines.flush()


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous host tensor, without a copy."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8))


def sha256_of(tensor: Tensor) -> str:
    return hashlib.sha256(bytes_of(tensor.contiguous())).hexdigest()


# --- what is being converted ---


def plan_of(source: Path, flags: list[str], world_size: int) -> dict[str, Any]:
    """What must be the same for finished tensors to be of use: files by size, time and index, flags, ranks."""
    small = ("config.json", "model.safetensors.index.json")
    return {
        "source": str(source.resolve()),
        "files": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(source.glob("*.safetensors"))},
        "index": {n: hashlib.sha256((source / n).read_bytes()).hexdigest() for n in small if (source / n).is_file()},
        "flags": flags,
        "ranks": world_size,
    }


def open_work(save: Path, plan: dict[str, Any]) -> tuple[Path, str]:
    """(work folder, a line on what it holds); a folder of another plan is emptied. In one process, before any `fill`."""
    work = save / WORK
    file = work / "plan.json"
    if not work.is_dir():
        told = ""
    elif (before := _parsed(file.read_bytes() + b"\n") if file.is_file() else None) == plan:
        return work, f"going on with the conversion that was interrupted in {work}"
    else:
        told = f"starting anew: an interrupted conversion in {work} differs in {', '.join(_differences(before, plan))}"
        shutil.rmtree(work)
    work.mkdir(parents=True)
    file.write_text(json.dumps(plan))
    return work, told


def _differences(before: dict[str, Any] | None, plan: dict[str, Any]) -> Iterator[str]:
    if before is None:
        yield "its plan, which is unreadable"
        return
    for key, value in plan.items():
        old = before.get(key)
        if old == value:
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            names = sorted(name for name in {*old, *value} if old.get(name) != value.get(name))
            yield f"source {key} ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''})"
        elif isinstance(value, list) and isinstance(old, list):
            gone, new = (
                [flag for flag in _flags(one) if flag not in _flags(other)] for one, other in ((old, value), (value, old))
            )
            yield f"{key} ({' '.join(gone) or 'none'} -> {' '.join(new) or 'none'})"
        else:
            yield f"{key} ({old} -> {value})"


def _flags(words: list[str]) -> list[str]:
    """Each flag with its values."""
    return [f"--{flag}".strip() for flag in f" {' '.join(words)}".split(" --")[1:]]


# --- what was converted ---


def gather_records(filled: Filled, table: NameTable, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """name -> record of every tensor of the model. Raises ValueError where one is missing or two ranks read it differently."""
    shares: list[tuple[TensorRecord, ...]] = [()] * ranks.world_size
    dist.all_gather_object(shares, filled.records)
    found: dict[str, TensorRecord] = {}
    for record in (record for share in shares for record in share):
        if found.setdefault(record.name, record) != record:
            raise ValueError(f"two ranks read {record.name} differently; does the source change while it is converted?")
    # The multi-token-prediction layer is in the model only where it is trained.
    if absent := [e.name for e in table.entries if e.name not in found and not e.is_mtp]:
        raise ValueError(f"no rank answers for {len(absent)} tensors: {', '.join(absent[:5])}")
    return {name: {key: value for key, value in asdict(found[name]).items() if key != "name"} for name in sorted(found)}


def wrong_tensors(reader: TorchDistReader, tensors: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a torch_dist checkpoint holds otherwise than its conversion read it: one line per tensor, or none."""
    wrong = []
    for name, record in tensors.items():
        if name not in reader:
            wrong.append(f"{name} is not there")
            continue
        tensor = reader.read(name)
        shape, dtype = list(record["shape"]), str(tensor.dtype).removeprefix("torch.")
        tensor = tensor[: shape[0]] if shape else tensor  # a padded vocabulary has more rows
        if list(tensor.shape) != shape or dtype != record["dtype"]:
            wrong.append(f"{name} is {dtype} {list(tensor.shape)} instead of {record['dtype']} {shape}")
        elif sha256_of(tensor) != record["sha256"]:
            wrong.append(f"{name} has other values than {', '.join(record['hf'])} when they were converted")
    return wrong
