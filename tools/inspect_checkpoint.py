#!/usr/bin/env python3
"""Show what an HF checkpoint folder holds, and whether its index tells the truth; reads headers only, so 744B take seconds.

    python tools/inspect_checkpoint.py FOLDER            # one line per kind of tensor, layers and experts folded together
    python tools/inspect_checkpoint.py FOLDER --filter indexer
    python tools/inspect_checkpoint.py TORCH_DIST_FOLDER --verify   # reads it all: every file and tensor against the manifest

Exit status 1 and one line per fault: a tensor of the index that is nowhere, one that it lacks or puts elsewhere, a file
that is cut short, an FP8 weight without scales (or the reverse). --filter shortens the list; the whole folder is checked.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slime.model.hf_headers import TensorInfo, read_header, read_index  # noqa: E402

SCALE = "weight_scale_inv"


def read_folder(folder: Path) -> tuple[list[TensorInfo], list[str]]:
    """(tensors, faults)."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors file")
    tensors: list[TensorInfo] = []
    faults: list[str] = []
    torn = set()
    for path in files:
        try:
            tensors += read_header(path)
        except ValueError as error:
            faults.append(str(error))
            torn.add(path.name)
    faults += _index_faults(folder, tensors, torn) + _scale_faults(tensors)
    return tensors, faults


def _index_faults(folder: Path, tensors: list[TensorInfo], torn: set[str]) -> list[str]:
    """torn: files that could not be read; what they should hold is no further fault."""
    try:
        promised = read_index(folder)
    except ValueError as error:
        return [str(error)]
    if promised is None:
        return []
    found = {tensor.name: tensor.file for tensor in tensors}
    lost = {name: file for name, file in promised.items() if name not in found and file not in torn}
    faults = [f"{name}: the index says {file}, it is nowhere" for name, file in lost.items()]
    for name, file in found.items():
        if promised.get(name) != file:
            faults.append(f"{name}: it is in {file}, the index says {promised.get(name, 'nothing')}")
    return faults


def _scale_faults(tensors: list[TensorInfo]) -> list[str]:
    kinds = {tensor.name: tensor.dtype for tensor in tensors}
    faults = []
    for name, dtype in kinds.items():
        if dtype.startswith("F8") and name.removesuffix("weight") + SCALE not in kinds:
            faults.append(f"{name}: FP8 without {SCALE}")
        if name.endswith(SCALE) and not kinds.get(name.removesuffix(SCALE) + "weight", "").startswith("F8"):
            faults.append(f"{name}: scales without an FP8 weight")
    return faults


def fold(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", name)


def table(tensors: list[TensorInfo]) -> list[str]:
    """One line per (folded name, dtype, shape), widest first, and the totals."""
    groups: dict[tuple, list[TensorInfo]] = defaultdict(list)
    for tensor in tensors:
        groups[fold(tensor.name), tensor.dtype, tensor.shape].append(tensor)
    lines = []
    for (name, dtype, shape), members in sorted(groups.items(), key=lambda item: -sum(t.num_bytes for t in item[1])):
        size = sum(tensor.num_bytes for tensor in members)
        lines.append(f"{size / 1e6:12.3f} MB  {len(members):6} x {dtype:8} {'x'.join(map(str, shape)) or 'scalar':>16}  {name}")
    weights = [tensor for tensor in tensors if not tensor.name.endswith(SCALE)]
    total = sum(tensor.num_bytes for tensor in tensors)
    parameters = sum(math.prod(tensor.shape) for tensor in weights)
    return [*lines, f"{total / 1e6:12.3f} MB  {len(tensors):6} tensors, {parameters:,} parameters"]


def verify(folder: Path) -> int:
    """Every file of a torch_dist checkpoint by size and crc32, and every tensor by shape, dtype and sha256, one at a time."""
    from slime.model.conversion import wrong_tensors
    from slime.model.dist_reader import TorchDistReader, checkpoint_of
    from slime.training.checkpoint import read_manifest, wrong_files

    folder = checkpoint_of(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"{folder} has no readable manifest, so there is nothing to compare it with")
    # Files first: nothing of a checkpoint that differs from its manifest is unpickled.
    faults = wrong_files(folder, manifest) or wrong_tensors(TorchDistReader(folder), manifest.tensors)
    print("\n".join(faults), file=sys.stderr, end="\n" if faults else "")
    told = f"{len(manifest.tensors)} tensors" if manifest.tensors else "no tensors in the manifest"
    print(f"{folder}: {len(manifest.files)} files, {told}: {f'{len(faults)} faults' if faults else 'every hash agrees'}")
    return 1 if faults else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--filter", default="", help="only names that contain this text")
    parser.add_argument("--verify", action="store_true", help="compare a torch_dist checkpoint with its slime_manifest.json")
    args = parser.parse_args(argv)
    if args.verify:
        return verify(args.folder)
    tensors, faults = read_folder(args.folder)
    print("\n".join(table([tensor for tensor in tensors if args.filter in tensor.name])))
    print("\n".join(faults), file=sys.stderr, end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as wrong:
        print(f"inspect_checkpoint: {wrong}", file=sys.stderr)
        sys.exit(1)
