"""Who gets which GPUs, and who gives them back; running one half alone."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slime.config.rules.book import Values

ASKS_ENGINES = ("slime.rollout.sglang_rollout.", "slime.rollout.fully_async_rollout.")
"""Rollout functions of the project that send requests to engines."""


def debug_modes(v: Values) -> None:
    if v["load_debug_rollout_data"] is not None:
        v.derive("debug_train_only", True, "--load-debug-rollout-data replays rollouts, so no engine is started")
    v.require(
        not (v["debug_train_only"] and v["debug_rollout_only"]),
        "--debug-rollout-only and --debug-train-only (which --load-debug-rollout-data implies) exclude each other",
    )
    replays = v["load_debug_rollout_data"] is not None or v["num_rollout"] == 0
    asks = v["rollout_function_path"].startswith(ASKS_ENGINES) and not v["custom_generate_function_path"]
    v.require(
        not v["debug_train_only"] or replays or not asks,
        f"--debug-train-only starts no engine, and --rollout-function-path {v['rollout_function_path']} asks one; give "
        "--load-debug-rollout-data, or a function that generates nothing (slime.rollout.sft_rollout.generate_rollout)",
    )
    if v["dump_details"] is not None:
        v.derive(
            "save_debug_rollout_data",
            os.path.join(v["dump_details"], "rollout_data", "{rollout_id}.pt"),
            "--dump-details is given",
        )
        v.derive(
            "save_debug_train_data", os.path.join(v["dump_details"], "train_data", "{rollout_id}.pt"), "--dump-details is given"
        )
    same = v["save_debug_rollout_data"] is not None and v["save_debug_rollout_data"] == v["load_debug_rollout_data"]
    v.require(
        not same, "--save-debug-rollout-data and --load-debug-rollout-data name the same files; replaying would overwrite them"
    )
    v.require(
        v["save_debug_train_data"] is None or v["save_debug_train_data"] != v["save_debug_rollout_data"],
        "--save-debug-train-data and --save-debug-rollout-data name the same files; one would overwrite the other",
    )
    for name in ("ci_save_grad_norm", "ci_load_grad_norm"):
        whole = v[name] is None or ("{rollout_id}" in v[name] and "{step_id}" in v[name])
        v.require(whole, f"--{name.replace('_', '-')} must hold {{rollout_id}} and {{step_id}}, got {v[name]!r}")
    for name in ("save_debug_rollout_data", "load_debug_rollout_data", "save_debug_train_data"):
        v.require(
            v[name] is None or "{rollout_id}" in v[name],
            f"--{name.replace('_', '-')} must hold {{rollout_id}}, got {v[name]!r}",
        )


def placement(v: Values) -> None:
    """Who gets which GPUs, and who gives them back."""
    actor = v["actor_num_nodes"] * v["actor_num_gpus_per_node"]
    v.require(
        actor >= 1,
        f"--actor-num-nodes {v['actor_num_nodes']} times --actor-num-gpus-per-node {v['actor_num_gpus_per_node']} is no GPU",
    )
    if v["offload"]:
        v.require(
            v["offload_train"] is not False and v["offload_rollout"] is not False,
            "--offload contradicts --no-offload-train/--no-offload-rollout",
        )
        v.derive("offload_train", True, "--offload is given")
        v.derive("offload_rollout", True, "--offload is given")
    if v["debug_rollout_only"]:
        _rollout_only(v, actor)
    if v["debug_train_only"]:
        v.derive("rollout_num_gpus", 0, "--debug-train-only starts no engine")
    if v["colocate"]:
        v.derive(
            "offload_train", True if v["offload_train"] is None else v["offload_train"], "--colocate: engines need the memory"
        )
        v.derive(
            "offload_rollout",
            True if v["offload_rollout"] is None else v["offload_rollout"],
            "--colocate: the trainer needs the memory",
        )
        if v["rollout_num_gpus"] is None:
            v.derive("rollout_num_gpus", actor, f"--colocate: engines use the {actor} training GPUs")
        if 0 < v["rollout_num_gpus"] < actor:
            v.notes.append(
                f"{actor - v['rollout_num_gpus']} training GPUs idle during rollout: --rollout-num-gpus {v['rollout_num_gpus']}"
            )
    else:
        for name in ("offload_train", "offload_rollout"):
            v.derive(name, False, "training and rollout have GPUs of their own, so nobody gives memory back")


def _rollout_only(v: Values, actor: int) -> None:
    if v["rollout_num_gpus"] is None:
        v.require(v["colocate"], "--debug-rollout-only needs --rollout-num-gpus (or --colocate)")
        v.derive("rollout_num_gpus", actor, "--colocate: engines use the training GPUs")
    gpus = v["rollout_num_gpus"] or 0
    per_node = min(v["num_gpus_per_node"], gpus)
    v.derive("actor_num_gpus_per_node", per_node, "--debug-rollout-only places engines alone")
    v.derive("actor_num_nodes", gpus // per_node if per_node else 0, "--debug-rollout-only places engines alone")
    for name in ("colocate", "offload_train", "offload_rollout"):
        v.derive(name, False, "--debug-rollout-only has no trainer")
