"""Graders by name (`--rm-type`) or by dotted path (`--custom-rm-path`).

Which one grades a sample: its own `custom_rm_path`, else the flag's, else `metadata["rm_type"]`, else `--rm-type`. A type with
the prefix `boxed_` gets only the content of the last \\boxed{} of the response. A grader that cannot grade raises; it never
answers 0. None runs on the event loop of its caller: built-in ones run in worker processes (`slime.rollout.grading`), a user's
on a loop of its own (`own_code.py`), each with a time-out.
"""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

from slime.config.graders import GRADERS, unknown_grader
from slime.rollout.grading.pool import shared_pool
from slime.rollout.grading.question import Question
from slime.rollout.plugins import load_function
from slime.rollout.rm_hub.deepscaler import get_deepscaler_rule_based_reward
from slime.rollout.rm_hub.f1 import f1_score
from slime.rollout.rm_hub.gpqa import compute_gpqa_reward
from slime.rollout.rm_hub.math_dapo_utils import compute_score as compute_score_dapo
from slime.rollout.rm_hub.math_utils import extract_boxed_answer, grade_answer_verl
from slime.rollout.rm_hub.own_code import OwnCode
from slime.rollout.rm_hub.remote import remote_rm
from slime.types.reward import one_reward_each, plain_reward
from slime.types.sample import Sample

__all__ = [
    "async_rm", "batched_async_rm", "compute_gpqa_reward", "compute_score_dapo", "extract_boxed_answer", "f1_score",
    "get_deepscaler_rule_based_reward", "grade_answer_verl", "num_workers", "remote_rm",
]  # fmt: skip

Reward = float | dict[str, Any]

TEXT_SECONDS = 10.0
OWN_SECONDS = 600.0
"""Time-outs where --rm-timeout is not given: a judge that asks another model may take minutes, reading a text may not."""

_own_code: dict[int, OwnCode] = {}


def num_workers(args: Any) -> int:
    """--rm-workers; without it one a core, 4 at least and 16 at most."""
    return getattr(args, "rm_workers", None) or max(4, min(16, os.cpu_count() or 1))


async def async_rm(args: Any, sample: Sample, **kwargs: Any) -> Reward:
    """The reward of one sample. Raises ValueError when no grader is named or the named one cannot grade this sample,
    GradingError when it broke or took too long."""
    path = sample.custom_rm_path or args.custom_rm_path
    if path:
        return plain_reward(await _own(args, path, sample, **kwargs))
    name = (sample.metadata.get("rm_type") or args.rm_type or "").strip()
    if not name:
        raise ValueError("nothing grades the samples: pass --rm-type NAME or --custom-rm-path PATH")
    grader = GRADERS.get(name.removeprefix("boxed_"))
    if grader is None:
        raise ValueError(unknown_grader(name))
    if grader.name == "remote_rm":
        return await remote_rm(args, sample)
    if grader.name == "random":
        # Seeded by the sample: a replayed rollout gets the same rewards.
        return random.Random(f"{args.rollout_seed}/{sample.index}").randint(0, 1)
    question = Question(
        grader=grader.name,
        response=sample.response,
        label=sample.label,
        metadata={key: sample.metadata[key] for key in grader.metadata_keys if key in sample.metadata},
        boxed=name.startswith("boxed_"),
    )
    seconds = getattr(args, "rm_timeout", None) or TEXT_SECONDS
    return await shared_pool(num_workers(args)).grade(question, seconds)


async def _own(args: Any, path: str, samples: Sample | list[Sample], **kwargs: Any) -> Any:
    function = load_function("--custom-rm-path", path)
    runner = _own_code.setdefault(num_workers(args), OwnCode(num_workers(args)))
    seconds = getattr(args, "rm_timeout", None) or OWN_SECONDS
    return await runner.run(lambda: function(args, samples, **kwargs), name=path, seconds=seconds)


async def batched_async_rm(args: Any, samples: list[Sample], **kwargs: Any) -> list[Reward]:
    """Rewards of several samples. --custom-rm-path gets the whole list; the built-in graders get one at a time."""
    if args.custom_rm_path and all(not sample.custom_rm_path for sample in samples):
        answer = await _own(args, args.custom_rm_path, samples, **kwargs)
        return one_reward_each(answer, len(samples), who=f"--custom-rm-path {args.custom_rm_path}")
    return list(await asyncio.gather(*(async_rm(args, sample, **kwargs) for sample in samples)))
