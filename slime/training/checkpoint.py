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
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from slime.compat.megatron import prepare
from slime.model.dist_ckpt import TRACKER, checkpoint_folder, read_tracker, save_sharded, write_tracker
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
    if paths.ref_load and (reference := find_weights(Path(paths.ref_load), paths.ref_ckpt_step)):
        kind, folder = reference
        return Source(kind, folder, None, False, f"{why}so weights come from --ref-load {paths.ref_load}")
    if paths.ref_load:
        raise ValueError(
            f"{why}and --ref-load {paths.ref_load} has neither {TRACKER} nor a config.json; convert the model first"
        )
    if paths.hf_checkpoint and _is_hf(Path(paths.hf_checkpoint)):
        return Source(
            "hf", Path(paths.hf_checkpoint), None, False, f"{why}so weights come from --hf-checkpoint {paths.hf_checkpoint}"
        )
    raise ValueError(f"{why}no weights to start from: give --load, --ref-load or --hf-checkpoint")


def find_weights(path: Path, step: int | None) -> tuple[Literal["megatron", "hf"], Path] | None:
    """The Megatron iteration in `path`, or `path` itself where it is an HF folder, or None."""
    if found := find_megatron(path, step):
        return "megatron", found[0]
    return ("hf", path) if _is_hf(path) else None


def find_megatron(path: Path, step: int | None) -> tuple[Path, int | None] | None:
    """(folder, iteration or None for `release`): `path` may be a folder of checkpoints or one iter_0000012 itself."""
    match = _ITERATION.fullmatch(path.name)
    if match and path.is_dir():
        return path, int(match.group(1))
    tracker = read_tracker(path)
    if tracker is None and step is None:
        return None
    value = str(step) if step is not None else tracker
    if value != "release" and not value.isdigit():
        raise ValueError(f"{path / TRACKER} says {value!r}, which is neither a number nor 'release'; {_others(path)}")
    folder = checkpoint_folder(path, value)
    if not folder.is_dir():
        named = f"--ckpt-step {step}" if step is not None else str(path / TRACKER)
        raise ValueError(f"{named} points to {folder}, which does not exist; {_others(path)}")
    return folder, None if value == "release" else int(value)


def _is_hf(path: Path) -> bool:
    return (path / "config.json").is_file()


def whole_iterations(path: Path) -> list[int]:
    """Iterations in `path` whose files all have the size that their manifest says, ascending."""
    numbers = [int(match.group(1)) for folder in path.glob("iter_*") if (match := _ITERATION.fullmatch(folder.name))]
    return [n for n in sorted(numbers) if (folder := checkpoint_folder(path, str(n))) and _wrong_sizes(folder) == []]


def _others(path: Path) -> str:
    whole = whole_iterations(path)
    if not whole:
        return f"no whole checkpoint is in {path}"
    return f"whole checkpoints in {path}: {', '.join(map(str, whole))}; continue from one with --ckpt-step {whole[-1]}"


# --- writing ---


def save(root: Path, iteration: int, state: Mapping[str, Any], ranks: Ranks) -> Path:
    """Write `state` (a sharded state dict) as iteration `iteration`. Every rank calls it and gets the folder, or the same
    ValueError.

    On any failure (a full disk, a torn write) nothing named iter_* or the tracker has changed, and the error names the
    checkpoint that stays in force.
    """
    begin = time.monotonic()
    final, partial = checkpoint_folder(root, str(iteration)), root / f".saving_iter_{iteration:07d}"
    need = _bytes_to_write(state)
    _together(lambda: _make_room(root, partial, need) if ranks.rank == 0 else None, root, iteration)
    _together(lambda: save_sharded(state, partial, ranks), root, iteration, clean=partial)
    sums = _together(lambda: _checksums(partial, ranks), root, iteration, clean=partial)
    _together(lambda: _publish(root, partial, final, sums) if ranks.rank == 0 else None, root, iteration, clean=partial)
    if ranks.rank == 0:
        size = sum(entry[0] for part in sums for entry in part.values())
        log.info("checkpoint %s: %.3f GB in %.1f s", final, size / 1e9, time.monotonic() - begin)
    return final


