"""Model weights as a Megatron `torch_dist` checkpoint, which loads under any other TP, PP and EP.

Folder layout: `<save>/latest_checkpointed_iteration.txt` (an iteration, or `release`), `<save>/release/` or
`<save>/iter_0000012/`.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from slime.compat.megatron import prepare
from slime.compat.pickles import load_values

prepare()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.serialization import (  # noqa: E402
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (  # noqa: E402
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)

from slime.config.hf_check import megatron_values  # noqa: E402
from slime.model.dist_writer import Writing  # noqa: E402
from slime.model.hf_config import HfConfig  # noqa: E402
from slime.model.local import unwrap  # noqa: E402
from slime.parallel import Ranks  # noqa: E402

TRACKER = "latest_checkpointed_iteration.txt"
DESCRIPTION = "slime_model"
_MTP = "mtp.layers."
# Layers without a number, experts one level deeper: only Megatron-LM's own modules are saved so.
_FOREIGN = re.compile(r"^decoder\.layers\.(self_attention|mlp|input_layernorm)|\.mlp\.experts\.experts\.")
_CHUNK = re.compile(r"model\d*")


def sharding_metadata(ranks: Ranks) -> dict[str, Any]:
    """What sharded_state_dict wants to know. Layers are saved one by one: they differ (dense and MoE, with and without
    indexer)."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "non_homogeneous_layers": True,
        "dp_cp_group": ranks.dp_cp_group,
    }


def sharded_model(chunks: list[torch.nn.Module], ranks: Ranks) -> dict[str, Any]:
    """{"model": ...} or {"model0": ..., "model1": ...}: the sharded state of this rank's chunks, under global keys."""
    states = [unwrap(chunk).sharded_state_dict(metadata=sharding_metadata(ranks)) for chunk in chunks]
    return {"model": states[0]} if len(states) == 1 else {f"model{number}": state for number, state in enumerate(states)}


def describe(hf: HfConfig, *, value_head: bool = False) -> dict[str, Any]:
    """What the checkpoint is of; compared when it is loaded. value_head: a critic."""
    values = {**megatron_values(hf), "vocab_size": hf["vocab_size"], "rotary_base": hf.rope_theta}
    if hf.has_indexer:
        for name in ("index_n_heads", "index_head_dim", "index_topk", "index_topk_freq", "index_skip_topk_offset"):
            values[name] = hf.get(name)
    return {"model_type": hf.model_type, **values, **({"head": "value"} if value_head else {})}


def begin_sharded(state: Mapping[str, Any], folder: str | Path, ranks: Ranks, *, checksums: bool = False) -> Writing:
    """Start to write a sharded state dict as it is now; every rank calls it, and may then change the tensors.

    The small common values are on disk when it returns. Raises ValueError where the package psutil is missing, which
    megatron-core's writers need.
    """
    if importlib.util.find_spec("psutil") is None:
        raise ValueError("saving a checkpoint needs the package psutil, which megatron-core's writers use; pip install psutil")
    if ranks.rank == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    strategy = get_default_save_sharded_strategy("torch_dist")
    if dist.get_world_size(ranks.dp_cp_group) > 1:
        strategy = FullyParallelSaveStrategyWrapper(strategy, ranks.dp_cp_group)
    request = dist_checkpointing.save(dict(state), str(folder), strategy, async_sharded_save=True)
    return Writing(request, checksums=checksums)


def save_sharded(state: Mapping[str, Any], folder: str | Path, ranks: Ranks) -> None:
    """`begin_sharded`, and wait until all of it is on disk."""
    writing = begin_sharded(state, folder, ranks)
    writing.collect()
    writing.finish()


