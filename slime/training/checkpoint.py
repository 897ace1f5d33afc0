"""A training run's whole state on disk: weights, moments, schedule, random streams, data position.

    <save>/iter_0000012/                  torch_dist files (any TP, PP, CP, DP loads them) and slime_manifest.json
    <save>/latest_checkpointed_iteration.txt   "12", replaced atomically after everything else

A save writes into a folder with a temporary name and renames it when every rank has finished, so a folder called iter_* is
whole. The manifest names every file with its size and checksum; a load compares them first and names what is missing or
changed.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from slime.compat.megatron import prepare
from slime.model.dist_ckpt import TRACKER, begin_sharded, checkpoint_folder, read_tracker, write_tracker
from slime.model.dist_writer import FileSum, Writing, crc32_of
from slime.parallel import Ranks

if TYPE_CHECKING:
    from slime.config import Config

prepare()

from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica  # noqa: E402

log = logging.getLogger(__name__)

MANIFEST = "slime_manifest.json"
CHECKSUM_LIMIT = 64 * 2**30
"""Larger checkpoints are compared by size only: reading 10 TB twice would cost more than a torn file is likely."""
_ITERATION = re.compile(r"iter_(\d{7})")
_ASIDE, _REMOVED = ".replaced_", ".removed_"
PINNED = "PINNED"
"""A file of this name in a checkpoint's folder keeps it whatever --keep-checkpoints says."""


@dataclass(frozen=True)
class Flags:
    """Names of the flags that chose a checkpoint, for messages that say which to give instead."""

    load: str
    step: str


LOAD, REFERENCE = Flags("--load", "--ckpt-step"), Flags("--ref-load", "--ref-ckpt-step")
CRITIC = Flags("--critic-load", "--ckpt-step of the critic in --megatron-config-path")
TEACHER = Flags("--opd-teacher-load", "--opd-teacher-ckpt-step")


@dataclass(frozen=True)
class Source:
    """Where a run's first weights come from."""

    kind: Literal["megatron", "hf"]
    folder: Path
    iteration: int | None
    """Rollout that the checkpoint was saved after; None for converted weights (`release`) and HF folders."""
    resumes: bool
    """Optimizer, schedule, random streams and data position continue from it."""
    why: str
    flags: Flags = LOAD
    """The flags that named it."""

    def start_rollout_id(self, given: int | None) -> int:
        """An explicit --start-rollout-id wins; otherwise the rollout after the loaded one."""
        if given is not None:
            return given
        return self.iteration + 1 if self.resumes and self.iteration is not None else 0


def resolve(config: Config) -> Source:
    """--load if it holds a Megatron checkpoint or HF files, else --ref-load, else --hf-checkpoint.

    Only a Megatron checkpoint in --load continues a run (unless --finetune). Raises ValueError naming every place that was
    looked at.
    """
    paths = config.checkpoint
    if paths.load and (found := find_megatron(Path(paths.load), paths.ckpt_step)):
        folder, iteration = found
        resumes = iteration is not None and not paths.finetune
        return Source("megatron", folder, iteration, resumes, f"--load {paths.load}")
    if paths.load and _is_hf(Path(paths.load)):
        return Source("hf", Path(paths.load), None, False, f"--load {paths.load} is an HF folder")
    why = f"--load {paths.load} holds no checkpoint yet, " if paths.load else ""
    if paths.ref_load and (reference := find_weights(Path(paths.ref_load), paths.ref_ckpt_step, REFERENCE)):
        kind, folder = reference
        return Source(kind, folder, None, False, f"{why}so weights come from --ref-load {paths.ref_load}", REFERENCE)
    if paths.ref_load:
        raise ValueError(
            f"{why}and --ref-load {paths.ref_load} has neither {TRACKER} nor a config.json; convert the model first"
        )
    if paths.hf_checkpoint and _is_hf(Path(paths.hf_checkpoint)):
        return Source(
            "hf", Path(paths.hf_checkpoint), None, False, f"{why}so weights come from --hf-checkpoint {paths.hf_checkpoint}"
        )
    raise ValueError(f"{why}no weights to start from: give --load, --ref-load or --hf-checkpoint")


