"""What a rollout and an evaluation say about themselves, under slime's names."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from slime.rollout.base_types import Group, flatten
from slime.types.reward import plain_reward
from slime.types.sample import Sample, Status

_REPETITION_TAIL = 10_000
_REPETITION_RATIO = 10


def statistics(prefix: str, values: list[float]) -> dict[str, float]:
    """prefix/mean, median, max, min."""
    if not values:
        return {}
    column = np.asarray(values, dtype=np.float64)
    return {
        f"{prefix}/mean": float(column.mean()),
        f"{prefix}/median": float(np.median(column)),
        f"{prefix}/max": float(column.max()),
        f"{prefix}/min": float(column.min()),
    }


def repeats_itself(text: str) -> bool:
    """The last 10,000 characters compress more than tenfold: a loop, not prose."""
    tail = text[-_REPETITION_TAIL:].encode(errors="surrogatepass")
    return len(tail) > 0 and len(tail) / len(zlib.compress(tail)) > _REPETITION_RATIO


def _number(reward: Any) -> float | None:
    """The number in a reward: itself, or the only usual name of a mapping."""
    if isinstance(reward, Mapping):
        reward = next((reward[key] for key in ("score", "reward", "acc") if key in reward), None)
    reward = plain_reward(reward)
    return float(reward) if isinstance(reward, int | float) else None


def _common(prefix: str, samples: list[Sample]) -> dict[str, float]:
    lengths = [float(sample.effective_response_length) for sample in samples]
    truncated = [sample.status is Status.TRUNCATED for sample in samples]
    repeated = [repeats_itself(sample.response) for sample in samples]
    return statistics(f"{prefix}response_len", lengths) | {
        f"{prefix}truncated_ratio": float(np.mean(truncated)),
        f"{prefix}repetition_frac": float(np.mean(repeated)),
    }


def rollout_metrics(groups: list[Group], extra: Mapping[str, float] | None = None) -> dict[str, float]:
    """rollout/* of the groups that are trained, plus what the rollout function counted itself (`extra`)."""
    samples = [sample for group in groups for sample in flatten(group)]
    if not samples:
        return dict(extra or {})
    metrics = _common("rollout/", samples)
    rewards = [_number(sample.reward) for sample in samples]
    if None not in rewards:
        metrics["rollout/raw_reward"] = float(np.mean(rewards))
        metrics |= _zero_std(groups)
    versions = [version for sample in samples for version in sample.weight_versions]
    numbers = [int(version) for version in versions if version.lstrip("-").isdigit()]
    if numbers:
        metrics |= {"rollout/weight_version/min": float(min(numbers)), "rollout/weight_version/max": float(max(numbers))}
        metrics["rollout/mixed_versions_ratio"] = float(np.mean([len(set(sample.weight_versions)) > 1 for sample in samples]))
    metrics |= _engine_metrics(samples)
    metrics |= dict(extra or {})
    seconds = metrics.get("perf/rollout_time")
    if seconds:
        metrics["perf/tokens_per_sec"] = sum(sample.response_length for sample in samples) / seconds
    return metrics


def _zero_std(groups: list[Group]) -> dict[str, float]:
    """Groups without a difference in reward train nothing: how many of them, and at which reward."""
    counts: Counter[float] = Counter()
    for group in groups:
        rewards = [_number(sample.reward) for sample in flatten(group)]
        if len(rewards) > 1 and max(rewards) - min(rewards) < 1e-6:
            counts[round(rewards[0], 1)] += 1
    return {f"rollout/zero_std/count_{reward}": float(count) for reward, count in sorted(counts.items())} | {
        "rollout/zero_std/ratio": counts.total() / len(groups)
    }


def _engine_metrics(samples: list[Sample]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    cached = sum(sample.prefix_cache_info.cached_tokens for sample in samples)
    prompted = sum(sample.prefix_cache_info.total_prompt_tokens for sample in samples)
    if prompted:
        metrics["rollout/prefix_cache_hit_rate"] = cached / prompted
        metrics["rollout/avg_cached_tokens_per_sample"] = cached / len(samples)
    drafted = sum(sample.spec_info.spec_draft_token_num for sample in samples)
    verified = sum(sample.spec_info.spec_verify_ct for sample in samples)
    if drafted:
        metrics["rollout/spec_accept_rate"] = sum(sample.spec_info.spec_accept_token_num for sample in samples) / drafted
    if verified:
        metrics["rollout/spec_accept_length"] = sum(sample.spec_info.completion_token_num for sample in samples) / verified
    told = [sample.rollout_top_p_token_offsets for sample in samples if sample.rollout_top_p_token_offsets is not None]
    if drawn := sum(int((np.diff(offsets) > 0).sum()) for offsets in told):
        metrics["rollout/top_p_kept_vocab_per_token"] = sum(int(offsets[-1]) for offsets in told) / drawn
    columns = [column for sample in samples for column in (sample.rollout_routed_experts, sample.rollout_indexer_topk)]
    chosen = [column.nbytes for column in columns if column is not None]
    if chosen:
        metrics["perf/rollout_replay_bytes"] = float(sum(chosen))
    waited = [sample.non_generation_time for sample in samples]
    if any(waited):
        metrics |= statistics("perf/non_generation_time", waited)
    return metrics


def pass_at_k(correct: list[bool], k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from n of which c are (arXiv 2107.03374)."""
    n, c = len(correct), sum(correct)
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def evaluation_metrics(data: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """eval/{name} (mean reward) and what goes with it; pass@k where a prompt has several samples."""
    metrics: dict[str, float] = {}
    for name, result in data.items():
        rewards = [float(reward) for reward in result["rewards"]]
        metrics[f"eval/{name}"] = float(np.mean(rewards)) if rewards else float("nan")
        if result.get("truncated"):
            metrics[f"eval/{name}-truncated_ratio"] = float(np.mean(result["truncated"]))
        samples = result.get("samples") or []
        if samples:
            metrics |= _common(f"eval/{name}/", samples)
            groups: dict[Any, list[bool]] = {}
            for reward, sample in zip(rewards, samples, strict=True):
                groups.setdefault(sample.group_index, []).append(reward == 1)
            metrics |= _pass_rates(f"eval/{name}-", list(groups.values()))
        if result.get("num_failed"):
            metrics[f"eval/{name}/num_failed"] = float(result["num_failed"])
    return metrics


def _pass_rates(prefix: str, groups: list[list[bool]]) -> dict[str, float]:
    """prefix + pass@k for k = 2, 4, 8, ... up to the smallest group."""
    smallest = min(map(len, groups))
    rates, k = {}, 2
    while k <= smallest:
        rates[f"{prefix}pass@{k}"] = float(np.mean([pass_at_k(correct, k) for correct in groups]))
        k *= 2
    return rates


# ------------------------------------------------------------------------------------------- what flags ask for besides


def asked_metrics(args: Any, groups: list[Group]) -> dict[str, float]:
    """What --log-passrate, --log-correct-samples, --log-multi-turn and --log-reward-category add."""
    samples = [sample for group in groups for sample in flatten(group)]
    metrics: dict[str, float] = {}
    if not samples:
        return metrics
    if args.log_passrate:
        metrics |= _pass_rates("passrate/", [[_number(sample.reward) == 1 for sample in flatten(group)] for group in groups])
    if args.log_correct_samples:
        metrics |= _correct(samples)
    if args.log_multi_turn:
        metrics |= _multi_turn(samples)
    if args.log_reward_category:
        metrics |= _categories(samples, args.log_reward_category)
    return metrics


def _correct(samples: list[Sample]) -> dict[str, float]:
    """The share of samples with reward 1, and how long those are."""
    correct = [sample for sample in samples if _number(sample.reward) == 1]
    lengths = [float(sample.effective_response_length) for sample in correct]
    share = {"rollout/correct_ratio": len(correct) / len(samples)}
    return share | statistics("rollout/correct_response_len", lengths)


def _multi_turn(samples: list[Sample]) -> dict[str, float]:
    """Lengths with and without what the environment said, and the turns that a generate function counted in its metadata."""
    rounds = [float(sample.metadata["round_number"]) for sample in samples if "round_number" in sample.metadata]
    return (
        statistics("multi_turn/raw_response_length", [float(sample.response_length) for sample in samples])
        | statistics("multi_turn/wo_obs_response_length", [float(sample.effective_response_length) for sample in samples])
        | statistics("multi_turn/round_number", rounds)
    )


def _categories(samples: list[Sample], key: str) -> dict[str, float]:
    """The share of samples per value of `key` in their reward mapping."""
    found: Counter[str] = Counter()
    for sample in samples:
        if not isinstance(sample.reward, Mapping) or key not in sample.reward:
            raise ValueError(
                f"--log-reward-category {key}: the reward of sample {sample.index} is {sample.reward!r}, without such an entry"
            )
        found[str(sample.reward[key])] += 1
    return {f"rollout/error_cat/{category}": count / len(samples) for category, count in sorted(found.items())}
