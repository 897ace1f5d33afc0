"""One sample: prompt ids, one request to the router, the answer appended, hooks, reward. One group: n of them.

A sample that breaks (the engine refuses it, the generate function or the grader raises) ends as FAILED with the reason in
`metadata["error"]` and without a reward. The loop above counts such groups and stops the run when there are many; nothing is
scored 0 because something broke.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import inspect
import logging
import math
import re
import time
import uuid
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from slime.config import view_for_call
from slime.engine.client import RETURN_KEPT_WORDS, RouterClient
from slime.rollout.base_types import Group, flatten
from slime.rollout.failures import told
from slime.rollout.grading.pool import GradingError
from slime.rollout.http import enter_servers, persistently, router_url
from slime.rollout.plugins import accepted_keywords, load_function
from slime.rollout.rm_hub import async_rm, batched_async_rm
from slime.rollout.tokenizer import load_tokenizer
from slime.rollout.ungraded import keep_ungraded
from slime.types.reward import plain_reward
from slime.types.sample import Sample, Status

logger = logging.getLogger(__name__)

_TRIES = 4
_FAILURES_SHOWN = 3
_FLOAT32_MAX = 3.4028234e38
_FINISHED = (Status.COMPLETED, Status.TRUNCATED)


@dataclass
class GenerateState:
    """What the samples of one rollout share."""

    args: Any
    tokenizer: Any = None
    client: RouterClient | None = None
    semaphore: asyncio.Semaphore | None = None
    """Bounds the samples that are being generated."""
    sampling_params: dict[str, Any] = field(default_factory=dict)
    max_context_len: int | None = None
    """Most tokens of prompt and response together; None does not bound them."""
    failures: Counter = field(default_factory=Counter)
    """What broke -> samples: grading_timeout, grading_KeyError, generation_EngineError."""
    told: set[str] = field(default_factory=set)
    """What has been said about failures; said once."""
    aborted: bool = False
    """Set when the rollout has enough: samples still waiting do not start."""
    rollout_id: int = 0
    generating: set[int] = field(default_factory=set)
    """id() of the samples that are with an engine or a generate function just now; the others wait their turn or are graded."""
    processor: None = None
    """Of images, which models of slime's may have: here text alone is trained."""
    pendings: set[asyncio.Task] = field(default_factory=set)
    """Groups in flight, for rollout functions that keep them here: submit_generate_tasks() puts them in, abort() ends them."""
    remaining_batch_size: int = 0
    """Groups submitted and not dropped; such a function's to count."""

    def __post_init__(self) -> None:
        args = self.args
        self.tokenizer = self.tokenizer or load_tokenizer(args.hf_checkpoint)
        concurrency = num_concurrent(args)
        if self.client is None:
            self.client = RouterClient(router_url(args), getattr(args, "engine_token", None) or "", connections=concurrency)
        self.semaphore = self.semaphore or asyncio.Semaphore(concurrency)
        self.sampling_params = self.sampling_params or rollout_sampling_params(args)

    def submit_generate_tasks(self, groups: list[Group]) -> None:
        """Start these groups; `pendings` holds their tasks, and abort() in this loop finds them."""
        _OF_LOOP[asyncio.get_running_loop()] = self
        for group in groups:
            call = generate_and_rm_group(self.args, group, dict(self.sampling_params), state=self)
            self.pendings.add(asyncio.create_task(call))
        self.remaining_batch_size += len(groups)

    def reset(self) -> None:
        """As for a new rollout."""
        self.pendings, self.remaining_batch_size, self.aborted = set(), 0, False


_CURRENT: contextvars.ContextVar[GenerateState] = contextvars.ContextVar("generate_state")


def current_state() -> GenerateState:
    """The state of the rollout that the caller's generate function belongs to: tokenizer, router client, default parameters."""
    try:
        return _CURRENT.get()
    except LookupError:
        raise ValueError("no rollout is running here: current_state() is for generate functions, hooks and graders") from None


def enter(state: GenerateState) -> None:
    """Tasks started from here on see `state` as current_state()."""
    _CURRENT.set(state)
    enter_servers(state.args)


_OF_LOOP: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, GenerateState] = weakref.WeakKeyDictionary()