def load_sharded(state: Mapping[str, Any], folder: str | Path, ranks: Ranks) -> dict[str, Any]:
    """Fill a sharded state dict from `folder`, whatever layout wrote it. Raises ValueError listing tensors it does not hold."""
    check_finished(folder)
    _check_mtp(state, folder, ranks)
    strategy = get_default_load_sharded_strategy(str(folder))
    if dist.get_world_size(ranks.dp_cp_group) > 1:
        strategy = FullyParallelLoadStrategyWrapper(strategy, ranks.dp_cp_group)
    loaded, _, absent = dist_checkpointing.load(dict(state), str(folder), strategy, strict="return_all")
    # Modules announce an empty `_extra_state`; a checkpoint need not have it.
    absent = sorted(key for key in absent if not key.endswith("_extra_state"))
    if absent:
        raise ValueError(
            f"{folder} lacks {len(absent)} tensors of this model: {', '.join(absent[:10])}{' ...' if len(absent) > 10 else ''}"
        )
    return loaded


def _check_mtp(state: Mapping[str, Any], folder: str | Path, ranks: Ranks) -> None:
    """megatron-core would fail on the missing layer while it puts gate and up projections together, naming dictionaries."""
    chunks = [part for key, part in state.items() if _CHUNK.fullmatch(key)]  # an optimizer's part may have numbers as keys
    wants = any(name.startswith(_MTP) for chunk in chunks for name in chunk)
    held = read_metadata(folder).state_dict_metadata if wants else {_MTP: None}
    lacking = [False] * ranks.world_size
    # Only the last stage has the layer; the others would wait for it in the load.
    dist.all_gather_object(lacking, not any(key.startswith(_MTP) for key in held))
    if any(lacking):
        raise ValueError(
            f"{folder} holds no multi-token-prediction layer, which --enable-mtp-training trains: convert the model again with "
            "--mtp-num-layers 1 and start from there, or leave out --mtp-num-layers and --enable-mtp-training"
        )


def save_model(
    chunks: list[torch.nn.Module], hf: HfConfig, folder: str | Path, ranks: Ranks, *, common: Mapping[str, Any] | None = None
) -> None:
    """Weights only (and `common`, small values every rank agrees on) into `folder`."""
    save_sharded({**sharded_model(chunks, ranks), DESCRIPTION: describe(hf), **(common or {})}, folder, ranks)


def load_model(
    chunks: list[torch.nn.Module], hf: HfConfig, folder: str | Path, ranks: Ranks, *, value_head: bool = False
) -> dict[str, Any]:
    """Fill the chunks from `folder`; optimizer state in it is left alone. Returns the checkpoint's common values.

    Raises ValueError, listing the differences, when the checkpoint is of another model.
    """
    common = check_description(hf, folder, value_head=value_head)
    state = load_sharded(sharded_model(chunks, ranks), folder, ranks)
    fill_chunks(chunks, state)
    return common


def fill_chunks(chunks: list[torch.nn.Module], state: Mapping[str, Any]) -> None:
    """Copy a loaded state (see sharded_model) into the chunks; every parameter must be there."""
    for number, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(state["model" if len(chunks) == 1 else f"model{number}"], strict=True)


def read_metadata(folder: str | Path) -> Metadata:
    """Which tensor lies where. Raises ValueError in one line for a `.metadata` that is torn or names foreign classes."""
    try:
        return FileSystemReader(str(folder)).read_metadata()
    except Exception as torn:  # whatever a torn pickle leads to
        told = str(torn).strip() or "the file is cut short"
        raise ValueError(f"{Path(folder) / '.metadata'} cannot be read: {told}") from None


def check_finished(folder: str | Path) -> None:
    """Raise ValueError unless `folder` is a torch_dist checkpoint whose last file, metadata.json, was written."""
    if not (Path(folder) / "common.pt").is_file():
        raise ValueError(f"{folder} is not a torch_dist checkpoint: it has no common.pt")
    if not (Path(folder) / "metadata.json").is_file():
        raise ValueError(f"{folder} is not a finished torch_dist checkpoint: it has no metadata.json, which is written last")


