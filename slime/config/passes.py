"""Which passes over a rollout come before its steps, from the flags alone: a trainer makes them, a rehearsal prices them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slime.config.config import Config


@dataclass(frozen=True)
class Passes:
    """Which passes without gradient a rollout needs before its steps."""

    old: bool
    ref: bool
    teacher: bool = False
    values: bool = False
    """Of a critic."""
    reasons: tuple[str, ...] = field(default=())
    """Why the old-log-prob pass cannot reuse the log-probs of the step itself."""

    @property
    def count(self) -> int:
        return sum((self.old, self.ref, self.teacher, self.values))


def passes_of(config: Config, num_steps: int) -> Passes:
    """One step per rollout sees the very weights that are `old`, so its own log-probs serve; otherwise they are computed
    before."""
    rules = config.algorithm
    if rules.loss_type != "policy_loss" or not rules.compute_advantages_and_returns:
        return Passes(old=False, ref=False)
    ref = rules.use_kl_loss or rules.kl_coef != 0
    teacher = rules.use_opd and rules.opd_type == "megatron"
    values = rules.advantage_estimator == "ppo"
    reasons = []
    if rules.kl_coef != 0:
        reasons.append("--kl-coef shapes rewards by them")
    if rules.use_opd:
        reasons.append("--use-opd compares them with a teacher's")
    if rules.use_routing_replay and not rules.use_rollout_routing_replay:
        reasons.append("--use-routing-replay takes its experts from that pass")
    if rules.keep_old_actor:
        reasons.append("--keep-old-actor takes them from the weights that wrote the rollout")
    if rules.use_rollout_logprobs and not rules.get_mismatch_metrics:
        return Passes(old=bool(reasons), ref=ref, teacher=teacher, values=values, reasons=tuple(reasons))
    if num_steps != 1:
        reasons.append(f"{num_steps} steps in this rollout")
    if rules.get_mismatch_metrics:
        reasons.append("--get-mismatch-metrics")
    if rules.advantage_estimator == "gspo":
        reasons.append("gspo")
    if rules.custom_advantage_function_path:
        reasons.append("--custom-advantage-function-path may read them")
    if rules.tis_batch_normalize:
        reasons.append("--tis-batch-normalize averages over the whole step")
    if rules.use_rollout_entropy:
        reasons.append("--use-rollout-entropy")
    return Passes(old=bool(reasons), ref=ref, teacher=teacher, values=values, reasons=tuple(reasons))