def state_for(args: Any) -> GenerateState:
    """The running rollout's state; in a loop of a plugin's own, outside of every rollout, one that all its calls share."""
    known = _CURRENT.get(None)
    if known is not None:
        return known
    loop = asyncio.get_running_loop()
    if loop not in _OF_LOOP:
        _OF_LOOP[loop] = GenerateState(args)
    enter(_OF_LOOP[loop])
    return _OF_LOOP[loop]


def num_engines(args: Any) -> int:
    """As slime counts them: --rollout-num-gpus over --rollout-num-gpus-per-engine, at least one."""
    engines = getattr(args, "rollout_num_engines", None)
    if engines:
        return engines
    per_engine = max(1, getattr(args, "rollout_num_gpus_per_engine", None) or 1)
    return max(1, (getattr(args, "rollout_num_gpus", None) or per_engine) // per_engine)


def num_concurrent(args: Any) -> int:
    """Samples in flight: --sglang-server-concurrency per engine."""
    return max(1, args.sglang_server_concurrency * num_engines(args))


def rollout_sampling_params(args: Any) -> dict[str, Any]:
    """SGLang's sampling_params for training samples."""
    told = {}
    if args.most_kept_words:
        # slime's word for it, so that a generate function which hands the parameters on asks for them as well.
        told = {"top_k": args.most_kept_words, "custom_params": {RETURN_KEPT_WORDS: True}}
    return sampling_params(
        temperature=args.rollout_temperature,
        top_p=args.rollout_top_p,
        **{"top_k": args.rollout_top_k, **told},
        max_new_tokens=args.rollout_max_response_len,
        stop=args.rollout_stop,
        stop_token_ids=args.rollout_stop_token_ids,
        skip_special_tokens=args.rollout_skip_special_tokens,
    )


def sampling_params(
    *, max_new_tokens: int | None, stop: Any = None, stop_token_ids: Any = None, **others: Any
) -> dict[str, Any]:
    if max_new_tokens is None:
        raise ValueError(
            "how long may a response be? pass --rollout-max-response-len (or the eval data set's max_response_len)"
        )
    params = {
        "max_new_tokens": max_new_tokens,
        "stop": list(stop) if stop else None,
        "stop_token_ids": list(stop_token_ids) if stop_token_ids else None,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
    }
    return params | {name: value for name, value in others.items() if value is not None}


# ------------------------------------------------------------------------------------------------------- one request


async def generate(
    args: Any,
    sample: Sample,
    sampling_params: dict[str, Any],
    *,
    state: GenerateState | None = None,
    evaluation: bool = False,
) -> Sample:
    """Generate (or continue) one response through the router. Raises ValueError or EngineError when that is not possible.

    A custom generate function may call it too; `state` is then the running rollout's. evaluation: nothing of it is trained.
    """
    await generate_once(args, sample, sampling_params, state=state or state_for(args), evaluation=evaluation)
    return sample


async def generate_once(
    args: Any, sample: Sample, sampling_params: dict[str, Any], *, state: GenerateState, evaluation: bool = False
) -> dict[str, Any] | None:
    """The request of generate(), and what the engine told beside the tokens (meta_info); None where it was not answered."""
    if sample.status not in (Status.PENDING, Status.ABORTED):
        raise ValueError(f"sample {sample.index} is {sample.status.value}; only pending and aborted samples are generated")
    if not sample.tokens:
        if not isinstance(sample.prompt, str):
            raise ValueError(
                "the prompt is a list of messages; pass --apply-chat-template, or a generate function that renders it"
            )
        sample.tokens = state.tokenizer.encode(sample.prompt, add_special_tokens=False)
    params = dict(sampling_params)
    # A resumed sample has spent part of its budget; the context bounds what is left.
    params["max_new_tokens"] = _room(sample, params["max_new_tokens"], state.max_context_len)
    if params["max_new_tokens"] <= 0:
        if sample.response_length == 0:
            raise ValueError(f"the prompt has {len(sample.tokens)} tokens; a context of {state.max_context_len} leaves no room")
        sample.status = Status.TRUNCATED
        return None
    payload = {"input_ids": sample.tokens, "sampling_params": params, "return_logprob": True}
    if not evaluation:
        payload |= _choices_to_replay(args, sample)
    answer = await persistently(
        lambda: state.client.generate(payload, routing_key=sample.session_id), tries=_TRIES, stopped=lambda: state.aborted
    )
    if answer is None:  # the rollout has ended while the router did not answer
        sample.status = Status.ABORTED
        return None
    if not isinstance(answer, dict):
        raise ValueError(f"the engine's answer is a {type(answer).__name__}, no JSON object: {answer!r:.60}")
    meta_info = answer.get("meta_info") or {}
    if "routed_experts_start_len" in payload:
        meta_info["routed_experts_start_len"] = payload["routed_experts_start_len"]
    tokens, log_probs = read_output(meta_info)
    sample.append_response_tokens(args, tokens=tokens, log_probs=log_probs, meta_info=meta_info, text=answer.get("text", ""))
    if args.mask_offpolicy_in_partial_rollout:
        _mask_older_weights(sample)
    return meta_info


def _choices_to_replay(args: Any, sample: Sample) -> dict[str, Any]:
    """Fields of a request: what the engine is to say of its choices. Those of earlier turns are known, and not asked again."""
    known = []
    if args.use_rollout_routing_replay:
        known.append(0 if sample.rollout_routed_experts is None else len(sample.rollout_routed_experts))
    if args.use_rollout_indexer_replay:
        known.append(0 if sample.rollout_indexer_topk is None else sample.rollout_indexer_topk.end)
    if not known:
        return {}
    return {
        "return_routed_experts": args.use_rollout_routing_replay,
        "return_indexer_topk": args.use_rollout_indexer_replay,
        "routed_experts_start_len": min(*known, len(sample.tokens) - 1),
    }


def _mask_older_weights(sample: Sample) -> None:
    """Train only what the newest weights wrote of an answer in whose middle they changed."""
    written = sample.token_weight_versions
    newest = next((version for version in reversed(written) if version), "")
    sample.loss_mask = [mask if version in ("", newest) else 0 for mask, version in zip(sample.loss_mask, written, strict=True)]


def _room(sample: Sample, max_new_tokens: int, max_context_len: int | None) -> int:
    room = max_new_tokens - sample.response_length
    return room if max_context_len is None else min(room, max_context_len - len(sample.tokens))


def read_output(meta_info: dict[str, Any]) -> tuple[list[int], list[float]]:
    """New token ids and their log-probs. Raises ValueError unless every token has a finite one, or where tokens are missing."""
    items = meta_info.get("output_token_logprobs")
    if items is None:
        raise ValueError("the engine's answer holds no output_token_logprobs, although return_logprob was asked for")
    said = meta_info.get("completion_tokens")
    if isinstance(said, int) and len(items) < said:
        raise ValueError(f"the engine's answer holds {len(items)} tokens and says that it made {said}: it was cut on its way")
    reason = meta_info.get("finish_reason")
    if reason is not None and not (isinstance(reason, dict) and "type" in reason):
        raise ValueError(f"the engine's finish_reason is {reason!r}; expected a mapping with a type")
    tokens, log_probs = [], []
    for position, item in enumerate(items):
        if not isinstance(item, list | tuple) or len(item) < 2:
            raise ValueError(f"the engine's response token {position} is {item!r}; expected [log-prob, token id, ...]")
        value, token = item[0], item[1]
        if not isinstance(token, int) or token < 0:
            raise ValueError(f"the engine's response token {position} is {token!r}; token ids are whole numbers from 0")
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"the engine's log-prob of response token {position} is {value!r}; expected a finite number")
        tokens.append(token)
        log_probs.append(float(value))
    return tokens, log_probs


