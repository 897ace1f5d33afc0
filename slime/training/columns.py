"""What a policy step needs beside the rollout: old and reference log-probs, advantages. By sample position, on the host.

Everything here happens on the last pipeline stage only, on every tensor- and context-parallel rank alike, so those ranks hold
equal columns for the samples of their data-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from slime.algorithms import advantages as adv
from slime.algorithms.kl import approx_kl
from slime.parallel import Ranks
from slime.training.importance_functions import weight_moments
from slime.types import RolloutBatch
from slime.types.micro_batch import MicroBatch

if TYPE_CHECKING:
    from slime.config import Config

Column = dict[int, Tensor]


@dataclass
class Columns:
    """Per-token values of this data-parallel rank's samples; a column that was not computed is None."""

    positions: tuple[int, ...]
    old_log_probs: Column | None = None
    ref_log_probs: Column | None = None
    teacher_log_probs: Column | None = None
    """Of a teacher in Megatron's weights; a server's are in the batch."""
    opd_reverse_kl: Column | None = None
    entropy: Column | None = None
    kl: Column | None = None
    advantages: Column | None = None
    returns: Column | None = None
    values: Column | None = None
    """A critic's."""

    def for_critic(self) -> dict[str, Column]:
        """The columns that MicroBatch carries to the critic's steps."""
        assert self.values is not None and self.returns is not None, "values and returns are made before a step"
        return {"values": self.values, "returns": self.returns}

    def for_packing(self) -> dict[str, Column]:
        """The columns that MicroBatch carries."""
        names = ("old_log_probs", "ref_log_probs", "teacher_log_probs", "advantages")
        return {name: column for name in names if (column := getattr(self, name)) is not None}


def split_column(micro: MicroBatch, values: Tensor) -> Column:
    """[r] of a micro-batch -> one host tensor per sample position."""
    lengths = torch.bincount(micro.segments, minlength=micro.num_samples).tolist()
    return dict(zip(micro.positions, values.detach().float().cpu().split(lengths), strict=True))


def fill_advantages(
    columns: Columns, batch: RolloutBatch, config: Config, ranks: Ranks, *, custom: Callable[..., None] | None = None
) -> None:
    """Compute kl, advantages and returns; `custom` replaces the estimator (slime's --custom-advantage-function-path).

    Collective over the data-parallel group with --normalize-advantages.
    """
    rules = config.algorithm
    columns.kl = {position: _kl(columns, position, batch, rules.kl_loss_type) for position in columns.positions}
    if custom is not None:
        call_with_rollout_data(custom, columns, batch, config.args, flag="--custom-advantage-function-path")
    else:
        both = {position: _advantage(columns, position, batch, config) for position in columns.positions}
        columns.advantages = {position: advantages for position, (advantages, _) in both.items()}
        columns.returns = {position: returns for position, (_, returns) in both.items()}
    if rules.use_opd:
        _distil(columns, batch, rules.opd_kl_coef)
    if rules.normalize_advantages:
        _whiten(columns, batch, ranks)


def _distil(columns: Columns, batch: RolloutBatch, coef: float) -> None:
    """On-policy distillation: what the teacher says comes on top of any estimator, the user's own too."""
    teacher = columns.teacher_log_probs
    if teacher is None and batch.teacher_log_probs is None:
        raise ValueError(
            "--use-opd --opd-type sglang: no sample of this rollout has teacher_log_probs; let "
            "slime.rollout.on_policy_distillation ask the teacher, or fill them in a function of your own"
        )
    if teacher is None:
        teacher = {position: torch.from_numpy(batch.teacher_log_probs[position]) for position in columns.positions}
    mine = columns.old_log_probs
    columns.opd_reverse_kl = {p: adv.reverse_kl(mine[p], teacher[p]) for p in columns.positions}
    columns.advantages = {p: adv.distilled(values, mine[p], teacher[p], coef=coef) for p, values in columns.advantages.items()}


def _kl(columns: Columns, position: int, batch: RolloutBatch, kind: str) -> Tensor:
    if columns.old_log_probs is None or columns.ref_log_probs is None:
        return torch.zeros(int(batch.response_lengths[position]))
    return approx_kl(columns.old_log_probs[position], columns.ref_log_probs[position], kind)