def check_description(hf: HfConfig, folder: str | Path, *, value_head: bool = False) -> dict[str, Any]:
    """The checkpoint's common values. Raises ValueError listing in what its model differs from `hf`'s (or a critic of it)."""
    check_finished(folder)
    common = _common_values(folder)
    if common is None:
        raise ValueError(
            f"{folder} was written by Megatron-LM or the slime on it, not here: {foreign_differences(hf, folder)}; "
            + (_EXPORT_THERE if hf.has_indexer else _EXPORT_HERE).format(folder=folder)
        )
    saved, wanted = common[DESCRIPTION], describe(hf, value_head=value_head)
    lines = [
        f"{key}: checkpoint {saved.get(key)!r}, {hf.source} {wanted.get(key)!r}"
        for key in sorted({*saved, *wanted})
        if saved.get(key) != wanted.get(key)
    ]
    if lines:
        raise ValueError(f"{folder} holds another model:\n  " + "\n  ".join(lines))
    return common


_EXPORT_HERE = (
    "make HF files of it with python tools/convert_torch_dist_to_hf.py --input-dir {folder} --origin-hf-dir MODEL --output-dir "
    "OUT, and pass OUT to --load or --ref-load (optimizer state does not travel)"
)
_EXPORT_THERE = (
    "export {folder} to HF files with the tools/convert_torch_dist_to_hf.py of the project that wrote it, and pass those to "
    "--load or --ref-load"
)


def is_foreign(folder: str | Path) -> bool:
    """A torch_dist checkpoint that this project did not write: it does not say which model it holds.

    Raises ValueError where its common.pt cannot be read, and its tensors do not lie as Megatron-LM's do either.
    """
    return _common_values(folder) is None


def _common_values(folder: str | Path) -> dict[str, Any] | None:
    """Of a checkpoint of ours; None of a foreign one."""
    try:
        common = load_values(Path(folder) / "common.pt")
    except ValueError:
        # Megatron-LM keeps its arguments there, which may name classes of any package.
        if any(_FOREIGN.search(key) for key in read_metadata(folder).state_dict_metadata):
            return None
        raise
    return common if isinstance(common, dict) and DESCRIPTION in common else None


def foreign_differences(hf: HfConfig, folder: str | Path) -> str:
    """In words, what lies otherwise in a foreign checkpoint than in ours."""
    keys = read_metadata(folder).state_dict_metadata
    told = [f"its common.pt has no {DESCRIPTION}"]
    if any(key.startswith(("decoder.layers.self_attention", "decoder.layers.mlp")) for key in keys):
        told.append(f"its {hf.num_layers} layers are stacked in one tensor for each kind (decoder.layers.self_attention...)")
    if any(".mlp.experts.experts." in key for key in keys):
        told.append("its experts are under mlp.experts.experts")
    if hf.has_indexer:
        told.append(
            "the rows of its indexer begin with the part without position, here with the rotated one, under the same names and "
            "shapes, so that another set of keys would be selected"
        )
    return ", ".join(told)


def write_tracker(save: str | Path, value: str) -> None:
    """Name the newest complete checkpoint; atomic, and last, so that a torn save leaves the previous one in force."""
    save = Path(save)
    partial = save / f".{TRACKER}"
    with open(partial, "w") as tracker:
        tracker.write(value)
        tracker.flush()
        os.fsync(tracker.fileno())
    os.replace(partial, save / TRACKER)


def read_tracker(save: str | Path) -> str | None:
    """`release`, an iteration's number, or None where there is no checkpoint."""
    path = Path(save) / TRACKER
    return path.read_text(errors="replace").strip() if path.is_file() else None


def checkpoint_folder(save: str | Path, tracker: str) -> Path:
    """`<save>/release` or `<save>/iter_0000012`."""
    return Path(save) / (tracker if tracker == "release" else f"iter_{int(tracker):07d}")