# -------------------------------------------------------------------------------------------------- sample and group


async def generate_and_rm(
    args: Any,
    sample: Sample,
    sampling_params: dict[str, Any],
    evaluation: bool = False,
    *,
    state: GenerateState | None = None,
) -> Sample | list[Sample]:
    """Generate and grade one sample; with fan-out, a list of them. Never raises for what one sample did: it ends FAILED."""
    state = state or state_for(args)
    try:
        return await _generate_and_rm(args, sample, sampling_params, state=state, evaluation=evaluation)
    except Exception as error:
        _fail([sample], error, state)
        return sample


def _fail(samples: list[Sample], error: Exception, state: GenerateState) -> None:
    """Mark, count by reason, and say each kind of failure once."""
    if isinstance(error, GradingError):
        reason, words = f"grading_{error.reason}", str(error)
    else:
        reason, words = f"generation_{type(error).__name__}", told(error)
    for sample in samples:
        if isinstance(error, GradingError):
            sample.metadata["ungraded"] = {"reason": error.reason, "status": sample.status.value}
        sample.status, sample.reward = Status.FAILED, None
        sample.metadata["error"] = words
    state.failures[reason] += len(samples)
    kind = re.sub(r"0x[0-9a-f]+|\d+", "#", words)  # the same of another sample is nothing new
    new = kind not in state.told and len(state.told) < _FAILURES_SHOWN
    state.told.add(kind)
    logger.log(logging.WARNING if new else logging.DEBUG, "sample %s failed: %s", samples[0].index, words)


