"""Supervised training through the same loop: conversations of the prompt file become samples, no engine is asked.

`--rollout-function-path slime.rollout.sft_rollout.generate_rollout --loss-type sft_loss --input-key messages
--n-samples-per-prompt 1 --disable-compute-advantages-and-returns`. The rewards are 0 and mean nothing.
"""

from __future__ import annotations

from typing import Any

from slime.rollout.base_types import RolloutFnTrainOutput
from slime.rollout.sft_masks import mask_conversation
from slime.rollout.tokenizer import load_tokenizer
from slime.types.sample import Sample, Status


def generate_rollout(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> RolloutFnTrainOutput:
    """rollout_batch_size conversations with their masks."""
    if evaluation:
        raise ValueError("the SFT rollout does not evaluate; name another function with --eval-function-path")
    if args.n_samples_per_prompt != 1:
        raise ValueError(
            f"supervised training takes each conversation once; --n-samples-per-prompt is {args.n_samples_per_prompt}"
        )
    tokenizer = load_tokenizer(args.hf_checkpoint)
    groups = data_source.get_samples(args.rollout_batch_size)
    for (sample,) in groups:
        fill_sample(sample, tokenizer, args.loss_mask_type)
    return RolloutFnTrainOutput(samples=groups)


def fill_sample(sample: Sample, tokenizer: Any, loss_mask_type: str) -> None:
    """Turn a sample whose prompt is a conversation into a trainable one. Raises ValueError when nothing of it is trained."""
    if not isinstance(sample.prompt, list):
        raise ValueError(
            f"sample {sample.index}: supervised training needs a list of messages (do not pass --apply-chat-template)"
        )
    masked = mask_conversation(
        tokenizer,
        sample.prompt,
        loss_mask_type=loss_mask_type,
        tools=sample.metadata.get("tools"),
        **sample.apply_chat_template_kwargs,
    )
    if masked.response_length == 0:
        raise ValueError(f"sample {sample.index}: no token of the conversation is trained (step_loss_mask excludes every turn)")
    sample.tokens = masked.token_ids
    sample.response_length = masked.response_length
    sample.loss_mask = masked.loss_mask[-masked.response_length :]
    sample.response = tokenizer.decode(masked.token_ids[-masked.response_length :])
    sample.reward = 0.0
    sample.status = Status.COMPLETED
