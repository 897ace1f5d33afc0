"""Flags of Megatron-LM's own training program that recipes carry. There is no such program here, so they change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from slime.config.flags import flag


@dataclass(frozen=True)
class FrontEndConfig:
    """Taken so that a recipe's words stay as they are; a note at start says why each changes nothing."""

    ckpt_format: Literal["torch_dist"] = "torch_dist"
    """Format of checkpoints."""
    ckpt_fully_parallel_save: bool = flag(True, "--ckpt-fully-parallel-save")
    """Every rank writes its part."""
    ckpt_fully_parallel_load: bool = flag(True, "--ckpt-fully-parallel-load")
    """Every rank reads its part."""
    dist_ckpt_strictness: str | None = None
    """What a missing or unexpected key of a checkpoint means."""
    tokenizer_type: Literal["HuggingFaceTokenizer", "NullTokenizer"] = "HuggingFaceTokenizer"
    """Kind of tokenizer."""
    tokenizer_model: str | None = None
    """Folder of the tokenizer."""
    use_mcore_models: bool = False
    """Models of megatron-core."""
    use_flash_attn: bool = False
    """Flash attention."""
    manual_gc: bool = False
    """Python's garbage collector runs at chosen times."""
    manual_gc_interval: int = flag(0, low=0)
    """Steps between two."""
    no_create_attention_mask_in_dataloader: bool = False
    """Batches without an attention mask."""
    log_throughput: bool = False
    """Log tokens and FLOPs per second."""
    log_interval: int = flag(100, low=1)
    """Steps between two lines of the log."""
    log_timers_to_tensorboard: bool = False
    """Timers in TensorBoard."""
    timing_log_level: int = flag(0, low=0, high=2)
    """How many timers are logged."""
    eval_iters: int = flag(100, low=0)
    """Batches of Megatron's own evaluation."""


WHY: Mapping[str, str] = {
    "ckpt_format": "checkpoints are torch_dist",
    "ckpt_fully_parallel_save": "every rank always writes its own part",
    "ckpt_fully_parallel_load": "every rank always reads its own part",
    "dist_ckpt_strictness": "a checkpoint must hold every key that the model has",
    "tokenizer_type": "the tokenizer is that of --hf-checkpoint",
    "tokenizer_model": "the tokenizer is that of --hf-checkpoint",
    "use_mcore_models": "there are no others",
    "use_flash_attn": "attention is torch's, or the plugin's kernels",
    "manual_gc": "Python collects when it wants to, which no step here waits for",
    "manual_gc_interval": "Python collects when it wants to, which no step here waits for",
    "no_create_attention_mask_in_dataloader": "packed batches never have a mask",
    "log_throughput": "perf/tokens_per_sec is always there",
    "log_interval": "there is a line for every rollout",
    "log_timers_to_tensorboard": "perf/* is always there",
    "timing_log_level": "perf/* is always there",
    "eval_iters": "evaluation is --eval-interval and --eval-prompt-data",
}
"""Attribute -> why its flag changes nothing."""
