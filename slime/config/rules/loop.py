"""What may go on at the same time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slime.config.rules.book import Values

OFF_POLICY_REMEDIES = ("use_tis", "use_rs", "use_opsm", "use_rollout_logprobs", "custom_tis_function_path")
"""Any of them looks at the engines' own log-probs."""


def schedule(v: Values) -> None:
    """A schedule that runs ahead has devices for it, and the interval of weight syncs a meaning."""
    if v["debug_rollout_only"]:
        v.derive("schedule", "sync", "--debug-rollout-only trains nothing that a rollout could run ahead of")
    asked = f"--schedule {v['schedule']}"
    if v["schedule"] == "sync":
        v.derive("update_weights_interval", 1, "--schedule sync sends the weights after every rollout")
        return
    v.derive("runs_ahead", True, f"{asked} generates while the trainer trains")
    v.require(
        not v["colocate"],
        f"{asked} generates while the trainer trains, and --colocate gives both the same GPUs, one at a time; leave --colocate "
        "out and give the engines GPUs of their own with --rollout-num-gpus",
        holds="generation and training have GPUs of their own",
    )
    v.require(
        not v["keep_old_actor"],
        f"--keep-old-actor with {asked} asks for old log-probs by the weights that generated, which the trainer no longer has; "
        "take the engines' own, --use-rollout-logprobs",
    )
    if v["loss_type"] == "policy_loss" and not v["debug_train_only"] and not any(v[name] for name in OFF_POLICY_REMEDIES):
        v.notes.append(
            f"{asked} trains samples of older weights and nothing here weighs that; --use-tis, or --use-rollout-logprobs, does"
        )