def _together(do: Callable[[], Any], root: Path, iteration: int, *, clean: Path | None = None) -> list[Any]:
    """Run `do` on every rank; all results, or the same ValueError everywhere if any rank failed."""
    try:
        answer: tuple[Any, str | None] = (do(), None)
    except (Exception, CheckpointException) as error:  # crosses ranks as text; all of them leave together
        answer = (None, f"{type(error).__name__}: {_root_cause(error)}")
    answers: list[tuple[Any, str | None]] = [(None, None)] * dist.get_world_size()
    dist.all_gather_object(answers, answer)
    failures = [(rank, told) for rank, (_, told) in enumerate(answers) if told]
    if not failures:
        return [value for value, _ in answers]
    if clean is not None and dist.get_rank() == 0:
        shutil.rmtree(clean, ignore_errors=True)
    rank, told = failures[0]
    before = read_tracker(root) if root.is_dir() else None
    force = f"the newest checkpoint stays {checkpoint_folder(root, before)}" if before else "there is no earlier checkpoint"
    free = f"{shutil.disk_usage(root).free / 1e9:.3f} GB free there" if root.is_dir() else "the folder does not exist"
    raise ValueError(
        f"saving iteration {iteration} to {root} ({free}) failed on rank {rank} of {len(answers)}: {told}; {force}"
    )


def _root_cause(error: BaseException) -> str:
    # megatron-core's own exception lists a rank -> (exception, traceback) table; its last line is the cause.
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    told = lines[-1].strip() if lines else "no message"
    # torch's file writer may swallow the system's reason and report only that its position is wrong; which of the two comes first is chance.
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
    for left in root.glob(".saving_iter_*"):
        shutil.rmtree(left)
    free = shutil.disk_usage(root).free
    # 1 MiB for metadata, common state and the manifest.
    if need + 2**20 > free:
        raise OSError(f"it needs {need / 1e9:.3f} GB, and {root} has {free / 1e9:.3f} GB free; make room or change --save")
    partial.mkdir()


def _checksums(folder: Path, ranks: Ranks) -> dict[str, tuple[int, int | None]]:
    """{file: (bytes, crc32)} of this rank's share of the files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    count = sum(path.stat().st_size for path in files) <= CHECKSUM_LIMIT
    return {
        str(path.relative_to(folder)): (path.stat().st_size, _crc32(path) if count else None)
        for path in files[ranks.rank :: ranks.world_size]
    }


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            value = zlib.crc32(block, value)
    return value


def _publish(root: Path, partial: Path, final: Path, sums: list[dict[str, tuple[int, int | None]]]) -> None:
    manifest = {"files": {name: list(entry) for part in sums for name, entry in sorted(part.items())}}
    with open(partial / MANIFEST, "w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    aside = root / f".replaced_{final.name}"
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    partial.rename(final)
    write_tracker(root, str(int(_ITERATION.fullmatch(final.name).group(1))))
    shutil.rmtree(aside, ignore_errors=True)


# --- reading ---


def verify(folder: Path, ranks: Ranks) -> None:
    """Compare every file with the manifest. Raises the same ValueError on every rank, naming bad files and what to use instead.

    A checkpoint without a manifest (Megatron's own, or a converter's) is taken as it is, with a note.
    """
    if not (folder / MANIFEST).is_file():
        if ranks.rank == 0:
            log.info("checkpoint %s has no %s: sizes and checksums are not compared", folder, MANIFEST)
        return
    wrong = _wrong_sizes(folder)
    if not wrong:
        wrong = _wrong_sums(folder, ranks)
    if wrong:
        raise ValueError(f"checkpoint {folder} is damaged: {'; '.join(wrong[:8])}; {_others(folder.parent)}")


def _manifest(folder: Path) -> dict[str, list[int | None]]:
    try:
        return json.loads((folder / MANIFEST).read_text())["files"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error}); {_others(folder.parent)}") from error


def _wrong_sizes(folder: Path) -> list[str]:
    """What differs from the manifest by name or size; a folder without a readable manifest is not whole."""
    if not (folder / MANIFEST).is_file():
        return [f"no {MANIFEST}"]
    wrong = []
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (ValueError, KeyError):
        return [f"{MANIFEST} is damaged"]
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != size:
            wrong.append(f"{name} has {path.stat().st_size} bytes instead of {size}")
    return wrong


def _wrong_sums(folder: Path, ranks: Ranks) -> list[str]:
    expected = [(name, entry[1]) for name, entry in sorted(_manifest(folder).items()) if entry[1] is not None]
    own = [
        f"the content of {name} has changed since it was written"
        for name, sum_ in expected[ranks.rank :: ranks.world_size]
        if _crc32(folder / name) != sum_
    ]
    shares: list[list[str]] = [[]] * ranks.world_size
    dist.all_gather_object(shares, own)
    return [line for share in shares for line in share]


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