async def _generate_and_rm(
    args: Any, sample: Sample, sampling_params: dict[str, Any], *, state: GenerateState, evaluation: bool
) -> Sample | list[Sample]:
    if sample.is_settled:
        return sample
    if args.mask_offpolicy_in_partial_rollout and sample.response_length > 0 and sample.status is Status.ABORTED:
        sample.loss_mask = [0] * sample.response_length
    result: Sample | list[Sample] = sample
    if sample.status not in _FINISHED:
        async with state.semaphore:
            if state.aborted:
                sample.status = Status.ABORTED
                return sample
            state.generating.add(id(sample))
            try:
                result = await _call_generate(args, sample, sampling_params, state, evaluation)
            finally:
                state.generating.discard(id(sample))
    produced = flatten([result])
    if any(item.status is Status.ABORTED and not _is_given_up(item) for item in produced):
        return result
    if args.rollout_sample_hook_path:
        result = await _hooked(args, result, state.rollout_id, evaluation)
        produced = flatten([result])
    for item in produced:
        _check_produced(item, len(produced))
    if evaluation or not args.group_rm:
        await _grade(args, produced, together=args.group_rm or isinstance(result, list))
    return result


def _is_given_up(sample: Sample) -> bool:
    """Its plugin ended it for good, whatever its status: nothing of it is trained, but it counts in its group."""
    return sample.remove_sample or sample.is_settled


async def _call_generate(
    args: Any, sample: Sample, sampling_params: dict[str, Any], state: GenerateState, evaluation: bool
) -> Sample | list[Sample]:
    path = sample.generate_function_path or args.custom_generate_function_path
    if not path:
        return await generate(args, sample, sampling_params, state=state, evaluation=evaluation)
    function = load_function("--custom-generate-function-path", path)
    # A function of the user's gets its own copy of the parameters: changing it must not reach other samples.
    params = copy.deepcopy(sampling_params)
    offered = accepted_keywords(function, {"evaluation": evaluation})
    result = await function(view_for_call(args), sample, params, **offered)
    produced = flatten([result])
    if not produced:
        raise ValueError(f"{path} returned an empty list; expected a Sample or a list of Samples")
    for item in produced:
        if not isinstance(item, Sample):
            raise ValueError(f"{path} returned a {type(item).__name__}; expected a Sample or a list of Samples")
        item.status = Status(item.status)  # a plugin may say "completed"
        # A sample of the plugin's own making belongs where the one that it was given does.
        item.index = sample.index if item.index is None else item.index
        item.group_index = sample.group_index if item.group_index is None else item.group_index
        item.validate()
        item.validate_values()
    return result


async def _hooked(args: Any, item: Sample | list, rollout_id: int, evaluation: bool) -> Sample | list:
    """A sample, or each of a list, as the hooks leave it: changed in place, or the one that a hook gives back."""
    if isinstance(item, list):
        return [await _hooked(args, one, rollout_id, evaluation) for one in item]
    sample = item
    for path in args.rollout_sample_hook_path:
        hook = load_function("--rollout-sample-hook-path", path)
        offered = accepted_keywords(hook, {"rollout_id": rollout_id, "evaluation": evaluation})
        value = hook(view_for_call(args), sample, **offered)
        if inspect.isawaitable(value):
            value = await value
        if value is not None and not isinstance(value, Sample):
            raise ValueError(f"--rollout-sample-hook-path {path} returned a {type(value).__name__}; expected a Sample or None")
        sample = sample if value is None else value
        sample.status = Status(sample.status)  # a plugin may say "completed"
    return sample


