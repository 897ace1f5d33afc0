"""Groups of samples -> one RolloutBatch: the only door from the rollout to training.

A column is there for all samples or for none; where some have it and some do not, that is an error with the sample's index,
never a decision made by the first sample. Samples of which nothing is trained need none.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

from slime.algorithms.rewards import leave_one_out, normalize_by_group, overlong_penalty
from slime.config import view_for_call
from slime.config.training import CENTRED
from slime.rollout.base_types import Group, flatten
from slime.rollout.custom_columns import finite_column, from_custom
from slime.rollout.plugins import load_function
from slime.types import RolloutBatch
from slime.types.kept_words import KeptWords
from slime.types.reward import plain_reward
from slime.types.sample import Sample, Status
from slime.types.selections import Selections

_SCALED = ("grpo", "gspo", "cispo")


def make_rollout_batch(groups: list[Group], *, rollout_id: int, config: Any) -> RolloutBatch:
    """Row i is the i-th sample of the flattened groups. Raises ValueError naming the sample that cannot be trained."""
    args = config.args
    samples, group_column = _rows(groups)
    if not samples:
        raise ValueError(f"rollout {rollout_id + 1} has no samples to train on")
    for sample in samples:
        _check_trainable(sample, rollout_id)
    samples = [_with_a_response(sample) for sample in samples]
    if args.custom_convert_samples_to_train_data_path:
        return from_custom(args, samples, group_column, rollout_id)
    raw, rewards = _rewards(args, samples, group_column)
    return RolloutBatch(
        rollout_id=rollout_id,
        tokens=tuple(np.asarray(sample.tokens, dtype=np.int64) for sample in samples),
        response_lengths=np.array([sample.response_length for sample in samples], dtype=np.int64),
        loss_masks=tuple(_loss_mask(sample) for sample in samples),
        rewards=rewards,
        raw_rewards=raw,
        groups=group_column,
        trajectories=_trajectories(samples),
        sample_ids=_sample_ids(samples),
        truncated=np.array([sample.status is Status.TRUNCATED for sample in samples], dtype=bool),
        rollout_log_probs=_optional(samples, "rollout_log_probs"),
        teacher_log_probs=_optional(samples, "teacher_log_probs"),
        routed_experts=_routed_experts(args, samples),
        kept_words=_kept_words(args, samples),
        indexer_topk=_selections(args, samples),
        metadata=_train_metadata(samples),
        weight_versions=tuple(tuple(sample.weight_versions) for sample in samples),
    )


def _rows(groups: list[Group]) -> tuple[list[Sample], np.ndarray]:
    """Flattened samples and the position of their group: whatever a plugin wrote into group_index, one group is one group."""
    samples: list[Sample] = []
    column: list[int] = []
    for position, group in enumerate(groups):
        members = flatten(group) if isinstance(group, list) else [group]
        samples += members
        column += [position] * len(members)
    return samples, np.array(column, dtype=np.int64)


def _check_trainable(sample: Sample, rollout_id: int) -> None:
    where = f"rollout {rollout_id + 1}, sample {sample.index}"
    sample.status = Status(sample.status)  # a plugin may have set "completed"
    if sample.status not in (Status.COMPLETED, Status.TRUNCATED) and not sample.is_settled:
        raise ValueError(f"{where} is {sample.status.value}; only completed and truncated samples are trained")
    if sample.response_length == 0 and not sample.remove_sample:
        raise ValueError(f"{where} has no response token; set its remove_sample, or drop it in the rollout function")
    if sample.multimodal_train_inputs:
        found = ", ".join(sample.multimodal_train_inputs)
        raise ValueError(f"{where} has multimodal_train_inputs ({found}), but this version trains text alone")
    sample.validate()


def _with_a_response(sample: Sample) -> Sample:
    """A removed sample may be empty, a row may not: one masked token (id 0, which every vocabulary has) stands for it."""
    if sample.response_length > 0:
        return sample
    row = copy.copy(sample)
    row.tokens, row.response_length, row.loss_mask = [*sample.tokens, 0] if len(sample.tokens) else [0, 0], 1, [0]
    row.rollout_log_probs = row.teacher_log_probs = None
    row.rollout_top_p_token_ids = row.rollout_top_p_token_offsets = None
    return row


def _loss_mask(sample: Sample) -> np.ndarray:
    if sample.remove_sample:
        return np.zeros(sample.response_length, dtype=np.float32)
    if sample.loss_mask is None:
        return np.ones(sample.response_length, dtype=np.float32)
    return np.asarray(sample.loss_mask, dtype=np.float32)


def _trajectories(samples: list[Sample]) -> np.ndarray:
    """Samples with the same rollout_id share a trajectory; None is a trajectory of its own, with a number nobody else uses."""
    numbers: dict[object, int] = {}
    keys = [("own", row) if sample.rollout_id is None else ("shared", sample.rollout_id) for row, sample in enumerate(samples)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _sample_ids(samples: list[Sample]) -> np.ndarray:
    known = [sample.index for sample in samples if sample.index is not None]
    if len(set(known)) == len(samples):
        return np.array(known, dtype=np.int64)
    # Fan-out siblings carry one index, plugins may carry none: positions are unique at least within the rollout.
    return np.arange(len(samples), dtype=np.int64)


def _optional(samples: list[Sample], name: str) -> tuple[np.ndarray, ...] | None:
    columns = [getattr(sample, name) for sample in samples]
    present = [column is not None for column in columns]
    if not any(present):
        return None
    for row, sample in enumerate(samples):
        if columns[row] is None and sample.trains_nothing:
            columns[row] = [0.0] * sample.response_length
        elif columns[row] is None:
            raise ValueError(
                f"sample {sample.index} has no {name}, but {sum(present)} of {len(samples)} samples of this rollout have; "
                f"give it to all or none"
            )
    return tuple(np.asarray(column, dtype=np.float32) for column in columns)


def _routed_experts(args: Any, samples: list[Sample]) -> tuple[np.ndarray, ...] | None:
    """What the engines said with --use-rollout-routing-replay: nothing of tokens after the last request, nor of samples that
    train nothing."""
    if not args.use_rollout_routing_replay:
        return None
    column = []
    for sample in samples:
        said = sample.rollout_routed_experts
        if said is None and not sample.trains_nothing:
            raise ValueError(
                f"sample {sample.index} has no routed experts, which --use-rollout-routing-replay trains with; ask the engine "
                "for them (return_routed_experts) and hand meta_info to append_response_tokens"
            )
        nothing = np.zeros((0, args.num_layers, args.moe_router_topk), np.uint8)
        # Of an answer that a stop string cut there may be a row more than tokens need.
        column.append(nothing if said is None else np.asarray(said)[: len(sample.tokens) - 1])
    return tuple(column)


def _kept_words(args: Any, samples: list[Sample]) -> tuple[KeptWords, ...] | None:
    """What top-p and top-k left each response token to be drawn from, where they cut the vocabulary."""
    if not args.most_kept_words:
        return None
    column = []
    for sample in samples:
        n = sample.response_length
        if sample.rollout_top_p_token_ids is None and not sample.trains_nothing:
            raise ValueError(
                f"sample {sample.index} does not tell what top-p or top-k left of the vocabulary, which training takes again; "
                "ask with the sampling_params that the generate function is given, and hand meta_info to append_response_tokens"
            )
        if sample.rollout_top_p_token_ids is None:
            column.append(KeptWords.of_nothing(n))
            continue
        ids, offsets = sample.rollout_top_p_token_ids, sample.rollout_top_p_token_offsets
        tokens = np.asarray(sample.tokens[len(sample.tokens) - n :])
        trained = _loss_mask(sample) > 0
        column.append(KeptWords.of_response(ids, offsets, tokens, trained, who=f"sample {sample.index}"))
    return tuple(column)


def _train_metadata(samples: list[Sample]) -> tuple[Mapping[str, Any], ...] | None:
    """{} of a sample without, where another has some: a plugin may note only what is odd."""
    if not any(sample.train_metadata for sample in samples):
        return None
    return tuple(sample.train_metadata or {} for sample in samples)


def _selections(args: Any, samples: list[Sample]) -> tuple[Selections, ...] | None:
    """What the engines' sparse attention read, with --use-rollout-indexer-replay."""
    if not args.use_rollout_indexer_replay:
        return None
    for sample in samples:
        if sample.rollout_indexer_topk is None and not sample.trains_nothing:
            raise ValueError(
                f"sample {sample.index} has no selections, which --use-rollout-indexer-replay trains with; ask the engine for "
                "them (return_indexer_topk) and hand meta_info to append_response_tokens"
            )
    return tuple(sample.rollout_indexer_topk or Selections(()) for sample in samples)


