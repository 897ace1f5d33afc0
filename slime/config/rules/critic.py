"""PPO's critic: what it needs, where it is kept, and flags of it without it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slime.config.rules.book import Values

OF_A_CRITIC = (
    "value_clip", "lambd", "num_critic_only_steps", "critic_lr", "critic_lr_warmup_iters", "critic_load", "critic_save",
)  # fmt: skip


def critic(v: Values) -> None:
    if v["advantage_estimator"] != "ppo":
        asked = [name for name in OF_A_CRITIC if name in v.given]
        if v["critic"]:
            v.notes.append("the critic of --megatron-config-path changes nothing without --advantage-estimator ppo")
        for name in asked:
            v.notes.append(f"--{name.replace('_', '-')} changes nothing: only --advantage-estimator ppo has a critic")
        return
    v.require(
        v["loss_type"] == "policy_loss" and v["compute_advantages_and_returns"],
        f"--advantage-estimator ppo makes advantages, and --loss-type {v['loss_type']} or "
        "--disable-compute-advantages-and-returns takes none; use policy_loss, or another estimator",
    )
    v.require(
        v["custom_model_provider_path"] is None,
        "--advantage-estimator ppo builds a critic of this project's model; leave out --custom-model-provider-path",
    )
    own = v["critic"]
    for name, of_role in (("critic_load", "load"), ("critic_save", "save"), ("critic_lr", "lr")):
        if own.get(of_role) is not None:
            v.require(
                v[name] is None or v[name] == own[of_role],
                f"--{name.replace('_', '-')} {v[name]} and {of_role} {own[of_role]} of the critic in --megatron-config-path "
                "say two things; keep one",
            )
            v.derive(name, own[of_role], "--megatron-config-path says so for the critic")
    v.require(v["critic_save"] is None or v["save"], f"--critic-save {v['critic_save']} writes along with --save; give it")
    if v["save"] and v["critic_save"] is None:
        v.derive("critic_save", os.path.join(v["save"], "critic"), "it lies beside the actor's checkpoints in --save")
    if v["critic_load"] is None and v["load"] and v.facts.load == "megatron" and not v["finetune"]:
        v.derive("critic_load", os.path.join(v["load"], "critic"), "it lies beside the actor's checkpoints in --load")
    for name in ("save", "load", "ref_load", "hf_checkpoint"):
        v.require(
            not v["critic_save"] or not v[name] or os.path.normpath(v["critic_save"]) != os.path.normpath(v[name]),
            f"--critic-save {v['critic_save']} is --{name.replace('_', '-')}, which a critic would overwrite; name another "
            "folder",
        )
