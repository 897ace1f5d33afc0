"""A file of prompts as data sources of a plugin's own know it: slime.utils.data.Dataset."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from slime.rollout.dataset import PromptFormat, read_prompts
from slime.types.sample import Sample


class Dataset:
    """`samples` are the prompts in the order of the epoch, which `shuffle(epoch)` makes; before, that of the file."""

    def __init__(
        self,
        path: str,
        tokenizer: Any,
        processor: None,
        max_length: int | None,
        *,
        prompt_key: str = "text",
        multimodal_keys: Mapping[str, str] | None = None,
        label_key: str | None = None,
        tool_key: str | None = None,
        metadata_key: str = "metadata",
        seed: int = 42,
        apply_chat_template: bool = False,
        apply_chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> None:
        """max_length: prompts with more tokens are left out. Raises ValueError for media, which are not trained."""
        if multimodal_keys:
            raise ValueError(f"multimodal_keys {dict(multimodal_keys)}: this version trains text alone")
        form = PromptFormat(
            input_key=prompt_key,
            label_key=label_key,
            metadata_key=metadata_key,
            tool_key=tool_key,
            apply_chat_template=apply_chat_template,
            apply_chat_template_kwargs=apply_chat_template_kwargs,
        )
        self.origin_samples: list[Sample] = read_prompts(path, form, tokenizer=tokenizer, max_prompt_len=max_length)
        self.samples = list(self.origin_samples)
        self.seed = seed

    def shuffle(self, new_epoch_id: int) -> None:
        """The order of --rollout-shuffle in that epoch."""
        order = list(range(len(self.origin_samples)))
        random.Random(self.seed + new_epoch_id).shuffle(order)
        self.samples = [self.origin_samples[position] for position in order]

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)
