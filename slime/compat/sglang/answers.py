"""What an engine answers a trainer that replays its choices: asked for through a router that drops the question, in few bytes.

| correction | versions | reason |
|---|---|---|
| the question | sglang-router 0.3.2 | its typed request has no field `return_routed_experts`, so none reaches an engine |
| the prompt's part | sglang-router 0.3.2 | of a pair it hands on the decode engine's answer alone, but for log-probs |
| the kept words | sglang 0.5.23 | they travel as a list of lists, and log-probs beside them are of the whole vocabulary |
| few bytes | sglang 0.5.15.post1 - 0.5.23 | experts travel as int32, four times what 256 of them need |
| stale rows | sglang 0.5.23 | a decode engine that took a request's cache back reads experts of whoever had the slots before |

The question travels as a label (`custom_labels`, which routers hand on); it is taken off before SGLang sees it. The prompt's
part travels as an entry of the prefill engine's `input_token_logprobs`, which the router puts before the decode engine's.
`slime.engine.client` writes the one and reads the other. `slime.engine.serve` installs all of it where engines are started with
an option of OPTIONS.
"""

from __future__ import annotations

import base64
import importlib.util
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

LABEL = "slime_return"
"""Of `custom_labels`: JSON of the fields of SGLang's request that the router does not know -> their values."""
ENCLOSED = "slime_enclosed"
"""Key of the entry of input_token_logprobs: the prefill engine's answers by name."""
OPTIONS = ("--enable-return-routed-experts", "--enable-return-indexer-topk", "--sampling-mask-max-tokens")
ANSWERS = ("routed_experts", "indexer_topk")
_PROCESSOR = "sglang.srt.managers.scheduler_components.batch_result_processor"


def wanted(argv: Sequence[str]) -> bool:
    """Was this engine started with an option that makes it record what trainers replay?"""
    return any(word.partition("=")[0] in OPTIONS for word in argv)


def install_in_server() -> None:
    """In the process that speaks HTTP, before the server starts."""
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    TokenizerManager.generate_request = _asked_by_label(TokenizerManager.generate_request)


def install_in_ranks() -> None:
    """In the processes that run the model, or in the one that forks them."""
    if importlib.util.find_spec(_PROCESSOR) is None:
        return  # an older SGLang: experts stay int32, which the trainer reads as well
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor as Processor

    from slime.compat.sglang import selections

    Req.reset_for_retract = _remembering_length(Req.reset_for_retract)
    Processor._maybe_collect_routed_experts = _compact(Processor._maybe_collect_routed_experts)
    selections.install()


def _asked_by_label(generate_request: Callable) -> Callable:
    async def generate(self: Any, obj: Any, request: Any = None):
        labels, asked = dict(getattr(obj, "custom_labels", None) or {}), {}
        if LABEL in labels:
            asked = json.loads(labels.pop(LABEL))
            obj.custom_labels = labels or None
            for name, value in asked.items():
                setattr(obj, name, value)
            if asked.get("return_indexer_topk"):
                obj.return_routed_experts = True  # a prefill engine that is done with a request looks for experts alone
        role = self.disaggregation_mode.value
        if role == "decode" and asked:
            # What it would say of the prompt is not its own.
            obj.routed_experts_start_len = len(obj.input_ids or ())
        async for answer in generate_request(self, obj, request):
            if role == "prefill" and asked:
                enclose(answer["meta_info"])
            if asked.get("return_sampling_mask"):
                tell_kept_words(answer["meta_info"])
            yield answer

    return generate


def enclose(meta_info: dict[str, Any]) -> None:
    """Move a prefill engine's answers to where the router hands them on."""
    found = {name: meta_info.pop(name) for name in ANSWERS if meta_info.get(name) is not None}
    if found and meta_info.get("input_token_logprobs") is not None:
        meta_info["input_token_logprobs"] = [*meta_info["input_token_logprobs"], {ENCLOSED: found}]


def tell_kept_words(meta_info: dict[str, Any]) -> None:
    """The words that sampling left, as slime's engines tell them, and log-probs among these alone."""
    masks, log_probs = meta_info.pop("output_token_sampling_mask", None), meta_info.pop("output_token_sampling_logprobs", None)
    if masks is None or log_probs is None:
        return
    ends = np.cumsum([0, *map(len, masks)], dtype=np.int32)
    ids = np.fromiter(itertools.chain.from_iterable(masks), np.int32, count=int(ends[-1]))
    meta_info["top_p_token_ids"], meta_info["top_p_token_offsets"] = (
        base64.b64encode(numbers.tobytes()).decode() for numbers in (ids, ends)
    )
    if meta_info.get("output_token_logprobs") is not None:
        pairs = zip(log_probs, meta_info["output_token_logprobs"], strict=True)
        meta_info["output_token_logprobs"] = [(value, *item[1:]) for value, item in pairs]


def _remembering_length(reset_for_retract: Callable) -> Callable:
    def reset(self: Any) -> None:
        self.slime_length_at_retraction = len(self.origin_input_ids) + len(self.output_ids)
        reset_for_retract(self)

    return reset


def _compact(collect: Callable) -> Callable:
    def collect_compactly(self: Any, req: Any) -> None:
        from sglang.srt.runtime_context import get_disagg

        collect(self, req)
        rows = req.routed_experts
        if rows is None:
            return
        if get_disagg().disaggregation_mode == "decode":
            # Cache that came back, from main memory or from a prefill engine, is in other slots than it was recorded for.
            rows[: max(0, getattr(req, "slime_length_at_retraction", 0) - req.routed_experts_start_len)] = -1
        req.routed_experts = smallest(rows)

    return collect_compactly


def smallest(rows: Any) -> Any:
    """A tensor of small whole numbers in the smallest type that holds them: uint8 or int16."""
    import torch

    if rows.numel() == 0 or (int(rows.min()) >= 0 and int(rows.max()) < 256):
        return rows.to(torch.uint8)
    return rows.to(torch.int16)
