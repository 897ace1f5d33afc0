"""On-policy distillation: one teacher, and somebody who asks it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slime.config.rules.rewards import address

if TYPE_CHECKING:
    from slime.config.rules.book import Values

MODULE = "slime.rollout.on_policy_distillation"


def distillation(v: Values) -> None:
    if not v["use_opd"]:
        asked = [name for name in ("opd_type", "opd_kl_coef", "opd_teacher_load", "opd_teacher_ckpt_step") if name in v.given]
        names = ", ".join("--" + name.replace("_", "-") for name in asked)
        v.require(not asked, f"{names} has no effect without --use-opd; add it or remove what is without it")
        return
    v.require(
        v["opd_type"], "--use-opd learns from a teacher, and nothing says where it runs; give --opd-type sglang or megatron"
    )
    v.require(
        v["loss_type"] == "policy_loss" and v["compute_advantages_and_returns"],
        f"--use-opd changes advantages, and --loss-type {v['loss_type']} has none here; use policy_loss and leave out "
        "--disable-compute-advantages-and-returns",
    )
    teacher = v["opd_teacher_load"]
    if v["opd_type"] == "megatron":
        v.require(teacher, "--opd-type megatron loads the teacher beside the model; give its weights with --opd-teacher-load")
        v.require(
            teacher is None or v.facts.opd_teacher_load != "nothing" or v.door == "rehearse",
            f"--opd-type megatron needs the teacher, but there is nothing in --opd-teacher-load {teacher}",
        )
        v.require(not v.facts.opd_teacher_problem, f"--opd-teacher-load {teacher}: {v.facts.opd_teacher_problem}")
        if not (v["debug_train_only"] or _is_graded(v)):
            v.derive("custom_rm_path", f"{MODULE}.no_reward", "the teacher is all that is learnt from")
        return
    v.require(
        teacher is None,
        f"--opd-type sglang asks a server, and --opd-teacher-load {teacher} is weights; use --opd-type megatron or remove it",
    )
    if v["opd_type"] == "sglang" and not v["debug_train_only"]:
        _asked_by_http(v)


def _is_graded(v: Values) -> bool:
    return bool(v["custom_rm_path"] or v["rm_type"] or v["custom_generate_function_path"] or "metadata_key" in v.given)


def _asked_by_http(v: Values) -> None:
    v.require(
        v["rollout_temperature"] == 1,
        f"--opd-type sglang: a server scores at temperature 1, and --rollout-temperature is {v['rollout_temperature']:g}; use "
        "1, or --opd-type megatron, which scores at any",
    )
    v.require(
        v["rm_type"] != "remote_rm",
        "--opd-type sglang: --rm-url is the teacher's address, and --rm-type remote_rm would grade there; use another grader",
    )
    own = v["custom_rm_path"]
    if v["custom_reward_post_process_path"] and not v["custom_reward_post_process_path"].startswith(MODULE):
        return  # a recipe that asks the teacher by functions of its own
    v.require(v["rm_url"], "--opd-type sglang asks the teacher at --rm-url, which is not given; give http://HOST:PORT/generate")
    if v["rm_url"]:
        address(v)
    if not _is_graded(v):
        v.derive("custom_rm_path", f"{MODULE}.reward_func", "the teacher is the only one who grades")
    elif own is None or not own.startswith(MODULE):
        hooks = v["rollout_sample_hook_path"]
        v.derive("rollout_sample_hook_path", (*hooks, f"{MODULE}.teacher_hook"), "the teacher scores beside the grader")
