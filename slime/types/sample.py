"""One trajectory, or one piece of it: the word that generation, rewards and filters speak.

Field names and defaults are the ones that users' plugins know. Every append checks all lengths before it changes anything, so a
Sample is whole at every moment: `loss_mask` and `rollout_log_probs` are either None or as long as the response.
"""

from __future__ import annotations

import base64
import math
import operator
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

import numpy as np

from slime.types.reward import plain_reward
from slime.types.selections import Piece, Selections


class Status(Enum):
    """Why the sample is as it is."""

    PENDING = "pending"
    """Not generated yet."""
    COMPLETED = "completed"
    """Ended by an end token or a stop string."""
    TRUNCATED = "truncated"
    """Ended by a length limit."""
    ABORTED = "aborted"
    """Interrupted by us; may be continued."""
    FAILED = "failed"
    """Generation or grading broke; never trained, never scored."""


@dataclass
class SpecInfo:
    """Speculative decoding, summed over the requests of a sample."""

    spec_accept_token_num: int = 0
    spec_draft_token_num: int = 0
    spec_verify_ct: int = 0
    completion_token_num: int = 0

    @property
    def spec_accept_rate(self) -> float:
        """Accepted part of the drafted tokens."""
        return self.spec_accept_token_num / self.spec_draft_token_num if self.spec_draft_token_num else 0.0

    @property
    def spec_accept_length(self) -> float:
        """Tokens that one verification yields on average."""
        return self.completion_token_num / self.spec_verify_ct if self.spec_verify_ct else 0.0

    def add(self, meta_info: dict[str, Any]) -> None:
        self.spec_accept_token_num += meta_info.get("spec_accept_token_num", 0)
        self.spec_draft_token_num += meta_info.get("spec_draft_token_num", 0)
        self.spec_verify_ct += meta_info.get("spec_verify_ct", 0)
        self.completion_token_num += meta_info.get("completion_tokens", 0)


@dataclass
class PrefixCacheInfo:
    """Prefix cache hits, summed over the requests of a sample."""

    cached_tokens: int = 0
    total_prompt_tokens: int = 0

    @property
    def prefix_cache_hit_rate(self) -> float:
        return self.cached_tokens / self.total_prompt_tokens if self.total_prompt_tokens else 0.0

    def add(self, meta_info: dict[str, Any]) -> None:
        self.cached_tokens += meta_info.get("cached_tokens", 0)
        self.total_prompt_tokens += meta_info.get("prompt_tokens", 0)


_FINISH_STATUS = {"length": Status.TRUNCATED, "abort": Status.ABORTED, "stop": Status.COMPLETED}


_TYPE_OF_SIZE = {1: np.uint8, 2: np.int16, 4: np.int32}
"""Of what engines say of experts: our own say it in as few bytes as it takes."""


def _is_token(value: Any) -> bool:
    """A whole number from 0, of Python, NumPy or torch."""
    try:
        return operator.index(value) >= 0
    except TypeError:
        return False


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, str | bytes) and float(value) is not None
    except (TypeError, ValueError):
        return False


def _int32(value: Any) -> np.ndarray:
    """base64 text, raw bytes, a tensor, an array or a list -> flat int32."""
    if isinstance(value, str):
        value = base64.b64decode(value)
    if isinstance(value, bytes | bytearray):
        return np.frombuffer(bytes(value), dtype=np.int32)
    return np.asarray(value, dtype=np.int32).reshape(-1)


def _grown(column: Any, new: list, *, absent: list) -> list:
    """`column` with `new` behind it: the same list where it is one, another where it is an array or a tuple."""
    if column is None:
        return absent + new
    if not isinstance(column, list):
        return [*column, *new]
    column += new
    return column


def _first(meta_info: dict[str, Any], *names: str) -> Any:
    return next((meta_info[name] for name in names if meta_info.get(name) is not None), None)


def _versions(meta_info: dict[str, Any]) -> list[str]:
    """Of one answer; SGLang 0.5.23 tells all of them where weights changed in its middle."""
    if spans := meta_info.get("weight_versions"):
        return [str(span["version"]) for span in spans]
    version = meta_info.get("weight_version")
    return [] if version is None else [str(version)]


def _version_spans(meta_info: dict[str, Any], count: int, trainable: bool) -> list[list]:
    """[version, tokens] of the `count` tokens of one append."""
    versions = _versions(meta_info) if trainable else []
    if not versions:
        return [["", count]]
    ends = [int(span["end"]) for span in meta_info["weight_versions"]] if meta_info.get("weight_versions") else []
    ends = [*(min(end, count) for end in ends[:-1]), count]
    return [[version, end - start] for version, start, end in zip(versions, [0, *ends], ends, strict=False)]