def _advantage(columns: Columns, position: int, batch: RolloutBatch, config: Config) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of one sample."""
    rules = config.algorithm
    reward, kl = float(batch.rewards[position]), columns.kl[position]
    mask = torch.from_numpy(batch.loss_masks[position])
    if not mask.any():  # of a removed sample nothing is trained; an estimator may find no place for its reward
        returns = torch.zeros(len(kl))
    elif rules.advantage_estimator == "ppo":
        rewards = adv.token_rewards(reward, kl, mask, kl_coef=rules.kl_coef)
        return adv.generalized(rewards, columns.values[position], mask, gamma=rules.gamma, lambd=rules.lambd)
    elif rules.advantage_estimator == "reinforce_plus_plus":
        returns = adv.reinforce_plus_plus(reward, kl, mask, kl_coef=rules.kl_coef, gamma=rules.gamma)
    elif rules.advantage_estimator == "reinforce_plus_plus_baseline":
        returns = adv.reinforce_plus_plus_baseline(reward, kl, kl_coef=rules.kl_coef)
    else:  # grpo, gspo, cispo, rloo
        returns = adv.broadcast_reward(reward, len(kl))
    return returns, returns


def call_with_rollout_data(hook: Callable[..., None], columns: Columns, batch: RolloutBatch, *first: object, flag: str) -> None:
    """Call hook(*first, rollout_data) with slime's dictionary of this rank's samples, and take its advantages and returns back.

    Lists are in the order of `columns.positions`. Raises ValueError naming `flag` where the hook leaves either out.
    """
    data = _rollout_data(columns, batch)
    hook(*first, data)
    for name in ("advantages", "returns"):
        values = data[name]
        if values is None or len(values) != len(columns.positions):
            raise ValueError(
                f"{flag}: rollout_data[{name!r}] must be {len(columns.positions)} tensors, one per sample; it is "
                f"{values if values is None else len(values)}"
            )
        pairs = zip(columns.positions, values, strict=True)
        setattr(columns, name, {position: torch.as_tensor(value, dtype=torch.float32) for position, value in pairs})


def _rollout_data(columns: Columns, batch: RolloutBatch) -> dict[str, object]:
    order = columns.positions

    def ordered(column: Mapping[int, Tensor] | Sequence | None) -> list | None:
        return None if column is None else [torch.as_tensor(column[position]) for position in order]

    return {
        "tokens": ordered(batch.tokens),
        "response_lengths": [int(batch.response_lengths[p]) for p in order],
        "total_lengths": [len(batch.tokens[p]) for p in order],
        "rewards": [float(batch.rewards[p]) for p in order],
        "raw_reward": [float(batch.raw_rewards[p]) for p in order],
        "truncated": [int(batch.truncated[p]) for p in order],
        "loss_masks": ordered(batch.loss_masks),
        "sample_indices": [int(batch.sample_ids[p]) for p in order],
        "rollout_ids": [int(batch.trajectories[p]) for p in order],
        "metadata": None if batch.metadata is None else [batch.metadata[p] for p in order],
        "kl": ordered(columns.kl),
        "log_probs": ordered(columns.old_log_probs),
        "ref_log_probs": ordered(columns.ref_log_probs),
        "rollout_log_probs": ordered(batch.rollout_log_probs),
        "teacher_log_probs": ordered(columns.teacher_log_probs or batch.teacher_log_probs),
        "opd_reverse_kl": ordered(columns.opd_reverse_kl),
        "advantages": ordered(columns.advantages),
        "returns": ordered(columns.returns),
        "values": ordered(columns.values),
    }


def save_train_data(template: str, columns: Columns, batch: RolloutBatch, ranks: Ranks) -> None:
    """--save-debug-train-data: slime's dictionary of what the steps train on, as torch.save files {"rollout_id", "rank",
    "rollout_data"}.

    With {rank} in the name one file per data-parallel rank, else one file of all ranks' samples. Collective over dp_group.
    """
    data = _rollout_data(columns, batch)
    path = template.replace("{rollout_id}", str(batch.rollout_id))
    is_first = ranks.tp_rank == 0 and ranks.cp_rank == 0
    if "{rank}" in path:
        path = path.replace("{rank}", str(ranks.rank))
    else:
        parts: list[dict] = [{}] * ranks.dp_size
        dist.all_gather_object(parts, data, group=ranks.dp_group)
        data = {
            name: None if value is None else [item for part in parts for item in part[name]] for name, value in data.items()
        }
        is_first = is_first and ranks.dp_rank == 0
    if not is_first:
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"rollout_id": batch.rollout_id, "rank": ranks.rank, "rollout_data": data}, path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch's
        raise OSError(f"--save-debug-train-data: {path} cannot be written ({error})") from error


def mean_importance_weight(
    columns: Columns, positions: Sequence[int], batch: RolloutBatch, config: Config, ranks: Ranks
) -> float:
    """Of a whole step's trained tokens (samples, above the level of tokens); positions: this rank's of the step. Collective."""
    if batch.rollout_log_probs is None:
        raise ValueError("--tis-batch-normalize needs the engine's log-probs, but this rollout has none")
    moments = torch.zeros(2, dtype=torch.float64)
    for position in positions:
        moments += weight_moments(
            config.args,
            train_log_probs=columns.old_log_probs[position],
            rollout_log_probs=torch.from_numpy(batch.rollout_log_probs[position]),
            mask=torch.from_numpy(batch.loss_masks[position]),
        )
    count, total = _summed(moments, ranks).tolist()
    return total / count if total > 0 else 1.0


def _summed(moments: Tensor, ranks: Ranks) -> Tensor:
    """Over data-parallel ranks, those without a sample too. Context-parallel ranks hold equal columns and count once."""
    gathered: list[Tensor] = [torch.zeros_like(moments)] * ranks.dp_size
    dist.all_gather_object(gathered, moments, group=ranks.dp_group)
    return torch.stack(gathered).sum(0)


def _whiten(columns: Columns, batch: RolloutBatch, ranks: Ranks) -> None:
    masks = {position: torch.from_numpy(batch.loss_masks[position]) for position in columns.positions}
    moments = torch.zeros(3, dtype=torch.float64)
    for position in columns.positions:
        moments += adv.masked_moments(columns.advantages[position], masks[position])
    whole = _summed(moments, ranks)
    columns.advantages = {position: adv.whitened(values, whole) for position, values in columns.advantages.items()}


def rollout_metrics(columns: Columns, batch: RolloutBatch, ranks: Ranks) -> dict[str, float]:
    """slime's train-side rollout/ values: mean over samples of the mean over a sample's trained tokens. Collective over
    dp_group."""
    metrics = {
        "rollout/rewards": float(batch.rewards.mean()),
        "rollout/raw_reward": float(batch.raw_rewards.mean()),
        "rollout/truncated": float(batch.truncated.mean()),
        "rollout/response_lengths": float(batch.response_lengths.mean()),
        "rollout/total_lengths": float(batch.total_lengths.mean()),
    }
    token_columns: dict[str, Mapping[int, Tensor]] = {}
    for name in (
        "old_log_probs", "ref_log_probs", "teacher_log_probs", "opd_reverse_kl", "entropy", "kl", "advantages", "returns",
        "values",
    ):  # fmt: skip
        column = getattr(columns, name)
        if column is not None:
            token_columns["log_probs" if name == "old_log_probs" else name] = column
    for name in ("rollout_log_probs", "teacher_log_probs"):
        column = getattr(batch, name)
        if column is not None:
            token_columns[name] = {position: torch.from_numpy(column[position]) for position in columns.positions}
    sums = {
        name: sum(_masked_mean(column[p], batch.loss_masks[p]) for p in columns.positions)
        for name, column in token_columns.items()
    }
    shares: list[dict[str, float]] = [{}] * ranks.dp_size
    dist.all_gather_object(shares, sums, group=ranks.dp_group)
    for name in token_columns:
        metrics[f"rollout/{name}"] = sum(share[name] for share in shares) / len(batch)
    return metrics


def _masked_mean(values: Tensor, mask) -> float:
    keep = torch.from_numpy(mask) > 0
    return float(values[keep].double().mean()) if bool(keep.any()) else 0.0