def _check_produced(sample: Sample, num_siblings: int) -> None:
    if sample.status not in _FINISHED and not _is_given_up(sample):
        raise ValueError(f"generation ended with status {sample.status.value}; expected completed, truncated or aborted")
    if sample.response_length == 0 and not sample.remove_sample:
        raise ValueError("generation ended without a response token; set remove_sample to keep it in its group, masked")
    if num_siblings > 1 and sample.rollout_id is None:
        raise ValueError("samples that fan out of one trajectory must share a rollout_id that is not None")


async def _grade(args: Any, samples: list[Sample], *, together: bool) -> None:
    """Reward those without one. together: a grader of the user's gets a list, also of one; otherwise each by itself."""
    for sample in samples:
        if sample.reward is not None:  # a generate function or a hook has graded it
            sample.reward = plain_reward(sample.reward)
            _check_reward(sample, sample.reward)
    ungraded = [sample for sample in samples if sample.reward is None]
    if not ungraded:
        return
    started = time.monotonic()
    try:
        if together:
            rewards = await batched_async_rm(view_for_call(args), ungraded)
        else:
            rewards = [await async_rm(view_for_call(args), sample) for sample in ungraded]
        for sample, reward in zip(ungraded, rewards, strict=True):
            _check_reward(sample, reward)
    except GradingError:
        raise
    except Exception as error:
        raise GradingError(type(error).__name__, told(error)) from error
    for sample, reward in zip(ungraded, rewards, strict=True):
        sample.reward = reward
        sample.metadata.setdefault("reward_seconds", 0.0)
        sample.metadata["reward_seconds"] += time.monotonic() - started


def _check_reward(sample: Sample, reward: Any) -> None:
    values = reward.values() if isinstance(reward, dict) else [reward]
    numbers = [value for value in values if isinstance(value, int | float)]
    if not numbers or not all(_is_finite(value) for value in numbers):
        raise ValueError(
            f"the reward of sample {sample.index} is {reward!r:.200}; expected a finite number, or a mapping that holds one"
        )


def _is_finite(value: float) -> bool:
    """In float32, which rewards are trained in."""
    try:
        return abs(float(value)) <= _FLOAT32_MAX
    except OverflowError:  # an integer of hundreds of digits
        return False


async def generate_and_rm_group(
    args: Any,
    group: Group,
    sampling_params: dict[str, Any],
    evaluation: bool = False,
    *,
    state: GenerateState | None = None,
) -> list:
    """All samples of one prompt; with --group-rm they are graded together once all are there."""
    state = state or state_for(args)
    if state.aborted:
        return group
    deterministic = _deterministic_seed(args)
    tasks = []
    for sample in group:
        sample.session_id = sample.session_id or uuid.uuid4().hex
        params = dict(sampling_params)
        if deterministic is not None:
            params["sampling_seed"] = deterministic + (sample.index or 0)
        tasks.append(generate_and_rm(args, sample, params, state=state, evaluation=evaluation))
    results = list(await asyncio.gather(*tasks))
    if args.group_rm and not evaluation:
        await _grade_group(args, flatten(results), state)
    elif not evaluation:
        keep_ungraded(flatten(results))
    return results


async def _grade_group(args: Any, samples: list[Sample], state: GenerateState) -> None:
    if any(sample.status not in _FINISHED and not _is_given_up(sample) for sample in samples):
        return
    try:
        await _grade(args, samples, together=True)
    except Exception as error:
        _fail(samples, error, state)


def _deterministic_seed(args: Any) -> int | None:
    """Base of the sampling seeds under SGLang's deterministic inference; each sample of the run gets its own."""
    flags = getattr(args, "sglang", None) or {}
    return args.rollout_seed if flags.get("enable_deterministic_inference") else None
