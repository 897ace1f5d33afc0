"""What differs between the actor and the critic of PPO: the file of --megatron-config-path, and the critic's configuration.

    megatron:
      - name: value             # any name
        role: critic            # or actor
        overrides: {lr: 1.0e-5, save: /runs/critic}

The actor's overrides are flags like those of --custom-config-path. The critic has optimizer and folders of its own; model,
layout and batches are the actor's, beside which it stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from slime.config.attributes import attribute_rows, from_yaml
from slime.config.errors import ConfigError, load_yaml, nearest
from slime.config.flags import FrozenMap
from slime.config.training import OptimizerConfig

ROLES = ("actor", "critic")
PLACES = ("num_nodes", "num_gpus_per_node")
"""Of a role; the critic is where the actor is."""
CRITICS_FOLDERS = ("load", "save", "ckpt_step", "no_load_optim", "no_save_optim")
CRITICS_OPTIMIZER = frozenset(item.name for item in dataclasses.fields(OptimizerConfig)) - {"megatron", "ddp"}
NO_PART_OF_A_CRITIC = (
    "custom_advantage_function_path", "rollout_data_postprocess_path", "custom_megatron_before_train_step_hook_path",
    "custom_megatron_before_log_prob_hook_path",
)  # fmt: skip


def apply_roles(start: dict[str, Any]) -> list[str]:
    """Set the actor's overrides and collect the critic's. Raises ConfigError with one line per mistake; returns notes."""
    file = start["megatron_config_path"]
    if file is None:
        return []
    rows, notes, mistakes = attribute_rows(), [], []
    for role, overrides in _roles(str(file)).items():
        kept: dict[str, object] = {}
        for key, value in overrides.items():
            name, where = str(key).replace("-", "_"), f"{file}: {role}: {key}"
            if name in PLACES:
                notes.append(f"{where} changes nothing: actor and critic are on the same devices")
            elif name not in rows:
                mistakes.append(f"{where} is no attribute{nearest(name, rows)}")
            elif role == "critic" and name not in CRITICS_OPTIMIZER and name not in CRITICS_FOLDERS:
                mistakes.append(f"{where} is the actor's too; a critic has its own optimizer, load and save, so remove it")
            else:
                try:
                    kept[name] = from_yaml(rows[name], value)
                except ValueError as error:
                    mistakes.append(f"{where}: {error}")
        if role == "critic":
            start["critic"] = FrozenMap(kept)
            continue
        for name, value in kept.items():
            row = rows[name]
            (start[row.section] if "." in row.section else start)[row.dest] = value
            notes.append(f"{row.dest} = {value!r}, because {file} says so for the actor")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return notes


def _roles(file: str) -> dict[str, Mapping[str, object]]:
    content = load_yaml(file, flag="--megatron-config-path")
    entries = content.get("megatron") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ConfigError(f"{file}: the top must be `megatron:` with a list of roles; see docs/en/advanced/ppo.md")
    found: dict[str, Mapping[str, object]] = {}
    for entry in entries:
        role = entry.get("role") if isinstance(entry, dict) else None
        if role not in ROLES:
            raise ConfigError(f"{file}: {entry!r} has no role; each entry is of role actor or critic")
        if role in found:
            raise ConfigError(f"{file}: role {role} has two entries; put them together")
        if unknown := sorted(set(entry) - {"name", "role", "overrides", "args", *PLACES}):
            raise ConfigError(f"{file}: role {role}: unknown key {unknown[0]!r}; attributes stand under overrides")
        overrides = entry.get("overrides", entry.get("args")) or {}
        if not isinstance(overrides, dict):
            raise ConfigError(f"{file}: role {role}: overrides must be a mapping of attributes, found {overrides!r}")
        found[role] = overrides
    return found


def critic_sections(config: Any) -> dict[str, Any]:
    """The sections of a Config in which a critic's differs: its optimizer, its folders, and nothing that is of a policy."""
    rules, paths, own = config.algorithm, config.checkpoint, dict(config.algorithm.critic)
    optimizer = {name: value for name, value in own.items() if name in CRITICS_OPTIMIZER}
    for name, value in (("lr", rules.critic_lr), ("lr_warmup_iters", rules.critic_lr_warmup_iters)):
        if value is not None:
            optimizer[name] = value
    keep = paths.keep_checkpoints
    return {
        "optimizer": replace(config.optimizer, **optimizer),
        "checkpoint": replace(
            paths,
            load=rules.critic_load,
            save=rules.critic_save,
            # The critic is saved first: where the actor's save then fails, that of its last one must still be there.
            keep_checkpoints=None if keep is None else keep + 1,
            ckpt_step=own.get("ckpt_step"),
            no_load_optim=own.get("no_load_optim", paths.no_load_optim),
            no_save_optim=own.get("no_save_optim", paths.no_save_optim),
            ref_load=None,
            ref_update_interval=None,
        ),
        "algorithm": replace(rules, kl_coef=0.0, use_kl_loss=False, use_opd=False, **dict.fromkeys(NO_PART_OF_A_CRITIC)),
        "model": replace(config.model, mtp_num_layers=None),
    }