def find_weights(path: Path, step: int | None, flags: Flags = LOAD) -> tuple[Literal["megatron", "hf"], Path] | None:
    """The Megatron iteration in `path`, or `path` itself where it is an HF folder, or None."""
    if found := find_megatron(path, step, flags):
        return "megatron", found[0]
    return ("hf", path) if _is_hf(path) else None


def find_megatron(path: Path, step: int | None, flags: Flags = LOAD) -> tuple[Path, int | None] | None:
    """(folder, iteration or None for `release`): `path` may be a folder of checkpoints or one iter_0000012 itself.

    None where `path` holds no checkpoint at all. Raises ValueError, naming what could be used and how to ask for it, where it
    holds some, but not the one that tracker or `step` name.
    """
    match = _ITERATION.fullmatch(path.name)
    if match and path.is_dir():
        return path, int(match.group(1))
    tracker = read_tracker(path)
    if tracker is None and step is None:
        if any(_ITERATION.fullmatch(folder.name) for folder in path.glob("iter_*")):
            raise ValueError(f"{path} has checkpoints but no {TRACKER}, so none of them is in force; {others(path, flags)}")
        return None
    value = str(step) if step is not None else tracker
    if value != "release" and not value.isdigit():
        raise ValueError(f"{path / TRACKER} says {value!r}, which is neither a number nor 'release'; {others(path, flags)}")
    folder = checkpoint_folder(path, value)
    if not folder.is_dir():
        named = f"{flags.step} {step}" if step is not None else str(path / TRACKER)
        raise ValueError(f"{named} points to {folder}, which does not exist; {others(path, flags)}")
    return folder, None if value == "release" else int(value)


def _is_hf(path: Path) -> bool:
    return (path / "config.json").is_file()


def whole_iterations(path: Path) -> list[int]:
    """Iterations in `path` whose files all have the size that their manifest says, ascending."""
    numbers = [int(match.group(1)) for folder in path.glob("iter_*") if (match := _ITERATION.fullmatch(folder.name))]
    return [n for n in sorted(numbers) if (folder := checkpoint_folder(path, str(n))) and _wrong_sizes(folder) == []]


def _is_unchanged(folder: Path) -> bool:
    manifest = read_manifest(folder)
    return manifest is not None and not wrong_files(folder, manifest)


def others(path: Path, flags: Flags = LOAD, *, but: Path | None = None) -> str:
    """What else in `path` could be used, and the flags or the command that do it: the one that is named passes `verify`.

    but: a checkpoint that is known to be damaged.
    """
    whole = [number for number in whole_iterations(path) if checkpoint_folder(path, str(number)) != but]
    while whole and not _is_unchanged(checkpoint_folder(path, str(whole[-1]))):
        whole.pop()
    told = [f"no {'other ' if but else ''}whole checkpoint is in {path}"]
    if whole:
        numbers = ", ".join(map(str, whole))
        told = [f"whole checkpoints in {path}: {numbers}; to use one: {flags.load} {path} {flags.step} {whole[-1]}"]
    # Left where a save that replaces an iteration was killed between its two renames.
    for old in sorted(path.glob(f"{_ASIDE}iter_*")):
        place = old.with_name(old.name.removeprefix(_ASIDE))
        if not place.exists() and not _wrong_sizes(old):
            told.append(f"the former {place.name} is whole: mv {old} {place}")
    return "; ".join(told)


# --- writing ---


def begin_save(
    root: Path,
    name: str,
    state: Mapping[str, Any],
    ranks: Ranks,
    *,
    tensors: Mapping[str, Any] | None = None,
    keep: int | None = None,
) -> PendingSave:
    """Start to write `state` (a sharded state dict) as it is now: iteration `name`, or `release`. Afterwards it may change.

    Nothing is in force until `finish`. Every rank calls it, and gets the same ValueError if one of them cannot start. On any
    failure (a full disk, a torn write) no checkpoint folder or tracker has changed, and the error names what stays in force.
    tensors: for the manifest, see slime.model.conversion. keep: how many iterations stay when this one is in force; None: all.
    """
    pending = PendingSave(root, name, ranks, tensors, keep)
    need = _bytes_to_write(state)
    pending.together(lambda: _make_room(root, pending.partial, need) if ranks.rank == 0 else None)
    pending.start(state, checksums=need <= CHECKSUM_LIMIT)
    return pending


