"""What a --custom-convert-samples-to-train-data-path function gives, with slime's keys, as the columns of a RolloutBatch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from slime.config import view_for_call
from slime.rollout.plugins import load_function
from slime.types import RolloutBatch
from slime.types.kept_words import KeptWords
from slime.types.sample import Sample
from slime.types.selections import Selections

logger = logging.getLogger(__name__)

FLAG = "--custom-convert-samples-to-train-data-path"
_REQUIRED = ("tokens", "response_lengths", "rewards", "loss_masks", "rollout_ids")
_KEPT_WORDS = ("rollout_top_p_token_ids", "rollout_top_p_token_offsets")
_REPLAYED = (
    ("most_kept_words", "--rollout-top-p or --rollout-top-k, which training takes again,", _KEPT_WORDS),
    ("use_rollout_routing_replay", "--use-rollout-routing-replay", ("rollout_routed_experts",)),
    ("use_rollout_indexer_replay", "--use-rollout-indexer-replay", ("rollout_indexer_topk",)),
)
"""(attribute of args, how a user knows it, columns that it trains with)."""
_OPTIONAL = (
    "raw_reward", "truncated", "sample_indices", "group_indices", "rollout_log_probs", "teacher_log_probs", "metadata",
    *(name for _, _, names in _REPLAYED for name in names),
)  # fmt: skip
_PLANNED = "rollout_mask_sums"
"""slime's denominators; here the driver makes them of loss_masks and rollout_ids."""


def from_custom(args: Any, samples: list[Sample], groups: np.ndarray, rollout_id: int) -> RolloutBatch:
    """groups: int64 [len(samples)], for rows that are the samples one to one. Raises ValueError naming the function."""
    path = args.custom_convert_samples_to_train_data_path
    data = load_function(FLAG, path)(view_for_call(args), samples)
    who = f"{FLAG} {path}"
    _check_keys(data, args, who)
    n = len(data["tokens"])
    column = data.get("group_indices", groups if n == len(samples) else None)
    if column is None:
        raise ValueError(
            f"{path} turned {len(samples)} samples into {n} rows; add a key group_indices that says which prompt each is of"
        )

    def column_of(key: str, kind: type) -> tuple[np.ndarray, ...]:
        try:
            return tuple(np.asarray(row, dtype=kind) for row in data[key])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{who}: column {key}: {error}") from None

    def per_token(key: str) -> tuple[np.ndarray, ...] | None:
        return column_of(key, np.float32) if data.get(key) is not None else None

    _, trajectories = np.unique(np.asarray(data["rollout_ids"]), return_inverse=True)
    batch = RolloutBatch(
        rollout_id=rollout_id,
        tokens=column_of("tokens", np.int64),
        response_lengths=np.asarray(data["response_lengths"], dtype=np.int64),
        loss_masks=per_token("loss_masks"),
        rewards=finite_column(data["rewards"], samples, who),
        raw_rewards=finite_column(data.get("raw_reward", data["rewards"]), samples, who),
        groups=np.asarray(column, dtype=np.int64),
        trajectories=trajectories.astype(np.int64),
        sample_ids=np.asarray(data.get("sample_indices", np.arange(n)), dtype=np.int64),
        truncated=np.asarray(data.get("truncated", np.zeros(n)), dtype=bool),
        rollout_log_probs=per_token("rollout_log_probs"),
        teacher_log_probs=per_token("teacher_log_probs"),
        routed_experts=_experts(data["rollout_routed_experts"], args) if args.use_rollout_routing_replay else None,
        indexer_topk=_selections(data["rollout_indexer_topk"], who) if args.use_rollout_indexer_replay else None,
        metadata=None if (told := data.get("metadata")) is None else tuple(row or {} for row in told),
    )
    _compare_mask_sums(data, batch, who)
    return replace(batch, kept_words=_kept_words(data, batch, who)) if args.most_kept_words else batch


