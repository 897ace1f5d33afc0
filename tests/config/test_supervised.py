"""Flags that a supervised run would stop at in its first rollout are said when they are read."""

from __future__ import annotations

import pytest
from flags import config_of

SFT = [
    "--rollout-function-path", "slime.rollout.sft_rollout.generate_rollout", "--loss-type", "sft_loss",
    "--n-samples-per-prompt", "1", "--debug-train-only",
]  # fmt: skip
EVALUATION = ["--eval-interval", "1", "--eval-prompt-data", "a", "a.jsonl"]


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--n-samples-per-prompt", "2"], "takes each conversation once, and --n-samples-per-prompt is 2; pass 1"),
        (["--apply-chat-template"], "leave it out for supervised training"),
        (EVALUATION, "the supervised rollout does not evaluate; name what does with --eval-function-path"),
        (["--loss-type", "policy_loss"], "learns nothing; pass --loss-type sft_loss"),
    ],
)
def test_flags_that_supervised_training_cannot_use(flags, reason):
    with pytest.raises(ValueError, match=reason):
        config_of(*SFT, *flags)


def test_supervised_flags_that_fit():
    config_of(*SFT)
    config_of(*SFT[:-1], *EVALUATION, "--eval-function-path", "slime.rollout.sglang_rollout.generate_rollout")
    config_of(*SFT, "--loss-mask-type", "qwen3_5", "--on-broken-prompt-line", "skip")
