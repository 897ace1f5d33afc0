"""What a user would want to be told while a run still goes on: one line, once, with the remedy. It changes nothing by itself.

Each rule is a pure function of the figures of the rollouts so far (`Seen`); `Advisor` collects them.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slime.config import Config
from slime.types import RolloutBatch

_IN_A_ROW = 3
"""Rollouts that show the same before it is told: one may be chance."""
_GAP_WINDOW = 5
_GAP_GROWTH, _SMALL_GAP = 2.0, 0.02
_ALL = 0.99
_KEPT = 256


@dataclass(frozen=True)
class Seen:
    """The figures of one rollout that advice is given on. None: not there to be seen."""

    rollout: int
    """Counted from 1, as in every line."""
    rewards: tuple[float, float] | None = None
    """Lowest and highest of the grader's."""
    spread: float | None = None
    """Largest difference of two rewards of one prompt; None where prompts have one sample each."""
    gap: float | None = None
    """Mean |log-prob of the trainer - log-prob of the engine| of the first step, nats."""
    truncated: float = 0.0
    """Share of responses that ended at the length limit."""
    free_bytes: int | None = None
    """Of the disk of --save, after this rollout."""


def seen_of(batch: RolloutBatch, per_step: Sequence[Mapping[str, float]], *, graded: bool, free_bytes: int | None) -> Seen:
    spreads = [float(np.ptp(rewards)) for rewards in _by_group(batch) if len(rewards) > 1] if graded else []
    return Seen(
        batch.rollout_id + 1,
        (float(batch.raw_rewards.min()), float(batch.raw_rewards.max())) if graded else None,
        max(spreads, default=None),
        per_step[0].get("train/train_rollout_logprob_abs_diff") if per_step else None,
        float(batch.truncated.mean()),
        free_bytes,
    )


def _by_group(batch: RolloutBatch) -> list[np.ndarray]:
    return [batch.raw_rewards[batch.groups == group] for group in np.unique(batch.groups)]


def equal_rewards(seen: Sequence[Seen]) -> str | None:
    last = seen[-_IN_A_ROW:]
    if len(last) < _IN_A_ROW:
        return None
    told = f"rollouts {last[0].rollout} to {last[-1].rollout}"
    if len({one.rewards for one in last}) == 1 and last[0].rewards is not None and last[0].rewards[0] == last[0].rewards[1]:
        return (
            f"every reward of {told} is {last[0].rewards[0]:g}, which teaches nothing: read some answers "
            "(--save-debug-rollout-data), and compare labels and --rm-type with them; or take easier or harder prompts"
        )
    if all(one.spread == 0 for one in last):
        return (
            f"in {told} the rewards of each prompt's samples are equal, so that no group says what is better: take prompts "
            "that are sometimes solved, more --n-samples-per-prompt, or a higher --rollout-temperature"
        )
    return None


def growing_gap(seen: Sequence[Seen]) -> str | None:
    """The median of the last rollouts' gaps against that of the first ones."""
    gaps = [(one.rollout, one.gap) for one in seen if one.gap is not None]
    if len(gaps) < 2 * _GAP_WINDOW:
        return None
    first, last = gaps[:_GAP_WINDOW], gaps[-_GAP_WINDOW:]
    before, now = (statistics.median(gap for _, gap in part) for part in (first, last))
    if now <= _GAP_GROWTH * before or now - before < _SMALL_GAP:
        return None
    return (
        f"trainer and engines drift apart: the mean |log-prob gap| was {before:.3g} in rollouts {first[0][0]} to "
        f"{first[-1][0]} and is {now:.3g} in {last[0][0]} to {last[-1][0]}: compare weights (--check-weight-update-equal), "
        "weigh tokens by the difference (--use-tis), or lower --lr"
    )


def all_truncated(seen: Sequence[Seen], *, limit: int | None) -> str | None:
    last = seen[-_IN_A_ROW:]
    if len(last) < _IN_A_ROW or any(one.truncated < _ALL for one in last):
        return None
    return (
        f"the responses of rollouts {last[0].rollout} to {last[-1].rollout} all ended at the length limit, "
        f"--rollout-max-response-len {limit}: raise it, or see that the chat template and --rollout-stop let an answer end"
    )


def full_disk(seen: Sequence[Seen], *, save: str | None, need_bytes: int | None, rollouts_to_save: int | None) -> str | None:
    """need_bytes: of the next checkpoint. What is written beside it shows as free bytes that fall with each rollout."""
    free = [one.free_bytes for one in seen if one.free_bytes is not None]
    if not free or need_bytes is None or rollouts_to_save is None:
        return None
    falls = [max(0, a - b) for a, b in zip(free, free[1:], strict=False)][-_GAP_WINDOW:]
    fall = statistics.median(falls) if falls else 0
    left = free[-1] - fall * rollouts_to_save
    if left >= need_bytes:
        return None
    when = seen[-1].rollout + rollouts_to_save
    return (
        f"the disk of --save {save} will be full at the next save, after rollout {when}: a checkpoint takes "
        f"{need_bytes / 1e9:.3f} GB, {free[-1] / 1e9:.3f} GB are free and {fall / 1e9:.3f} GB go with each rollout; make room "
        "or pass --keep-checkpoints"
    )


class Advisor:
    """`after` each rollout: the lines that are new."""

    def __init__(self, config: Config):
        self._config = config
        self._seen: list[Seen] = []
        self._told: set[str] = set()

    def after(self, batch: RolloutBatch, per_step: Sequence[Mapping[str, float]], *, num_rollout: int) -> list[str]:
        config, save = self._config, self._config.checkpoint.save
        free = shutil.disk_usage(save).free if save and Path(save).is_dir() else None
        graded = config.algorithm.loss_type != "sft_loss"
        self._seen.append(seen_of(batch, per_step, graded=graded, free_bytes=free))
        del self._seen[_GAP_WINDOW:-_KEPT]  # the first ones are what the gap is compared with
        to_save = _rollouts_to_save(batch.rollout_id, config.checkpoint.save_interval, num_rollout)
        found = {
            "rewards": equal_rewards(self._seen),
            "gap": growing_gap(self._seen),
            "length": all_truncated(self._seen, limit=config.rollout.rollout_max_response_len) if graded else None,
            "disk": full_disk(self._seen, save=save, need_bytes=_newest_checkpoint(save), rollouts_to_save=to_save),
        }
        new = {rule: line for rule, line in found.items() if line is not None and rule not in self._told}
        self._told |= new.keys()
        return list(new.values())


def _rollouts_to_save(rollout_id: int, interval: int | None, num_rollout: int) -> int | None:
    """After rollout `rollout_id`; None where none is to come."""
    left = num_rollout - rollout_id - 1
    if interval is None or left <= 0:
        return None
    return min(left, interval - (rollout_id + 1) % interval)


def _newest_checkpoint(save: str | None) -> int | None:
    """Bytes of the newest whole checkpoint in the folder."""
    folders = sorted(Path(save).glob("iter_*")) if save else []
    return sum(file.stat().st_size for file in folders[-1].rglob("*") if file.is_file()) if folders else None
