"""Versions of the weights in a folder that trainer and engines see: whole checkpoints, or differences to the version before.

    ROOT/weight_v000007/    a Hugging Face checkpoint in the serving format, or, with differences, model-*.safetensors whose
                            tensors are the packed differences (slime.weights.delta), each under the tensor's name
    .../version.json        run, version, base version, encoding, and the digest of every tensor's bytes at this version

A version appears under its name when all of it is on disk. The base of the first one is the serving checkpoint itself.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from slime.model.hf_headers import places
from slime.model.hf_io import SafetensorsReader, copy_assets, write_tensors
from slime.weights.delta import Checksum, Encoding, decode, digest, encode

HEADER = "version.json"


def version_folder(root: str | Path, version: int) -> Path:
    return Path(root) / f"weight_v{version:06d}"


@dataclass(frozen=True)
class Header:
    run: str
    """Versions of another run count anew, from the serving checkpoint."""
    version: int
    base: int | None
    """The version that this one is a difference to, 0 for the serving checkpoint; None for a whole one."""
    encoding: Encoding
    checksum: Checksum
    digests: Mapping[str, str]
    """Of every tensor in the files here, at this version."""
    files: Mapping[str, str]
    """Tensor -> file."""

    @staticmethod
    def read(folder: Path) -> Header:
        """Raises ValueError where there is no such version."""
        try:
            return Header(**json.loads((folder / HEADER).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{folder} is no published version of weights ({error})") from None


def raw_bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()


@dataclass(frozen=True)
class Written:
    """One rank's files of a version."""

    files: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(temporary name, its tensors)"""
    digests: Mapping[str, str] | None = None
    nbytes: int = 0
    """That were written."""
    tensors: int = 0
    """That there are, changed or not."""


class PartWriter:
    """What one rank writes of each version, and, for differences, what it wrote last."""

    def __init__(self, root: str | Path, *, origin: str | Path, part: int, encoding: Encoding | None, checksum: Checksum):
        """origin: the serving checkpoint. part: tells the files of ranks apart. encoding: None writes whole versions."""
        self._root, self._origin, self._part = Path(root), Path(origin), part
        self._encoding, self._checksum = encoding, checksum
        self._last: dict[str, np.ndarray] | None = None

    def write(self, folder: Path, named: Iterable[tuple[str, Tensor]], *, max_bytes: int) -> Written:
        """Into files of about `max_bytes`. Raises ValueError for a tensor that the serving checkpoint has otherwise."""
        files: list[tuple[str, tuple[str, ...]]] = []
        digests: dict[str, str] = {}
        waiting: dict[str, Tensor] = {}
        nbytes = tensors = held = 0

        def flush() -> None:
            if waiting:
                files.append((f".writing-{self._part:05d}-{len(files):05d}.safetensors", tuple(waiting)))
                write_tensors(waiting, folder / files[-1][0])
                waiting.clear()

        for name, tensor in named:
            tensors += 1
            data = raw_bytes(tensor)
            piece = self._piece(name, tensor, data)
            if piece is None:
                continue
            waiting[name], digests[name] = piece, digest(data, self._checksum)
            nbytes += piece.nbytes
            held += piece.nbytes
            if held > max_bytes:
                flush()
                held = 0
        flush()
        return Written(tuple(files), digests, nbytes, tensors)

    def _piece(self, name: str, tensor: Tensor, data: np.ndarray) -> Tensor | None:
        """What goes into the file; None where nothing changed."""
        if self._encoding is None:
            return tensor.detach().to("cpu").contiguous().clone()
        if self._last is None:
            self._last = {}
        old = self._last.get(name)
        if old is None:
            old = self._of_origin(name, tensor)
        self._last[name] = data.copy()
        if np.array_equal(old, data):
            return None
        return torch.frombuffer(bytearray(encode(old, data, self._encoding)), dtype=torch.uint8)

    @cached_property
    def _served(self) -> SafetensorsReader:
        """Reads every header of the serving checkpoint, so it is made once, and only where a difference asks for it."""
        return SafetensorsReader(self._origin)

    def _of_origin(self, name: str, tensor: Tensor) -> np.ndarray:
        stored = self._served.raw(name)
        if stored.dtype != tensor.dtype or stored.shape != tensor.shape:
            raise ValueError(
                f"{self._origin} has {name} as {stored.dtype} {list(stored.shape)}, the trainer sends {tensor.dtype} "
                f"{list(tensor.shape)}: differences need one format; use --update-weight-mode full"
            )
        return raw_bytes(stored)


def publish_version(
    root: str | Path, parts: Iterable[Written], partial: Path, header: Header, *, origin: str | Path, mtp_kept: bool
) -> Path:
    """Rank 0, after all parts are on disk: names, index, header, and the folder under its final name.

    header: `digests` and `files` are filled in here. Whole versions get config and tokenizer of `origin`.
    """
    parts = list(parts)
    names = [tensor for part in parts for _, tensors in part.files for tensor in tensors]
    if len(set(names)) != len(names):
        raise ValueError(f"written twice: {', '.join(sorted(name for name in set(names) if names.count(name) > 1)[:5])}")
    files = [file for part in parts for file in part.files]
    where: dict[str, str] = {}
    for number, (temporary, tensors) in enumerate(files, start=1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        os.replace(partial / temporary, partial / final)
        where.update(dict.fromkeys(tensors, final))
    if header.base is None:
        copy_assets(origin, partial, config_changes=None if mtp_kept else {"num_nextn_predict_layers": 0}, quantized=True)
    total = {"total_size": sum(part.nbytes for part in parts)}
    (partial / "model.safetensors.index.json").write_text(json.dumps({"metadata": total, "weight_map": where}) + "\n")
    digests = {name: value for part in parts for name, value in (part.digests or {}).items()}
    write_whole(partial / HEADER, json.dumps(asdict(header) | {"digests": digests, "files": where}))
    for file in partial.iterdir():
        _sync_file(file)
    target = version_folder(root, header.version)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    _sync_file(Path(root))
    return target


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text + "\n")
    _sync_file(part)
    os.replace(part, path)


def wrong_tensors(folder: str | Path) -> list[str]:
    """Of a whole version, the tensors whose bytes in the folder are not those that the trainer had."""
    header, reader = Header.read(Path(folder)), SafetensorsReader(folder)
    return [name for name, wanted in header.digests.items() if digest(raw_bytes(reader.raw(name)), header.checksum) != wanted]


class LocalCopy:
    """A checkpoint on an engine's node that follows the published differences. Several processes may share it."""

    def __init__(self, folder: str | Path, *, origin: str | Path):
        self.folder, self._origin = Path(folder), Path(origin)
        self._state = self.folder / ".weight_sync" / "state.json"

    def follow(self, root: str | Path, version: int) -> list[int]:
        """Bring the copy to a published version; the versions that were applied.

        Raises ValueError naming version and tensor when a base is missing or a tensor's bytes are not the trainer's.
        """
        if self.folder.resolve() == self._origin.resolve():
            raise ValueError(f"{self.folder} is the serving checkpoint itself, which stays as it is; name another folder")
        with self._locked():
            missing = list(self._missing(Path(root), version))
            for folder, header in reversed(missing):
                if header.base == 0:
                    self._seed()
                self._apply(folder, header)
        return [header.version for _, header in reversed(missing)]

    def _missing(self, root: Path, version: int) -> Iterator[tuple[Path, Header]]:
        """Versions that the copy lacks, the newest first."""
        wanted = version
        while True:
            folder = version_folder(root, wanted)
            header = Header.read(folder)
            if self._has() == (header.run, header.version):
                return
            if header.version != wanted or header.base is None or not header.base < wanted:
                raise ValueError(f"{folder} says version {header.version} on base {header.base}: no difference to an older one")
            yield folder, header
            if header.base == 0:
                return
            if Header.read(version_folder(root, header.base)).run != header.run:
                raise ValueError(f"{folder} rests on version {header.base}, which another run has published")
            wanted = header.base

    def _has(self) -> tuple[str, int] | None:
        try:
            state = json.loads(self._state.read_text())
            return state["run"], state["version"]
        except (OSError, ValueError, KeyError):
            return None

    def _set(self, run: str, version: int | None) -> None:
        write_whole(self._state, json.dumps({"run": run, "version": version}))

    def _seed(self) -> None:
        """The serving checkpoint as it is."""
        self._set("", None)
        for old in self.folder.glob("*"):
            if old.is_file():
                old.unlink()
        for path in sorted(self._origin.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                shutil.copyfile(path, self.folder / path.name)

    def _apply(self, folder: Path, header: Header) -> None:
        # Broken off in the middle it is no version, and the next time begins with the serving checkpoint.
        self._set(header.run, None)
        places = _places(self.folder)
        for file in sorted(set(header.files.values())):
            with safe_open(str(folder / file), "pt") as packed:
                for name in packed.keys():
                    self._change(name, bytes(packed.get_tensor(name).numpy()), places, folder, header)
        self._set(header.run, header.version)

    def _change(
        self, name: str, packed: bytes, places: Mapping[str, tuple[Path, int, int]], folder: Path, header: Header
    ) -> None:
        if name not in places:
            raise ValueError(f"{folder} changes {name}, which {self.folder} does not have")
        path, start, stop = places[name]
        held = np.memmap(path, np.uint8, "r+", offset=start, shape=(stop - start,))
        try:
            new = decode(np.asarray(held), packed, header.encoding)
        except ValueError as error:
            raise ValueError(f"{folder}: the difference of {name}: {error}") from None
        if digest(new, header.checksum) != header.digests[name]:
            raise ValueError(f"{folder}: {name} is not what the trainer had ({header.checksum}); {self.folder} starts anew")
        held[:] = new
        held.flush()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._state.parent.mkdir(parents=True, exist_ok=True)
        with open(self._state.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _places(folder: Path) -> dict[str, tuple[Path, int, int]]:
    """Tensor -> (file, first byte, byte behind it)."""
    return {name: (path, *place) for path in sorted(folder.glob("*.safetensors")) for name, place in places(path).items()}
