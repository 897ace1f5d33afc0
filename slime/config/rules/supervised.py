"""What supervised training asks of the other flags."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slime.config.rules.book import Values

ROLLOUT = "slime.rollout.sft_rollout.generate_rollout"


def supervised(v: Values) -> None:
    """The SFT rollout takes whole conversations, each once, has nothing to evaluate with, and rewards nothing."""
    if v["rollout_function_path"] != ROLLOUT or v["load_debug_rollout_data"] is not None:
        return
    v.require(
        v["n_samples_per_prompt"] == 1,
        f"supervised training takes each conversation once, and --n-samples-per-prompt is {v['n_samples_per_prompt']}; pass 1",
    )
    v.require(
        not v["apply_chat_template"],
        "--apply-chat-template makes a text of a conversation, in which no turn is known any more; leave it out for supervised "
        "training, which renders by itself",
    )
    v.require(
        not v["datasets"] or v["eval_function_path"] != ROLLOUT,
        "the supervised rollout does not evaluate; name what does with --eval-function-path "
        "(slime.rollout.sglang_rollout.generate_rollout), or leave the evaluation out",
    )
    v.require(
        v["loss_type"] != "policy_loss",
        "the supervised rollout gives every sample the reward 0, of which --loss-type policy_loss learns nothing; pass "
        "--loss-type sft_loss",
    )
