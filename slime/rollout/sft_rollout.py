"""Supervised training through the same loop: conversations of the prompt file become samples, no engine is asked.

`--rollout-function-path slime.rollout.sft_rollout.generate_rollout --loss-type sft_loss --input-key messages
--n-samples-per-prompt 1 --disable-compute-advantages-and-returns`. The rewards are 0 and mean nothing.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from slime.rollout.base_types import Group, RolloutFnTrainOutput
from slime.rollout.rows import SKIP_HINT
from slime.rollout.sft_masks import MaskedConversation, mask_conversation
from slime.rollout.tokenizer import load_tokenizer
from slime.types.sample import Sample, Status

logger = logging.getLogger(__name__)


class BrokenConversation(ValueError):
    """A row that cannot be trained on."""


def generate_rollout(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> RolloutFnTrainOutput:
    """rollout_batch_size conversations with their masks; with `--on-broken-prompt-line skip` the next ones stand in for those
    that cannot be trained on."""
    if evaluation:
        raise ValueError("the SFT rollout does not evaluate; name another function with --eval-function-path")
    if args.n_samples_per_prompt != 1:
        raise ValueError(
            f"supervised training takes each conversation once; --n-samples-per-prompt is {args.n_samples_per_prompt}"
        )
    tokenizer = load_tokenizer(args.hf_checkpoint)
    groups: list[Group] = []
    broken: list[str] = []
    while len(groups) < args.rollout_batch_size:
        taken = data_source.get_samples(args.rollout_batch_size - len(groups))
        if not taken:
            raise ValueError(
                f"the data source has no more conversations: {len(groups)} of {args.rollout_batch_size} were taken"
            )
        for group in taken:
            try:
                fill_sample(group[0], tokenizer, args.loss_mask_type, max_tokens=args.rollout_max_context_len)
            except BrokenConversation as error:
                if args.on_broken_prompt_line != "skip":
                    raise BrokenConversation(f"{error}; {SKIP_HINT}") from error
                broken.append(str(error))
                continue
            groups.append(group)
        if not groups and len(broken) >= max(len(data_source), 1):
            raise ValueError(f"no conversation can be trained on: {len(broken)} were tried. The first: {broken[0]}")
    if broken:
        logger.warning("rollout %d: %d broken lines skipped; the first: %s", rollout_id, len(broken), broken[0])
    return RolloutFnTrainOutput(samples=groups, metrics={"rollout/broken_lines": float(len(broken))} if broken else None)


def fill_sample(sample: Sample, tokenizer: Any, loss_mask_type: str, *, max_tokens: int | None = None) -> None:
    """Turn a sample whose prompt is a conversation into a trainable one, of at most `max_tokens` tokens: what is over is cut
    off, and the sample counts as truncated.

    Raises BrokenConversation, naming file and line, when nothing of it can be trained.
    """
    where = sample.prompt_source or f"sample {sample.index}"
    try:
        masked = mask_conversation(
            tokenizer,
            _messages(sample.prompt),
            loss_mask_type=loss_mask_type,
            tools=sample.metadata.get("tools"),
            **sample.apply_chat_template_kwargs,
        )
    except Exception as error:  # a template raises what it likes; the row is what the user can correct
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise BrokenConversation(f"{where}: {kind}{error}") from error
    if masked.response_length == 0:
        raise BrokenConversation(f"{where}: no token of the conversation is trained (step_loss_mask excludes every turn)")
    cut = MaskedConversation(masked.token_ids[:max_tokens], masked.loss_mask[:max_tokens])
    if cut.response_length == 0:
        raise BrokenConversation(
            f"{where}: the first trained token comes after {max_tokens} tokens (--rollout-max-context-len) of "
            f"{len(masked.token_ids)}"
        )
    sample.tokens = cut.token_ids
    sample.response_length = cut.response_length
    sample.loss_mask = cut.loss_mask[-cut.response_length :]
    sample.response = tokenizer.decode(cut.token_ids[-cut.response_length :])
    sample.reward = 0.0
    sample.status = Status.COMPLETED if len(cut.token_ids) == len(masked.token_ids) else Status.TRUNCATED


def _messages(prompt: str | list) -> list:
    """The conversation, which a column may hold as JSON text too."""
    if isinstance(prompt, str):
        try:
            prompt = json.loads(prompt)
        except ValueError:
            raise ValueError(f"supervised training needs a list of messages under --input-key, found {prompt[:60]!r}") from None
    return prompt
