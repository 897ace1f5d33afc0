"""The import path that users' plugins know: `from slime.utils.processing_utils import load_tokenizer`."""

from __future__ import annotations

from slime.rollout.images import (
    build_processor_kwargs,
    encode_image_for_rollout_engine,
    load_processor,
    process_vision_info,
)
from slime.rollout.tokenizer import load_any_tokenizer as load_tokenizer

__all__ = [
    "build_processor_kwargs", "encode_image_for_rollout_engine", "load_processor", "load_tokenizer", "process_vision_info",
]  # fmt: skip
