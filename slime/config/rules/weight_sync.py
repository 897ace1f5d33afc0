"""How weights reach the engines."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from slime.config.rules.engine_model import served
from slime.config.rules.engines import trained_apart

if TYPE_CHECKING:
    from slime.config.rules.book import Values

DISK = (
    "update_weight_disk_dir", "update_weight_disk_keep_files", "update_weight_delta_checksum",
    "custom_update_weight_post_write_path",
)  # fmt: skip
DELTA = ("update_weight_delta_encoding", "update_weight_local_checkpoint_dir")

OTHERS = (
    "hf_checkpoint", "save", "load", "ref_load", "save_hf", "opd_teacher_load", "critic_load", "critic_save", "prompt_data",
)  # fmt: skip
"""Folders and files that a run reads or writes for another reason."""

UNUSED_WAYS = {
    "checkpoint_engine_wait_weights_before_ready": "makes an engine wait for /update_weights_from_ipc before it is ready",
    "remote_instance_weight_loader_start_seed_via_transfer_engine": "registers an engine's parameters for writes by RDMA",
}
"""Options of SGLang for weights that come as the run never sends them."""


def weight_sync(v: Values) -> None:
    on_disk, is_delta = v["update_weight_transport"] == "disk", v["update_weight_mode"] == "delta"
    root, local = v["update_weight_disk_dir"], v["update_weight_local_checkpoint_dir"]
    v.require(
        on_disk or not is_delta,
        "--update-weight-mode delta travels in files alone; add --update-weight-transport disk",
    )
    v.require(
        root or not on_disk,
        "--update-weight-transport disk has no folder to write to; add --update-weight-disk-dir, which trainer and engines see",
    )
    v.require(
        local or not is_delta or v["rollout_external_engine_addrs"],
        "--update-weight-mode delta changes a copy of the serving checkpoint on each engine's node; say where it is to be: "
        "--update-weight-local-checkpoint-dir",
    )
    v.require(
        not (is_delta and v["colocate"]),
        "--update-weight-mode delta keeps an engine's weights from one version to the next, which --colocate gives away in "
        "between; use --update-weight-mode full",
    )
    v.require(
        v["update_weight_transport"] != "receivers" or not v["rollout_external_engine_addrs"],
        "--update-weight-transport receivers starts a process beside each engine rank, which external engines do not "
        "have; use nccl, "
        "or disk",
    )
    trainer_gpus = v["actor_num_nodes"] * v["actor_num_gpus_per_node"]
    if v["update_weight_transport"] == "receivers" and v["colocate"] and v["rollout_num_gpus"] <= trainer_gpus:
        v.notes.append(
            "--update-weight-transport receivers changes nothing with --colocate: the engines are on the trainer's GPUs"
        )
    v.require(
        not (on_disk and v["rehearsed"]),
        "--rehearsed compares the plan by which weights travel, and --update-weight-transport disk has none; leave one out",
    )
    needed = {name: "--update-weight-transport disk" for name in DISK if not on_disk}
    needed |= {name: "--update-weight-mode delta" for name in DELTA if not is_delta}
    v.notes += [
        f"--{name.replace('_', '-')} changes nothing without {flag}" for name, flag in needed.items() if name in v.given
    ]
    folders = {name: v[name] for name in OTHERS}
    for name, folder in (("update_weight_disk_dir", root), ("update_weight_local_checkpoint_dir", local)):
        for other, path in folders.items():
            v.require(
                not folder or not path or os.path.normpath(folder) != os.path.normpath(path),
                f"--{name.replace('_', '-')} {folder} is --{other.replace('_', '-')}, which would be overwritten; name another "
                "folder",
            )
        folders[name] = folder


def broadcast(v: Values) -> None:
    """The group of a broadcast has one rank per tensor-parallel rank of an engine.

    SGLang joins it as rank_offset + tp_rank in every pipeline stage: two stages would be one rank.
    """
    if v["update_weight_transport"] != "nccl" or v["debug_rollout_only"]:
        return
    for engine in trained_apart(v):
        v.require(
            engine.pp == 1,
            f"{engine.where}: pp_size {engine.pp} on GPUs of its own with --update-weight-transport nccl, but SGLang joins a "
            "broadcast by tensor-parallel rank alone, so its stages would take the same place; choose receivers or disk, or "
            "pp_size 1",
        )


def unused_ways(v: Values) -> None:
    for engine in served(v):
        for name, does in UNUSED_WAYS.items():
            v.require(
                not engine.on(name),
                f"{engine.where}: {name} {does}, and the run sends weights by --update-weight-transport "
                f"{v['update_weight_transport']}; remove the option",
            )
