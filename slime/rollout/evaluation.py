"""Every evaluation data set at once, with its own sampling settings and grader."""

from __future__ import annotations

import asyncio
import copy
import logging
from typing import Any

from slime.rollout.base_types import Group, RolloutFnEvalOutput, flatten
from slime.rollout.dataset import PromptFormat, read_prompts
from slime.rollout.failures import by_reason
from slime.rollout.generation import GenerateState, enter, generate_and_rm, sampling_params
from slime.rollout.tokenizer import load_tokenizer
from slime.rollout.watch import Watch
from slime.types.sample import Sample, Status

logger = logging.getLogger(__name__)

_MOST_FAILED = 0.5


_read: dict[tuple, list[Sample]] = {}
"""Prompt files are read once per run; the samples are copied for every evaluation."""


def _prompts(dataset: Any, hf_checkpoint: str, on_broken: str) -> list[Sample]:
    form = PromptFormat(
        input_key=dataset.input_key,
        label_key=dataset.label_key,
        metadata_key=dataset.metadata_key,
        tool_key=dataset.tool_key,
        apply_chat_template=dataset.apply_chat_template,
        apply_chat_template_kwargs=dict(dataset.apply_chat_template_kwargs),
    )
    key = (dataset.path, repr(form), dataset.max_prompt_len, hf_checkpoint, on_broken)
    if key not in _read:
        tokenizer = load_tokenizer(hf_checkpoint)
        _read[key] = read_prompts(
            dataset.path, form, tokenizer=tokenizer, max_prompt_len=dataset.max_prompt_len, on_broken=on_broken
        )
    return _read[key]


async def evaluate_rollout(args: Any, rollout_id: int) -> RolloutFnEvalOutput:
    """Rewards of all data sets. Raises RuntimeError when more than half of a data set's samples failed."""
    if not args.datasets:
        raise ValueError("nothing to evaluate: pass --eval-prompt-data NAME FILE or --eval-config FILE")
    base = GenerateState(args, rollout_id=rollout_id)
    try:
        results = await asyncio.gather(*(_evaluate(args, dataset, base) for dataset in args.datasets))
    finally:
        await base.client.close()
    data = {dataset.name: result for dataset, result in zip(args.datasets, results, strict=True)}
    return RolloutFnEvalOutput(data=data)


def _settings(dataset: Any) -> dict[str, Any]:
    return sampling_params(
        temperature=dataset.temperature,
        top_p=dataset.top_p,
        top_k=dataset.top_k,
        max_new_tokens=dataset.max_response_len,
        min_new_tokens=dataset.min_new_tokens,
        stop=dataset.stop,
        stop_token_ids=dataset.stop_token_ids,
        repetition_penalty=dataset.repetition_penalty,
        skip_special_tokens=dataset.skip_special_tokens,
        no_stop_trim=dataset.no_stop_trim,
    )


def _fresh_samples(args: Any, dataset: Any) -> list[Sample]:
    samples = []
    for prompt in _prompts(dataset, args.hf_checkpoint, args.on_broken_prompt_line):
        for _ in range(dataset.n_samples_per_eval_prompt):
            sample = copy.deepcopy(prompt)
            sample.group_index, sample.index = len(samples) // dataset.n_samples_per_eval_prompt, len(samples)
            sample.custom_rm_path = dataset.custom_rm_path
            sample.generate_function_path = dataset.custom_generate_function_path
            sample.metadata |= dict(dataset.metadata_overrides)
            if dataset.rm_type:
                sample.metadata["rm_type"] = dataset.rm_type
            samples.append(sample)
    return samples


async def _evaluate(args: Any, dataset: Any, base: GenerateState) -> dict[str, Any]:
    settings = _settings(dataset)
    state = GenerateState(
        args,
        tokenizer=base.tokenizer,
        client=base.client,
        semaphore=base.semaphore,
        sampling_params=settings,
        max_context_len=dataset.max_context_len,
        rollout_id=base.rollout_id,
    )
    enter(state)
    samples = _fresh_samples(args, dataset)
    tasks = [
        asyncio.create_task(generate_and_rm(args, sample, dict(settings), state=state, evaluation=True)) for sample in samples
    ]

    def waiting() -> tuple[list[Group], int]:
        groups = [[sample] for sample, task in zip(samples, tasks, strict=True) if not task.done()]
        return groups, len(tasks) - len(groups)

    with Watch(waiting, f"evaluation {dataset.name}"):
        samples = flatten(list(await asyncio.gather(*tasks)))
    good = [sample for sample in samples if sample.is_settled]
    failed = len(samples) - len(good)
    if failed:
        last = next(sample.metadata.get("error", sample.status.value) for sample in samples if sample not in good)
        if failed > _MOST_FAILED * len(samples):
            raise RuntimeError(f"evaluation {dataset.name}: {failed} of {len(samples)} samples failed. One error: {last}")
        logger.warning(
            "evaluation %s: %d of %d samples failed and are left out (%s); one error: %s",
            dataset.name, failed, len(samples), by_reason(state.failures), last,
        )  # fmt: skip
    key = args.eval_reward_key or args.reward_key
    return {
        "rewards": [_number(sample, key) for sample in good],
        "truncated": [sample.status is Status.TRUNCATED for sample in good],
        "samples": good,
        "num_failed": failed,
    }


def _number(sample: Sample, key: str | None) -> float:
    if not key:
        if isinstance(sample.reward, dict):
            raise ValueError(
                f"the reward is a mapping with {sorted(sample.reward)}; name one with --eval-reward-key or --reward-key"
            )
        return float(sample.reward)
    if not isinstance(sample.reward, dict) or key not in sample.reward:
        raise ValueError(f"the reward {sample.reward!r} has no key {key!r} (--eval-reward-key or --reward-key)")
    return float(sample.reward[key])
