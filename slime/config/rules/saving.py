"""Where weights come from and go to, and how often."""

from __future__ import annotations

import os
import re
import string
from typing import TYPE_CHECKING

from slime.config.hf_fields import FAMILIES

if TYPE_CHECKING:
    from slime.config.rules.book import Values


def saving(v: Values) -> None:
    v.require(v["save_interval"] is None or v["save"], "--save-interval needs --save")
    v.require(
        v["keep_checkpoints"] is None or v["save"],
        f"--keep-checkpoints {v['keep_checkpoints']} removes older checkpoints of --save, which is not given; pass --save",
    )
    v.require(
        not v["save_on_signal"] or v["save"] or v["debug_rollout_only"],
        "--save-on-signal has nowhere to save; pass --save",
    )
    v.require(
        v["save_on_signal"] or "save_on_signal_seconds" not in v.given,
        f"--save-on-signal-seconds {v['save_on_signal_seconds']} has no effect without --save-on-signal; add it",
    )
    interval = v["ref_update_interval"]
    if interval is not None:
        v.require(
            v["save_interval"] is None or interval < 1 or v["save_interval"] % interval == 0,
            f"--save-interval {v['save_interval']} is no multiple of --ref-update-interval {interval}: a run could not be "
            "continued, because a checkpoint does not hold the reference",
        )
        if not (v["use_kl_loss"] or v["kl_coef"]):
            v.notes.append("--ref-update-interval changes nothing: without --use-kl-loss and --kl-coef there is no reference")
    for name in ("hf_checkpoint", "ref_load", "opd_teacher_load", "prompt_data"):
        source = v[name]
        v.require(
            not source or not v["save"] or os.path.normpath(source) != os.path.normpath(v["save"]),
            f"--save {v['save']} is --{name.replace('_', '-')}, which a checkpoint would overwrite; name another folder",
        )
    if v["save_hf"] is not None:
        _template(v, "save_hf", ("rollout_id",))
        folder = os.path.normpath(v["save_hf"])
        for name in ("hf_checkpoint", "save", "load", "ref_load", "opd_teacher_load", "prompt_data"):
            v.require(
                not v[name] or os.path.normpath(v[name]) != folder,
                f"--save-hf {v['save_hf']} is --{name.replace('_', '-')}; name another folder",
            )
    v.require(v["save_hf"] is None or v["save"], "--save-hf writes along with checkpoints; it needs --save")
    v.require(
        not v["use_tensorboard"] or v["tb_project_name"] or v.facts.tensorboard_dir,
        "--use-tensorboard needs --tb-project-name or the environment variable TENSORBOARD_DIR",
    )


def snapshots(v: Values) -> None:
    """Of the trainer in main memory."""
    interval = v["snapshot_interval"]
    if interval is None:
        for name in ("snapshot_peer", "snapshot_versions", "max_trainer_restarts"):
            flag = "--no-snapshot-peer" if name == "snapshot_peer" else f"--{name.replace('_', '-')} {v[name]}"
            v.require(name not in v.given, f"{flag} has no effect without --snapshot-interval; add it")
        return
    v.require(
        not v["debug_rollout_only"],
        f"--snapshot-interval {interval}: --debug-rollout-only has no trainer; leave one of them out",
    )
    v.require(
        v["update_weight_mode"] != "delta",
        f"--snapshot-interval {interval}: differences rest on what trainer ranks have sent before, and new ones do not know "
        "it; use --update-weight-mode full",
    )
    copied = v["snapshot_peer"] and v["actor_num_nodes"] > 1
    v.require(
        v["snapshot_versions"] > 1 or copied,
        f"--snapshot-versions {v['snapshot_versions']}: while the only snapshot is written none is whole, unless another node "
        "has a copy; take 2 versions",
    )


FOLDERS = (
    "hf_checkpoint", "load", "ref_load", "save", "critic_load", "critic_save", "opd_teacher_load", "update_weight_disk_dir",
    "update_weight_local_checkpoint_dir", "kernel_cache", "dump_details",
)  # fmt: skip
"""Attributes that name a folder, which may not be there yet."""


def folders(v: Values) -> None:
    """What is to be a folder is no file."""
    for name in FOLDERS:
        v.require(
            not v.facts.is_file(v[name]),
            f"--{name.replace('_', '-')} {v[name]} is a file; name a folder",
        )


def _template(v: Values, name: str, fields: tuple[str, ...]) -> None:
    """A path with fields in braces holds those alone that are filled in."""
    flag, text = "--" + name.replace("_", "-"), v[name]
    try:
        found = [field for _, field, _, _ in string.Formatter().parse(text) if field is not None]
    except ValueError as error:
        v.mistakes.append(f"{flag} {text}: {error}; only {', '.join('{' + one + '}' for one in fields)} may stand in braces")
        return
    unknown = [field for field in found if field not in fields]
    v.require(
        not unknown,
        f"{flag} {text}: {', '.join('{' + one + '}' for one in unknown)} is filled in by nobody; only "
        f"{', '.join('{' + one + '}' for one in fields)} may stand in braces",
    )
    if unknown:
        return
    try:
        text.format(**dict.fromkeys(fields, 0))
    except ValueError:
        v.mistakes.append(f"{flag} {text} is filled in with a whole number, and asks for something else; write {{rollout_id}}")


def initial_weights(v: Values) -> None:
    """Where the first weights come from: --load if it holds a checkpoint, else --ref-load, else the HF folder."""
    if v["debug_rollout_only"]:
        return
    kind = v.facts.load
    if kind == "iteration":
        folder = v["load"].rstrip("/")
        step = re.fullmatch(r"iter_0*(\d+)", os.path.basename(folder))
        hint = f" --ckpt-step {step.group(1)}" if step else ""
        v.mistakes.append(f"--load {v['load']} is one iteration's folder; give --load {os.path.dirname(folder) or '.'}{hint}")
        return
    if kind == "unknown":
        v.mistakes.append(
            f"--load {v['load']} is an HF model of a type that no weight-name table knows ({', '.join(FAMILIES)})"
        )
        return
    v.require(not v.facts.load_problem, f"--load {v['load']}: {v.facts.load_problem}")
    if kind == "nothing" or v["use_kl_loss"] or v["kl_coef"]:
        v.require(not v.facts.ref_load_problem, f"--ref-load {v['ref_load']}: {v.facts.ref_load_problem}")
    if kind == "megatron":
        return
    why = {
        "nothing": f"--load {v['load']} holds no checkpoint" if v["load"] else "--load is not given",
        "release": f"--load {v['load']} is a converted model without optimizer state",
        "hf": f"--load {v['load']} is an HF model without optimizer state",
    }[kind]
    for name in ("no_load_optim", "no_load_rng", "finetune"):
        v.derive(name, True, why)
    if v["start_rollout_id"] is None:
        v.derive("start_rollout_id", 0, why)
    if kind == "nothing" and v["ref_load"] is not None:
        v.derive("load", v["ref_load"], why + "; the run starts from --ref-load")
        v.derive("ckpt_step", v["ref_ckpt_step"], "the run starts from --ref-load")
    elif kind == "nothing":
        v.derive("load", v["hf_checkpoint"], why + " and there is no --ref-load; the run starts from --hf-checkpoint")
