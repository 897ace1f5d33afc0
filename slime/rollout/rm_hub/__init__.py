"""Graders by name (`--rm-type`) or by dotted path (`--custom-rm-path`).

Which one grades a sample: its own `custom_rm_path`, else the flag's, else `metadata["rm_type"]`, else `--rm-type`. A type with
the prefix `boxed_` gets only the content of the last \\boxed{} of the response. A grader that cannot grade raises; it never
answers 0.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Awaitable, Callable
from typing import Any

from slime.rollout.plugins import load_function
from slime.rollout.rm_hub.dapo import grade_dapo
from slime.rollout.rm_hub.deepscaler import grade_deepscaler
from slime.rollout.rm_hub.f1 import token_f1
from slime.rollout.rm_hub.gpqa import grade_gpqa
from slime.rollout.rm_hub.math_grader import grade_math, last_boxed
from slime.rollout.rm_hub.remote import remote_rm
from slime.types.reward import one_reward_each, plain_reward
from slime.types.sample import Sample

Reward = float | dict[str, Any]


def _text(label: Any) -> str:
    if label is None:
        raise ValueError("the sample has no label to grade against; name its column with --label-key")
    return str(label)


async def _math(args: Any, sample: Sample) -> Reward:
    return int(grade_math(sample.response, _text(sample.label)))


async def _dapo(args: Any, sample: Sample) -> Reward:
    return grade_dapo(sample.response, _text(sample.label))


async def _deepscaler(args: Any, sample: Sample) -> Reward:
    # The symbolic part waits for another process, so it runs beside the event loop.
    return int(await asyncio.to_thread(grade_deepscaler, sample.response, _text(sample.label)))


async def _f1(args: Any, sample: Sample) -> Reward:
    return token_f1(sample.response, _text(sample.label))


async def _gpqa(args: Any, sample: Sample) -> Reward:
    return grade_gpqa(sample.response, sample.label, sample.metadata)


async def _random(args: Any, sample: Sample) -> Reward:
    # Seeded by the sample: a replayed rollout gets the same rewards.
    return random.Random(f"{args.rollout_seed}/{sample.index}").randint(0, 1)


GRADERS: dict[str, Callable[[Any, Sample], Awaitable[Reward]]] = {
    "math": _math,
    "dapo": _dapo,
    "deepscaler": _deepscaler,
    "f1": _f1,
    "gpqa": _gpqa,
    "remote_rm": remote_rm,
    "random": _random,
}


async def async_rm(args: Any, sample: Sample, **kwargs: Any) -> Reward:
    """The reward of one sample. Raises ValueError when no grader is named or the named one does not exist."""
    path = sample.custom_rm_path or args.custom_rm_path
    if path:
        return plain_reward(await load_function("--custom-rm-path", path)(args, sample, **kwargs))
    name = (sample.metadata.get("rm_type") or args.rm_type or "").strip()
    if not name:
        raise ValueError("nothing grades the samples: pass --rm-type NAME or --custom-rm-path PATH")
    boxed = name.startswith("boxed_")
    grader = GRADERS.get(name.removeprefix("boxed_"))
    if grader is None:
        raise ValueError(f"--rm-type {name!r} is not one of {', '.join(sorted(GRADERS))} (or boxed_ before one of them)")
    if boxed:
        sample = dataclasses.replace(sample, response=last_boxed(sample.response) or "")
    return await grader(args, sample)


async def batched_async_rm(args: Any, samples: list[Sample], **kwargs: Any) -> list[Reward]:
    """Rewards of several samples. --custom-rm-path gets the whole list; the built-in graders get one at a time."""
    if args.custom_rm_path and all(not sample.custom_rm_path for sample in samples):
        answer = await load_function("--custom-rm-path", args.custom_rm_path)(args, samples, **kwargs)
        return one_reward_each(answer, len(samples), who=f"--custom-rm-path {args.custom_rm_path}")
    return list(await asyncio.gather(*(async_rm(args, sample, **kwargs) for sample in samples)))
