"""On-policy distillation with a teacher behind HTTP: an SGLang server gives the log-prob of every token that the student wrote.

    --use-opd --opd-type sglang --rm-url http://HOST:PORT/generate

With a grader of its own a run asks the teacher in a hook of every sample (`teacher_hook`) and keeps its rewards; without one
the teacher is the grader (`reward_func`) and rewards are 0. Beside a teacher in the trainer's weights (--opd-type megatron)
`no_reward` stands in for a grader. The rule book sets them. The names are those of slime.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

from slime.rollout.http import post
from slime.types.sample import Sample


async def teacher_log_probs(args: Any, sample: Sample) -> list[float]:
    """The teacher's log-prob of each response token. Raises ValueError for an answer that has other tokens or no numbers."""
    tokens = [int(token) for token in sample.tokens]
    payload = {
        "input_ids": tokens,
        # Nothing is generated. The engine scores a prompt at temperature 1, whatever is asked; the rule book asks for 1.
        "sampling_params": {"temperature": args.rollout_temperature, "max_new_tokens": 0, "skip_special_tokens": False},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    answer = await post(args.rm_url, payload)
    scored = (answer.get("meta_info") or {}).get("input_token_logprobs") if isinstance(answer, dict) else None
    if not scored:
        raise ValueError(f"the teacher {args.rm_url} gave no input_token_logprobs; it must be an SGLang server's /generate")
    scored = scored[-sample.response_length :]
    if [int(item[1]) for item in scored] != tokens[-sample.response_length :]:
        raise ValueError(f"the teacher {args.rm_url} scored other tokens than those of sample {sample.index}")
    values = [item[0] for item in scored]
    if any(value is None or math.isnan(value) for value in values):
        raise ValueError(f"the teacher {args.rm_url} gave no log-prob for a response token of sample {sample.index}")
    return [float(value) for value in values]


async def teacher_hook(args: Any, sample: Sample, *, evaluation: bool = False) -> None:
    """A --rollout-sample-hook-path: the sample gets its teacher's log-probs, and its reward from whoever grades."""
    if not evaluation and sample.response_length and not sample.trains_nothing:
        sample.teacher_log_probs = await teacher_log_probs(args, sample)


async def reward_func(args: Any, sample: Sample | list[Sample], **_: Any) -> float | list[float]:
    """A --custom-rm-path for runs that learn from the teacher alone: its log-probs go into the sample, the reward is 0."""
    if isinstance(sample, list):
        return list(await asyncio.gather(*(reward_func(args, one) for one in sample)))
    await teacher_hook(args, sample)
    return 0.0


async def no_reward(args: Any, sample: Sample | list[Sample], **_: Any) -> float | list[float]:
    """A --custom-rm-path for runs that learn from a teacher in weights alone."""
    return [0.0] * len(sample) if isinstance(sample, list) else 0.0


def post_process_rewards(args: Any, samples: list[Sample], **_: Any) -> tuple[list[float], list[float]]:
    """A --custom-reward-post-process-path, as slime's recipes name it beside reward_func: rewards are 0."""
    return [0.0] * len(samples), [0.0] * len(samples)