def _with_spans(spans: list[list], length: int, new: list[list]) -> list[list]:
    """`spans` of a response of `length` tokens, with `new` behind them; neighbours of one version are one span."""
    grown: list[list] = []
    for version, count in [*spans, ["", length - sum(count for _, count in spans)], *new]:
        if count > 0 and grown and grown[-1][0] == version:
            grown[-1] = [version, grown[-1][1] + count]
        elif count > 0:
            grown.append([version, count])
    return grown


@dataclass
class Sample:
    """One prompt with one (perhaps unfinished) response."""

    Status = Status
    SpecInfo = SpecInfo
    PrefixCacheInfo = PrefixCacheInfo

    group_index: int | None = None
    """Counter of prompts taken from the data source; samples of one prompt share it."""
    index: int | None = None
    """Counter of samples taken from the data source; unique over the run."""
    rollout_id: int | None = None
    """Trajectory this sample belongs to; needed only when one execution fans out into several samples, which then share it."""
    prompt: str | list[dict[str, Any]] = ""
    prompt_source: str = ""
    """File and line that the prompt was read from, for messages; empty when no file gave it."""
    tokens: list[int] = field(default_factory=list)
    """Prompt ids, then response ids."""
    multimodal_inputs: dict[str, Any] | None = None
    multimodal_train_inputs: dict[str, Any] | None = None
    multimodal_train_input_id: int | None = None
    apply_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    response: str = ""
    response_length: int = 0
    """Tokens at the end of `tokens` that are response."""
    label: str | None = None
    reward: float | dict[str, Any] | None = None
    """None until graded."""
    loss_mask: list[int] | None = None
    """Per response token: 1 trained, 0 not; None means all ones."""
    weight_versions: list[str] = field(default_factory=list)
    """Versions of the weights that answered, in order; one request has several where weights changed in its middle."""
    weight_version_spans: list[list] = field(default_factory=list)
    """[version, tokens] along the response: which weights wrote how many; version "" for tokens that no engine wrote."""
    rollout_log_probs: list[float] | None = None
    """Per response token: the engine's log-prob, 0 for tokens that it did not generate."""
    rollout_top_p_token_ids: np.ndarray | None = None
    """int32: the vocabulary kept by top-p, concatenated over response tokens."""
    rollout_top_p_token_offsets: np.ndarray | None = None
    """int32 [response_length + 1]: where each token's span starts."""
    rollout_routed_experts: np.ndarray | None = None
    """[len(tokens) - 1, num_layers, topk]: the engine's experts, in the type that it sent; -1 where it names none."""
    rollout_indexer_topk: Selections | None = None
    """Which earlier tokens the engine's sparse attention read for each of the first tokens."""
    remove_sample: bool = False
    """Keep it in its group's statistics but train nothing of it, whatever its status and even without a response."""
    teacher_log_probs: list[float] | None = None
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    generate_function_path: str | None = None
    custom_rm_path: str | None = None
    train_metadata: dict[str, Any] | None = None
    """For functions of the training side: rollout_data["metadata"], and `metadata` of a custom loss's batch."""
    session_id: str | None = None
    """Routing key: requests of one session reach one engine."""
    non_generation_time: float = 0.0
    """Seconds of a custom generate function that were not spent in the engine."""
    spec_info: SpecInfo = field(default_factory=SpecInfo)
    prefix_cache_info: PrefixCacheInfo = field(default_factory=PrefixCacheInfo)

    def __post_init__(self) -> None:
        self.status = Status(self.status)  # a plugin may say "completed"

    # ------------------------------------------------------------------------------------------------------ reading

    @property
    def prompt_length(self) -> int:
        return len(self.tokens) - self.response_length

    @property
    def effective_response_length(self) -> int:
        """Trained tokens of the response."""
        return sum(self.loss_mask) if self.loss_mask is not None else self.response_length

    @property
    def token_weight_versions(self) -> list[str]:
        """Per response token the version of the weights that wrote it, "" where nobody recorded one."""
        known = [version for version, count in self.weight_version_spans for _ in range(count)]
        return (known + [""] * self.response_length)[: self.response_length]

    @property
    def trains_nothing(self) -> bool:
        """Removed, or all of its response is masked."""
        masked = self.loss_mask is not None and len(self.loss_mask) > 0 and not any(self.loss_mask)
        return self.remove_sample or masked

    @property
    def is_settled(self) -> bool:
        """Graded, and nothing more is to be generated: it ended, or its plugin gave it up but counts it in its group."""
        ended = self.status in (Status.COMPLETED, Status.TRUNCATED)
        return self.reward is not None and (ended or self.trains_nothing)

    def get_reward_value(self, args: Any) -> float:
        """The number that training uses: the reward itself, or its entry `--reward-key`."""
        reward_key = getattr(args, "reward_key", None)
        if not reward_key:
            return plain_reward(self.reward)
        if not isinstance(self.reward, dict) or reward_key not in self.reward:
            found = sorted(self.reward) if isinstance(self.reward, dict) else repr(self.reward)
            raise ValueError(f"sample {self.index}: --reward-key is {reward_key!r}, but its reward is {found}")
        return plain_reward(self.reward[reward_key])

    def validate(self) -> None:
        """All lengths agree. Raises ValueError with the numbers."""
        n = self.response_length
        if not 0 <= n <= len(self.tokens):
            raise ValueError(f"sample {self.index}: response_length is {n}, but there are {len(self.tokens)} tokens")
        for name in ("loss_mask", "rollout_log_probs", "teacher_log_probs"):
            column = getattr(self, name)
            if column is not None and len(column) != n:
                raise ValueError(f"sample {self.index}: {name} has {len(column)} entries, the response has {n} tokens")
        offsets, ids = self.rollout_top_p_token_offsets, self.rollout_top_p_token_ids
        if (offsets is None) != (ids is None):
            raise ValueError(f"sample {self.index}: top-p ids and offsets come together; one of them is missing")
        if offsets is not None and (len(offsets) != n + 1 or offsets[0] != 0 or offsets[-1] != len(ids)):
            raise ValueError(
                f"sample {self.index}: top-p offsets must be {n + 1} numbers from 0 to {len(ids)}; "
                f"got {len(offsets)} from {offsets[:1]} to {offsets[-1:]}"
            )

    def validate_values(self) -> None:
        """What a plugin filled in is what its name says. Raises ValueError with the first value that is not."""
        odd = next((i for i, token in enumerate(self.tokens) if not _is_token(token)), None)
        if odd is not None:
            raise ValueError(f"sample {self.index}: token {odd} is {self.tokens[odd]!r}; token ids are whole numbers from 0")
        for name in ("loss_mask", "rollout_log_probs", "teacher_log_probs"):
            values = getattr(self, name)
            odd = next((i for i, value in enumerate(values if values is not None else ()) if not _is_number(value)), None)
            if odd is not None:
                raise ValueError(f"sample {self.index}: {name} of response token {odd} is {values[odd]!r}; expected a number")
        if self.trains_nothing or self.rollout_log_probs is None:
            return
        for i, value in enumerate(self.rollout_log_probs):
            if not math.isfinite(value) and (self.loss_mask is None or self.loss_mask[i]):
                raise ValueError(
                    f"sample {self.index}: rollout_log_probs of response token {i} is {value}, and that token is trained; "
                    "mask it"
                )

    # ------------------------------------------------------------------------------------------------------ growing

    def append_response_tokens(
        self,
        args: Any = None,
        *,
        tokens: list[int] | None = None,
        log_probs: list[float] | None = None,
        trainable: bool = True,
        meta_info: dict[str, Any] | None = None,
        text: str | None = None,
        update_terminal_info: bool = True,
    ) -> None:
        """Grow the response by what an engine generated (trainable) or an environment said (not trainable), or by no token.

        `meta_info` is the engine's: top-p spans, routed experts and, at the end of a request, finish reason, weight version and
        cache statistics. A mask or log-probs that are a list stay that list and grow: who assigned it sees what is appended.
        Raises ValueError and leaves the sample unchanged when a length disagrees.
        """
        self.validate()
        tokens = [int(token) for token in tokens] if tokens is not None else []
        meta_info = meta_info or {}
        new_log_probs = self._checked_log_probs(len(tokens), log_probs, trainable)
        spans = self._checked_top_p(len(tokens), meta_info, trainable)
        routed = self._checked_routing(len(tokens), meta_info, args)
        selections = self._checked_selections(len(tokens), meta_info)

        if tokens and self.teacher_log_probs is not None:
            raise ValueError(f"sample {self.index} has a teacher's log-probs of its whole response; append before it speaks")

        before = self.response_length
        # Masks are made explicit from the first append on: an absent one stands for ones over the earlier response.
        self.loss_mask = _grown(self.loss_mask, [int(trainable)] * len(tokens), absent=[1] * before)
        if new_log_probs is not None:
            self.rollout_log_probs = _grown(self.rollout_log_probs, new_log_probs, absent=[0.0] * before)
        if spans is not None:
            self.rollout_top_p_token_ids, self.rollout_top_p_token_offsets = spans
        if routed is not None:
            self.rollout_routed_experts = routed
        if selections is not None:
            self.rollout_indexer_topk = selections
        # A new list: a plugin may have given the same prompt ids to several samples, or an array, whose + adds numbers.
        self.tokens = [*self.tokens, *tokens] if isinstance(self.tokens, list) else [*map(int, self.tokens), *tokens]
        self.weight_version_spans = _with_spans(
            self.weight_version_spans, before, _version_spans(meta_info, len(tokens), trainable)
        )
        self.response_length += len(tokens)
        if text is not None:
            self.response += text
        if update_terminal_info and meta_info.get("finish_reason") is not None:
            self.update_terminal_info(args, meta_info)

    def update_terminal_info(self, args: Any, meta_info: dict[str, Any]) -> None:
        """What the end of one request tells: version, cache and speculation statistics, and why it ended."""
        if getattr(args, "sglang_speculative_algorithm", None):
            self.spec_info.add(meta_info)
        self.prefix_cache_info.add(meta_info)
        self.weight_versions = [*self.weight_versions, *_versions(meta_info)]
        self.status = _FINISH_STATUS.get(meta_info["finish_reason"]["type"], self.status)

    def _checked_log_probs(self, count: int, log_probs: list[float] | None, trainable: bool) -> list[float] | None:
        if not trainable:
            if log_probs is not None:
                raise ValueError(f"sample {self.index}: tokens that no engine generated have no log-probs; pass none")
            return [0.0] * count if count else None
        if count == 0 and (log_probs is None or len(log_probs) == 0):
            return None  # the end of a request that gave nothing
        if log_probs is None or len(log_probs) != count:
            found = "none" if log_probs is None else len(log_probs)
            raise ValueError(f"sample {self.index}: {count} trainable tokens need {count} log-probs, got {found}")
        if self.rollout_log_probs is None and self.response_length > 0:
            raise ValueError(
                f"sample {self.index}: the {self.response_length} response tokens before have no log-probs; "
                f"fill rollout_log_probs for them before appending trainable tokens"
            )
        return [float(value) for value in log_probs]

    def _checked_top_p(self, count: int, meta_info: dict[str, Any], trainable: bool) -> tuple[np.ndarray, np.ndarray] | None:
        ids = _first(meta_info, "top_p_token_ids", "top_p_kept_token_ids")
        offsets = _first(meta_info, "top_p_token_offsets", "top_p_kept_token_offsets")
        if (ids is None) != (offsets is None):
            raise ValueError(f"sample {self.index}: the engine sent only one of top-p token ids and offsets")
        active = self.rollout_top_p_token_ids is not None
        if ids is None:
            if not active:
                return None
            if trainable and count:
                raise ValueError(f"sample {self.index}: earlier tokens have top-p spans, these {count} have none")
            ids, offsets = np.zeros(0, np.int32), np.zeros(count + 1, np.int32)
        ids, offsets = _int32(ids), _int32(offsets)
        if len(offsets) != count + 1 or offsets[0] != 0 or offsets[-1] != len(ids) or (np.diff(offsets) < 0).any():
            raise ValueError(
                f"sample {self.index}: top-p offsets for {count} tokens and {len(ids)} ids must be {count + 1} rising numbers "
                f"from 0 to {len(ids)}; got {offsets[:3]}..{offsets[-1:]} ({len(offsets)})"
            )
        if active:
            old_ids, old_offsets = self.rollout_top_p_token_ids, self.rollout_top_p_token_offsets
        else:
            old_ids, old_offsets = np.zeros(0, np.int32), np.zeros(self.response_length + 1, np.int32)
        return np.concatenate([old_ids, ids]), np.concatenate([old_offsets, offsets[1:] + old_offsets[-1]])

    def _checked_routing(self, count: int, meta_info: dict[str, Any], args: Any) -> np.ndarray | None:
        """The experts of all tokens but the last after `count` new ones, [rows, layers, topk] in the type that they came in.

        From `routed_experts_start_len` on, 0 without it. Of a prefill/decode pair the prompt's are `prompt_routed_experts`.
        """
        routed, of_prompt = meta_info.get("routed_experts"), meta_info.get("prompt_routed_experts")
        if routed is None and of_prompt is None:
            return None
        start, prompt, rows = (
            int(meta_info.get("routed_experts_start_len") or 0),
            len(self.tokens),
            len(self.tokens) + count - 1,
        )
        if of_prompt is None:
            parts = [self._routing_rows(routed, start, rows, args)]
        else:
            parts = [self._routing_rows(of_prompt, start, prompt, args)[: rows - start]]
            if routed is not None or rows > prompt:
                parts.append(self._routing_rows(routed if routed is not None else b"", prompt, max(prompt, rows), args))
        known = 0 if self.rollout_routed_experts is None else len(self.rollout_routed_experts)
        if known < start:
            raise ValueError(f"sample {self.index}: routed experts continue at position {start}, only {known} are known")
        return np.concatenate([self.rollout_routed_experts[:start], *parts]) if start else np.concatenate(parts)

    def _checked_selections(self, count: int, meta_info: dict[str, Any]) -> Selections | None:
        """What was known and what a request adds: of a prefill/decode pair, both engines' parts."""
        said = [meta_info[name] for name in ("prompt_indexer_topk", "indexer_topk") if meta_info.get(name) is not None]
        if not said:
            return None
        before, last = self.rollout_indexer_topk or Selections(()), len(self.tokens) + count - 1
        try:
            pieces = [Piece.from_bytes(base64.b64decode(one) if isinstance(one, str) else bytes(one)) for one in said]
            return before.grown(pieces, last)
        except ValueError as error:
            raise ValueError(f"sample {self.index}: {error}") from None

    def _routing_rows(self, said: Any, start: int, end: int, args: Any) -> np.ndarray:
        num_layers, topk = args.num_layers, args.moe_router_topk
        wanted = (end - start) * num_layers * topk
        if isinstance(said, str):
            said = base64.b64decode(said)
        if isinstance(said, bytes | bytearray):
            kind = _TYPE_OF_SIZE.get(len(said) / max(wanted, 1), np.uint8)
            flat = np.frombuffer(bytes(said), kind)
        else:
            flat = np.asarray(said)
        if flat.size != wanted:
            raise ValueError(
                f"sample {self.index}: routed experts have {flat.size} entries; {end - start} tokens from position {start} on "
                f"x {num_layers} layers x top-{topk} need {wanted}"
            )
        return flat.reshape(end - start, num_layers, topk)

    # ---------------------------------------------------------------------------------------------------- restarting

    def reset_for_retry(self) -> None:
        """Forget what was generated; prompt, label and identity stay."""
        prompt_ids = self.tokens[: self.prompt_length] if self.response_length else self.tokens
        fresh = Sample()
        for name in ("response", "response_length", "reward", "loss_mask", "rollout_log_probs", "teacher_log_probs",
                     "rollout_top_p_token_ids", "rollout_top_p_token_offsets", "rollout_routed_experts", "rollout_indexer_topk",
                     "weight_versions", "weight_version_spans", "spec_info", "prefix_cache_info", "non_generation_time",
                     "remove_sample"):  # fmt: skip
            setattr(self, name, getattr(fresh, name))
        self.tokens, self.status = prompt_ids, Status.PENDING

    # ------------------------------------------------------------------------------------------------------- storing

    def to_dict(self) -> dict[str, Any]:
        """Plain values for dumps; extra attributes that a plugin set travel too."""
        value = dict(self.__dict__)
        value["status"] = self.status.value
        if self.rollout_indexer_topk is not None:
            value["rollout_indexer_topk"] = [piece.to_bytes() for piece in self.rollout_indexer_topk.pieces]
        value["spec_info"] = dict(self.spec_info.__dict__)
        value["prefix_cache_info"] = dict(self.prefix_cache_info.__dict__)
        return value

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Sample:
        """The inverse of to_dict; accepts keys it does not know (they become attributes) and missing ones."""
        value = dict(value)
        value["status"] = Status(value.get("status", Status.PENDING.value))
        value["spec_info"] = SpecInfo(**(value.get("spec_info") or {}))
        value["prefix_cache_info"] = PrefixCacheInfo(**(value.get("prefix_cache_info") or {}))
        if (selections := value.get("rollout_indexer_topk")) is not None:
            value["rollout_indexer_topk"] = Selections(tuple(map(Piece.from_bytes, selections)))
        known = {f.name for f in fields(cls)}
        sample = cls(**{name: item for name, item in value.items() if name in known})
        for name, item in value.items():
            if name not in known:
                setattr(sample, name, item)
        return sample