def raw_reward(args: Any, sample: Sample) -> float:
    """What the grader said; a plugin that shapes rewards leaves the original in metadata["raw_reward"]."""
    value = plain_reward(sample.metadata.get("raw_reward", None))
    value = sample.get_reward_value(args) if value is None else value
    if not isinstance(value, int | float):
        raise ValueError(f"the reward of sample {sample.index} is {value!r}, not a number; name its entry with --reward-key")
    return float(value)


def _rewards(args: Any, samples: list[Sample], groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(raw, what advantages are made of), float32 [n]."""
    if args.custom_reward_post_process_path:
        path = args.custom_reward_post_process_path
        answer = load_function("--custom-reward-post-process-path", path)(view_for_call(args), samples)
        who = f"--custom-reward-post-process-path {path}"
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise ValueError(f"{who} gave a {type(answer).__name__}; expected (raw_rewards, rewards)")
        raw, rewards = answer
        if len(raw) != len(samples) or len(rewards) != len(samples):
            raise ValueError(
                f"--custom-reward-post-process-path {path} gave {len(raw)} and {len(rewards)} rewards for {len(samples)}"
            )
        return finite_column(raw, samples, who), finite_column(rewards, samples, who)
    raw = np.array([raw_reward(args, sample) for sample in samples], dtype=np.float32)
    shaped = np.array([float(sample.get_reward_value(args)) for sample in samples], dtype=np.float32)
    if args.overlong_buffer_len:
        shaped += overlong_penalty(
            np.array([sample.response_length for sample in samples]),
            longest=args.rollout_max_response_len,
            buffer=args.overlong_buffer_len,
            factor=args.overlong_penalty_factor,
        ).astype(np.float32)
    if args.advantage_estimator == "rloo":
        return raw, leave_one_out(shaped, groups)
    if not args.rewards_normalization or args.advantage_estimator not in CENTRED:
        return raw, shaped
    divide = args.advantage_estimator in _SCALED and args.grpo_std_normalization
    return raw, normalize_by_group(shaped, groups, divide)