def finite_column(rewards: Any, samples: list[Sample], who: str) -> np.ndarray:
    """float32 [n]. Raises ValueError naming `who` and the sample of the first that is no finite number."""
    try:
        with np.errstate(over="ignore"):
            column = np.asarray(rewards, dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{who}: rewards are no numbers ({error})") from None
    odd = np.flatnonzero(~np.isfinite(column.reshape(-1)))
    if len(odd):
        index = samples[odd[0]].index if len(samples) == len(column) else odd[0]
        raise ValueError(f"{who}: the reward of sample {index} is {column.reshape(-1)[odd[0]]}; expected a finite number")
    return column


def _check_keys(data: Any, args: Any, who: str) -> None:
    """What training needs is there; what nobody reads is said."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{who} gave a {type(data).__name__}; expected a mapping of columns")
    missing = [key for key in _REQUIRED if key not in data]
    if missing:
        raise ValueError(f"{who}: its mapping lacks {', '.join(missing)}")
    for attribute, flag, names in _REPLAYED:
        missing = [name for name in names if data.get(name) is None]
        if getattr(args, attribute) and missing:
            raise ValueError(
                f"{who}: its mapping lacks {' and '.join(missing)}, without which {flag} cannot be trained; hand on what each "
                f"sample has under {'that name' if len(missing) == 1 else 'these names'}"
            )
    if any(row is not None for row in data.get("multimodal_train_inputs") or ()):
        raise ValueError(f"{who}: its mapping has multimodal_train_inputs, but this version trains text alone")
    known = {*_REQUIRED, *_OPTIONAL, _PLANNED, "multimodal_train_inputs"}
    unread = sorted(str(key) for key in data if key not in known)
    if unread:
        _say_once(f"{who}: nothing reads its columns {', '.join(unread)}; metadata is handed to functions of the training side")


def _kept_words(data: Mapping[str, Any], batch: RolloutBatch, who: str) -> tuple[KeptWords, ...]:
    told = [list(data[name]) for name in _KEPT_WORDS]
    for name, rows in zip(_KEPT_WORDS, told, strict=True):
        if len(rows) != len(batch):
            raise ValueError(f"{who}: column {name} has {len(rows)} rows, but there are {len(batch)} samples")
    column = []
    for row, (ids, offsets) in enumerate(zip(*told, strict=True)):
        n, trained = int(batch.response_lengths[row]), batch.loss_masks[row] > 0
        if ids is None and offsets is None and not trained.any():
            column.append(KeptWords.of_nothing(n))
            continue
        column.append(KeptWords.of_response(ids, offsets, batch.tokens[row][-n:], trained, who=f"{who}, row {row}"))
    return tuple(column)


def _experts(told: Any, args: Any) -> tuple[np.ndarray, ...]:
    """None of a row stands for a sample of which nothing is trained."""
    nothing = np.zeros((0, args.num_layers, args.moe_router_topk), np.uint8)
    return tuple(nothing if row is None else np.asarray(row) for row in told)


def _selections(told: Any, who: str) -> tuple[Selections, ...]:
    """None of a row stands for a sample of which nothing is trained."""
    rows = tuple(Selections(()) if row is None else row for row in told)
    odd = next((number for number, row in enumerate(rows) if not isinstance(row, Selections)), None)
    if odd is not None:
        raise ValueError(
            f"{who}: rollout_indexer_topk of row {odd} is a {type(rows[odd]).__name__}; hand on the sample's own, which it has "
            "under that name"
        )
    return rows


def _compare_mask_sums(data: Mapping[str, Any], batch: RolloutBatch, who: str) -> None:
    if (told := data.get(_PLANNED)) is None:
        return
    own = np.bincount(batch.trajectories, weights=batch.mask_sums)[batch.trajectories]
    told = np.asarray(told, np.float64).reshape(-1)
    if told.shape != own.shape or not np.allclose(told, own):
        _say_once(
            f"{who}: its {_PLANNED} are {told[:4].tolist()}, the masks of its trajectories sum to {own[:4].tolist()}; losses "
            "are divided by the latter"
        )


@cache
def _say_once(sentence: str) -> None:
    logger.warning(sentence)
