"""The selections of sparse attention's computing layers, kept by an engine and told in few bytes.

| correction | versions | reason |
|---|---|---|
| `create_indexer_capturer` | sglang 0.5.23 | it keeps copies for layers that share a selection, and nothing on a CPU |
| `_maybe_collect_indexer_topk` | sglang 0.5.23 | 639 kB a token of GLM-5.2 would travel; a prefill engine tells none |
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from slime.config.hf_config import HfConfig
from slime.types.selections import Piece, refusal

log = logging.getLogger(__name__)


def install() -> None:
    """In the processes that run the model, or in the one that forks them."""
    import sglang.srt.model_executor.model_runner as model_runner
    from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor as Processor

    model_runner.create_indexer_capturer = create_recorder
    Processor._maybe_collect_indexer_topk = collect
    Processor._maybe_collect_routed_experts = _with_selections(Processor._maybe_collect_routed_experts)


def create_recorder(*, model_config: Any, num_tokens: int, max_running_requests: int, device: str) -> Any:
    """SGLang's recorder with a slot for each computing layer alone; None where the engine is not to record."""
    from sglang.srt.runtime_context import get_exec, get_parallel, get_schedule
    from sglang.srt.state_capturer.base import BaseTopkCapturer

    if not get_exec().features.enable_return_indexer_topk:
        return None
    ways = get_parallel().attn_tp_size
    if device != "cpu" and ways != 1:
        raise ValueError(
            f"--enable-return-indexer-topk: attention is split {ways} ways, and SGLang records data-parallel attention alone"
        )
    # As it is on disk: the overrides of a CPU engine name another class of models.
    hf = HfConfig(json.loads((Path(model_config.model_path) / "config.json").read_text()), str(model_config.model_path))
    slots = {layer: slot for slot, layer in enumerate(layer for layer in range(hf.num_layers) if hf.runs_indexer(layer))}

    class Recorder(BaseTopkCapturer):
        layers = tuple(slots)

        def capture(self, layer_id: int, topk_indices: torch.Tensor) -> None:
            if layer_id in slots:
                super().capture(slots[layer_id], topk_indices)

    return Recorder(
        num_tokens=num_tokens,
        max_batch_size=max(get_schedule().chunked_prefill_size, max_running_requests),
        num_layers=len(slots),
        topk_size=hf["index_topk"],
        device=device,
        name="indexer_topk",
    )


def collect(self: Any, req: Any) -> None:
    """In the place of SchedulerBatchResultProcessor's: the packed selections of what this engine has read of a request."""
    from sglang.srt.runtime_context import get_disagg, get_parallel
    from sglang.srt.state_capturer.indexer_topk import get_global_indexer_capturer

    recorder = get_global_indexer_capturer()
    if recorder is None or not req.return_indexer_topk or get_parallel().attn_tp_rank != 0:
        return
    first = req.routed_experts_start_len
    if get_disagg().disaggregation_mode == "decode":
        first = max(first, len(req.origin_input_ids), getattr(req, "slime_length_at_retraction", 0))
    length = len(req.origin_input_ids) + len(req.output_ids_through_stop)
    rows = recorder.get_topk(req.kv.req_pool_idx, length, self.req_to_token_pool, start_len=first)
    try:
        places = {layer: rows[:, slot].numpy() for slot, layer in enumerate(recorder.layers)}
        told = Piece.of(places, min(first, length - 1), recorder.topk_size).to_bytes()
    except ValueError as error:  # told by whoever asked, in a process that may end for it
        log.error("request %s: %s", req.rid, error)
        told = refusal(str(error))
    req.indexer_topk = torch.frombuffer(bytearray(told), dtype=torch.uint8)


def _with_selections(collect_experts: Callable) -> Callable:
    """A prefill engine asks for experts alone when it is done."""

    def collect_both(self: Any, req: Any) -> None:
        from sglang.srt.runtime_context import get_disagg

        collect_experts(self, req)
        if get_disagg().disaggregation_mode == "prefill":
            self._maybe_collect_indexer_topk(req)

    return collect_both
