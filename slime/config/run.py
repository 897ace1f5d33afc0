"""Tracking and debugging of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from slime.config.flags import derived, flag

_PROFILE = "profiles and memory records"


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go."""

    use_tensorboard: bool = False
    """Write TensorBoard files."""
    tb_project_name: str | None = None
    """First folder below tensorboard_log (or TENSORBOARD_DIR)."""
    tb_experiment_name: str | None = None
    """Second folder; None takes the time."""
    use_wandb: bool = False
    """Metrics to Weights & Biases, too."""
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """None takes WANDB_MODE, else online; offline writes files that `wandb sync` sends."""
    wandb_dir: str | None = None
    """Folder of its files; None takes the run's."""
    wandb_key: str | None = None
    """Its key. Everybody on the machine can read a command line: the environment variable WANDB_API_KEY is better."""
    wandb_host: str | None = None
    """Address of its server; None takes WANDB_BASE_URL, else the public one."""
    wandb_team: str | None = None
    """Team (entity) that the run belongs to."""
    wandb_group: str | None = None
    """Group of the run, and its name."""
    wandb_project: str | None = None
    """Project of the run."""
    wandb_random_suffix: bool = flag(True, off="--disable-wandb-random-suffix")
    """The run's name is its group and six random letters; off: the group alone."""
    wandb_always_use_train_step: bool = False
    """What belongs to a rollout is drawn against the optimizer steps done by then."""
    wandb_run_id: str | None = None
    """An existing run that goes on."""
    custom_metrics_sink_path: str | None = None
    """Dotted path of a class taking (args), with write(metrics, axis, position) and close(): a sink beside the others."""
    log_multi_turn: bool = False
    """Response lengths with and without the environment's tokens, and metadata["round_number"]: multi_turn/*."""
    log_passrate: bool = False
    """passrate/pass@k of the trained groups, for k = 2, 4, 8, ... up to the group size; reward 1 passes."""
    log_reward_category: str | None = None
    """Key of the reward mapping: the share of samples per value, rollout/error_cat/*."""
    log_correct_samples: bool = False
    """Share and lengths of the samples with reward 1: rollout/correct_*."""


@dataclass(frozen=True)
class DebugConfig:
    """Running one half, and recording or replaying what lies between the halves."""

    debug_rollout_only: bool = False
    """Engines and rollouts, no trainer."""
    debug_train_only: bool = False
    """Trainer without engines."""
    save_debug_rollout_data: str | None = None
    """File per rollout with its samples; must hold {rollout_id}."""
    load_debug_rollout_data: str | None = None
    """Replay such files instead of generating; implies --debug-train-only."""
    load_debug_rollout_data_subsample: float | None = flag(None, above=0, high=1)
    """Share of a dump's groups to replay: the first and the last half of so many."""
    load_forge_rollout_data: str | None = flag(None, later="replaying while engines stay alive")
    """Replay while the engines stay up."""
    save_debug_train_data: str | None = None
    """File per rollout with what the steps train on; must hold {rollout_id}, and with {rank} is one per data-parallel rank."""
    dump_details: str | None = None
    """Folder: rollouts are saved to rollout_data/{rollout_id}.pt below it, the trainer's tensors to train_data/."""
    memory_snapshot_dir: str = flag(".", later=_PROFILE)
    """Where memory snapshots go."""
    memory_snapshot_num_steps: int | None = flag(None, later=_PROFILE)
    """Steps to record."""
    memory_recorder: Literal["torch", "memray"] = flag("torch", later=_PROFILE)
    """Recorder."""
    record_memory_history: bool = flag(False, later=_PROFILE)
    """Record allocations."""
    profile_target: tuple[str, ...] = flag(("train_overall",), later=_PROFILE)
    """What to profile."""
    ci_test: bool = False
    """Stop the run unless its figures hold together: KL and clip share 0 in a first step, a small train/rollout gap."""
    ci_disable_kl_checker: bool = False
    """--ci-test without the identities of the KL (weights that are not the reference's, kernels that are not deterministic)."""
    ci_train_rollout_logprob_abs_diff_threshold: float = flag(0.1, low=0)
    """--ci-test: largest mean |log-prob of the trainer - log-prob of the engine|."""
    ci_save_grad_norm: str | None = None
    """File per step with its gradient norm; may hold {role}, {rollout_id}, {step_id}."""
    ci_load_grad_norm: str | None = None
    """Such files of another run: stop unless every gradient norm is within 1% of theirs."""
    custom_config_path: str | None = None
    """YAML of attributes that win over flags; a mapping under `custom:` is for plugins."""
    custom: Mapping[str, object] = derived({})
    """What `custom:` of that file holds; plugins see it as args.<name>."""