class PendingSave:
    """A save whose files are being written: nothing of it is in force before `finish`. All methods are collective."""

    def __init__(
        self, root: Path, name: str, ranks: Ranks, tensors: Mapping[str, Any] | None = None, keep: int | None = None
    ) -> None:
        self.root, self.name, self.ranks, self._keep = root, name, ranks, keep
        self._extra = {} if tensors is None else {"tensors": tensors}
        self.final = checkpoint_folder(root, name)
        # A name of its own: writers of a run that was killed may live a moment longer.
        token: list[str] = [secrets.token_hex(4)]
        dist.broadcast_object_list(token, src=0)
        self.partial = root / f".saving_{self.final.name}_{token[0]}"
        self._writing: Writing | None = None
        self._begin = time.monotonic()

    def start(self, state: Mapping[str, Any], *, checksums: bool) -> None:
        def begin() -> None:
            self._writing = begin_sharded(state, self.partial, self.ranks, checksums=checksums)

        self.together(begin)

    def is_written(self) -> bool:
        """Every rank's files are on disk, or will never be; `finish` would not wait. Equal on all ranks."""
        answers = [True] * self.ranks.world_size
        dist.all_gather_object(answers, self._writing.done())
        return all(answers)

    def finish(self) -> Path:
        """Wait for the files of all ranks, then put the checkpoint in force. Raises the same ValueError on every rank."""
        parts = self.together(self._writing.collect)
        self.together(self._writing.finish)
        sums = {name: entry for part in parts for name, entry in part.items()}
        self.together(lambda: self._publish(sums) if self.ranks.rank == 0 else None)
        if self.ranks.rank == 0:
            size = sum(size for size, _ in sums.values())
            log.info("checkpoint %s: %.3f GB in %.1f s", self.final, size / 1e9, time.monotonic() - self._begin)
            if self._keep is not None:
                remove_older(self.root, self._keep)
        return self.final

    def together(self, do: Callable[[], Any]) -> list[Any]:
        """Run `do` on every rank; all results, or the same ValueError everywhere if any rank failed."""
        try:
            answer: tuple[Any, str | None] = (do(), None)
        except (Exception, CheckpointException) as error:  # crosses ranks as text; all of them leave together
            answer = (None, f"{type(error).__name__}: {_root_cause(error)}")
        answers: list[tuple[Any, str | None]] = [(None, None)] * self.ranks.world_size
        dist.all_gather_object(answers, answer)
        failures = [(rank, told) for rank, (_, told) in enumerate(answers) if told]
        if not failures:
            return [value for value, _ in answers]
        if self._writing is not None:
            self._writing.stop()
        # One rank looks at the disk: its free space differs from one moment to the next.
        message = [self._failure(*failures[0]) if self.ranks.rank == 0 else ""]
        dist.broadcast_object_list(message, src=0)
        if self.ranks.rank == 0:
            shutil.rmtree(self.partial, ignore_errors=True)
        raise ValueError(message[0])

    def _failure(self, rank: int, told: str) -> str:
        root, what = self.root, self.name if self.name == "release" else f"iteration {self.name}"
        before = read_tracker(root) if root.is_dir() else None
        force = f"the newest checkpoint stays {checkpoint_folder(root, before)}" if before else "there is no earlier checkpoint"
        free = f"{shutil.disk_usage(root).free / 1e9:.3f} GB free there" if root.is_dir() else "the folder does not exist"
        return f"saving {what} to {root} ({free}) failed on rank {rank} of {self.ranks.world_size}: {told}; {force}"

    def _publish(self, written: Mapping[str, FileSum]) -> None:
        """written: what the writers know of their files; the rest (metadata, common values) is small."""
        partial, final = self.partial, self.final
        files = {str(path.relative_to(partial)): path for path in sorted(partial.rglob("*")) if path.is_file()}
        sums = {name: written.get(name) or (path.stat().st_size, crc32_of(path)) for name, path in files.items()}
        if absent := sorted(set(written) - set(files)):
            raise OSError(f"{', '.join(absent)} vanished from {partial}; do all ranks see the same file system?")
        with open(partial / MANIFEST, "w") as file:
            json.dump({"files": sums, **self._extra}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _stamp_last(partial / MANIFEST, final.parent)
        aside = final.with_name(f"{_ASIDE}{final.name}")
        shutil.rmtree(aside, ignore_errors=True)
        if final.exists():
            final.rename(aside)
        partial.rename(final)
        write_tracker(final.parent, self.name)
        shutil.rmtree(aside, ignore_errors=True)


def _stamp_last(manifest: Path, root: Path) -> None:
    """The newest checkpoint is also the last by its time, where a machine with a clock ahead of this one's wrote those before:
    `remove_older` would take it for the oldest."""
    latest = max((other.stat().st_mtime_ns for other in root.glob(f"iter_*/{MANIFEST}")), default=0)
    if manifest.stat().st_mtime_ns <= latest:
        os.utime(manifest, ns=(latest + 10**9,) * 2)  # some file systems count in seconds


def remove_older(root: Path, keep: int) -> list[Path]:
    """Remove all but the `keep` iterations that were saved last, pinned ones apart; what was removed. Never raises OSError.

    By the time of saving, not by number: a run that went back to iteration 4 is not to lose its 5 to an abandoned 12.
    """
    saved = [folder for folder in root.glob("iter_*") if _ITERATION.fullmatch(folder.name) and (folder / MANIFEST).is_file()]
    saved.sort(key=lambda folder: (folder / MANIFEST).stat().st_mtime_ns, reverse=True)
    removed = [folder for folder in saved[keep:] if not (folder / PINNED).exists()]
    for folder in removed:
        aside = folder.with_name(f"{_REMOVED}{folder.name}")
        try:
            # No half checkpoint under a name that a load would take.
            folder.rename(aside)
            shutil.rmtree(aside)
        except OSError as error:
            log.warning("an older checkpoint could not be removed (%s); remove %s yourself", error, aside)
    if removed:
        log.info("checkpoints removed: %s (--keep-checkpoints %d)", ", ".join(folder.name for folder in removed), keep)
    return removed


def _root_cause(error: BaseException) -> str:
    # megatron-core's own exception lists a rank -> (exception, traceback) table; its last line is the cause.
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    told = lines[-1].strip() if lines else "no message"
    # torch's file writer may swallow the system's reason and report only that its position is wrong: either may come first.
    if any(sign in told for sign in ("inline_container", "unexpected pos", "File too large", "No space left", "Disk quota")):
        return f"a file could not be written to its end, as on a full disk or at a quota ({told})"
    return told


def _bytes_to_write(state: Mapping[str, Any]) -> int:
    own = sum(
        value.data.numel() * value.data.element_size()
        for value in nested_values(dict(state))
        if isinstance(value, ShardedTensor) and value.data is not None and is_main_replica(value.replica_id)
    )
    shares: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(shares, own)
    return sum(shares)


def _make_room(root: Path, partial: Path, need: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for left in (*root.glob(".saving_*"), *root.glob(f"{_REMOVED}*")):
        shutil.rmtree(left)
    free = shutil.disk_usage(root).free
    # 1 MiB for metadata, common state and the manifest.
    need += 2**20
    if need > free:
        lacking = f"{(need - free) / 1e6:.3f} MB more than {root} has free"
        raise OSError(f"it needs {need / 1e9:.3f} GB, {lacking}; make room or change --save")
    partial.mkdir()


# --- reading ---


def verify(folder: Path, ranks: Ranks, flags: Flags = LOAD) -> None:
    """Compare every file with the manifest. Raises the same ValueError on every rank, naming bad files and what to use instead.

    A checkpoint without a manifest (of Megatron itself) is taken as it is, with a note.
    """
    if not (folder / MANIFEST).is_file():
        if ranks.rank == 0:
            log.info("checkpoint %s has no %s: sizes and checksums are not compared", folder, MANIFEST)
        return
    wrong = _wrong_sizes(folder)
    if not wrong:
        wrong = _wrong_sums(folder, ranks)
    if not wrong:
        return
    # One rank reads what else there is, and all say the same.
    told = [f"{'; '.join(wrong[:8])}; {others(folder.parent, flags, but=folder)}" if ranks.rank == 0 else ""]
    dist.broadcast_object_list(told, src=0)
    raise ValueError(f"checkpoint {folder} is damaged: {told[0]}")


@dataclass(frozen=True)
class Manifest:
    """slime_manifest.json."""

    files: dict[str, FileSum]
    """File name -> (bytes, crc32 or None)."""
    tensors: dict[str, dict[str, Any]]
    """Of converted weights: name -> shape, dtype and sha256 of the whole tensor, and the HF tensors in it."""


def read_manifest(folder: Path) -> Manifest | None:
    """None where there is none, or none that can be read."""
    try:
        read = json.loads((folder / MANIFEST).read_text())
        files = {name: (int(size), None if crc is None else int(crc)) for name, (size, crc) in read["files"].items()}
        return Manifest(files, {name: dict(record) for name, record in read.get("tensors", {}).items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def check_manifest(folder: Path) -> str:
    """A line on what was compared, by this process alone. Raises ValueError where a file differs from the manifest."""
    if not (folder / MANIFEST).is_file():
        return f"{folder} has no {MANIFEST}: its files are taken as they are"
    manifest = read_manifest(folder)
    if wrong := [f"{MANIFEST} is damaged"] if manifest is None else wrong_files(folder, manifest):
        raise ValueError(f"checkpoint {folder} is damaged: {'; '.join(wrong[:8])}")
    summed = sum(crc is not None for _, crc in manifest.files.values())
    return f"{folder}: {len(manifest.files)} files as the manifest says, {summed} of them by checksum"


def wrong_files(folder: Path, manifest: Manifest) -> list[str]:
    """What differs from the manifest by name, size or checksum, read by this process alone."""
    return _wrong_sizes(folder) or _changed(folder, list(manifest.files.items()))


def _wrong_sizes(folder: Path) -> list[str]:
    """What differs from the manifest by name or size; a folder without a readable manifest is not whole."""
    if not (folder / MANIFEST).is_file():
        return [f"no {MANIFEST}"]
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{MANIFEST} is damaged"]
    wrong = []
    for name, (size, _) in manifest.files.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != size:
            wrong.append(f"{name} has {path.stat().st_size} bytes instead of {size}")
    return wrong


def _wrong_sums(folder: Path, ranks: Ranks) -> list[str]:
    manifest = read_manifest(folder)
    assert manifest is not None, "sizes are compared first"
    own = _changed(folder, sorted(manifest.files.items())[ranks.rank :: ranks.world_size])
    shares: list[list[str]] = [[]] * ranks.world_size
    dist.all_gather_object(shares, own)
    return [line for share in shares for line in share]


def _changed(folder: Path, files: list[tuple[str, FileSum]]) -> list[str]:
    return [
        f"the content of {name} has changed since it was written"
        for name, (_, crc) in files
        if crc is not None and crc32_of(folder / name) != crc
    ]


# --- random streams ---


def random_state(ranks: Ranks) -> dict[str, ShardedObject]:
    """Every random stream of this rank, as a piece of the checkpoint."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    if torch.get_device_module().is_available() and torch.get_device_module().__name__ != "torch.cpu":
        state["device"] = torch.get_device_module().get_rng_state()
    return {"rng_state": ShardedObject("rng_state", state, (ranks.world_size,), (ranks.rank,), replica_id=0)}


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set this rank's streams to what `random_state` saw."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "device" in state:
        torch.get_device_module().set_rng_state(state["device"])
