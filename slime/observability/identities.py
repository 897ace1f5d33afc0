"""What must hold of the figures of a run whatever it learns (--ci-test), and comparison with another run's gradient norms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from slime.config import DebugConfig

# The passes with and without gradient run the same kernels on the same micro-batches; only their order of additions may differ.
_EXACT = 1e-6
_NORM_TOLERANCE = 0.01


def broken_identities(
    rollout: Mapping[str, float], steps: Sequence[Mapping[str, float]], *, first: bool, check_kl: bool, largest_gap: float
) -> list[str]:
    """What does not hold, a line each.

    rollout: the rollout/* figures. steps: the train/* figures of its steps. first: no step was taken before this rollout.
    largest_gap: of the mean |log-prob of the trainer - log-prob of the engine| in any step.
    """
    wrong = []

    def must_vanish(figures: Mapping[str, float], name: str, why: str) -> None:
        if abs(figures.get(name, 0.0)) > _EXACT:
            wrong.append(f"{name} is {figures[name]:.3g}, not 0: {why}")

    if check_kl and steps:
        must_vanish(steps[0], "train/ppo_kl", "the first step is taken with the weights that the old log-probs are of")
        must_vanish(steps[0], "train/pg_clipfrac", "a ratio of 1 is not clipped")
        if first:
            must_vanish(steps[0], "train/kl_loss", "the first step is taken with the reference's weights")
            if "rollout/log_probs" in rollout and "rollout/ref_log_probs" in rollout:
                gap = {
                    "rollout/log_probs - rollout/ref_log_probs": rollout["rollout/log_probs"] - rollout["rollout/ref_log_probs"]
                }
                must_vanish(gap, *gap, "the first rollout is scored with the reference's weights")
    for number, step in enumerate(steps):
        gap = step.get("train/train_rollout_logprob_abs_diff", 0.0)
        if not gap <= largest_gap:  # a NaN is no small gap
            wrong.append(
                f"train/train_rollout_logprob_abs_diff of step {number} is {gap:.3g}, above "
                f"--ci-train-rollout-logprob-abs-diff-threshold {largest_gap:g}"
            )
    return wrong


def norm_path(template: str, *, rollout_id: int, step_id: int, role: str = "actor") -> Path:
    return Path(template.replace("{role}", role).replace("{rollout_id}", str(rollout_id)).replace("{step_id}", str(step_id)))


def save_norm(path: Path, norm: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{norm!r}\n")


def compare_norm(path: Path, norm: float) -> str | None:
    """How `norm` differs from the one in the file by more than 1%, or None."""
    if not path.is_file():
        return f"--ci-load-grad-norm: there is no {path}; write it with --ci-save-grad-norm and the same template"
    wanted = float(path.read_text())
    if math.isclose(norm, wanted, rel_tol=_NORM_TOLERANCE, abs_tol=_NORM_TOLERANCE):
        return None
    return f"the gradient norm is {norm:.6g}, in {path} it is {wanted:.6g}"


def check_training(
    rules: DebugConfig, rollout_id: int, metrics: Mapping[str, float], per_step: Sequence[Mapping[str, float]]
) -> None:
    """--ci-test, --ci-save-grad-norm and --ci-load-grad-norm. Raises RuntimeError listing what does not hold."""
    wrong = []
    if rules.ci_test:
        wrong = broken_identities(
            metrics,
            per_step,
            first=rollout_id == 0,
            check_kl=not rules.ci_disable_kl_checker,
            largest_gap=rules.ci_train_rollout_logprob_abs_diff_threshold,
        )
    for step_id, step in enumerate(per_step):
        for role, name in (("actor", "train/grad_norm"), ("critic", "train/critic-grad_norm")):
            norm = step.get(name)  # an actor rests while the critic learns alone
            where = {"rollout_id": rollout_id, "step_id": step_id, "role": role}
            if norm is not None and rules.ci_save_grad_norm:
                save_norm(norm_path(rules.ci_save_grad_norm, **where), norm)
            if norm is not None and rules.ci_load_grad_norm:
                wrong.append(compare_norm(norm_path(rules.ci_load_grad_norm, **where), norm))
    if told := [line for line in wrong if line]:
        raise RuntimeError(f"rollout {rollout_id + 1}: " + "\n  ".join(told))
