"""What is optimised: estimators, clips, and the terms that exclude each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slime.config.rules.book import Values


def algorithm(v: Values) -> None:
    v.require(
        not (v["kl_coef"] and v["kl_loss_coef"]),
        "--kl-coef and --kl-loss-coef would both count the KL to the reference; use one",
    )
    if v["kl_coef"] or v["use_kl_loss"]:
        why = "--kl-coef" if v["kl_coef"] else "--use-kl-loss"
        v.require(v["ref_load"] is not None, f"{why} compares with a reference model; give --ref-load")
        present = v.facts.ref_load != "nothing" or v.door == "rehearse"
        v.require(
            v["ref_load"] is None or present,
            f"{why} needs the reference model, but there is nothing in --ref-load {v['ref_load']}",
        )
    if v["kl_loss_coef"] and not v["use_kl_loss"]:
        v.mistakes.append(
            f"--kl-loss-coef {v['kl_loss_coef']} has no effect without --use-kl-loss; add it or remove the coefficient"
        )
    v.require(
        v["advantage_estimator"] not in ("reinforce_plus_plus", "reinforce_plus_plus_baseline") or v["normalize_advantages"],
        f"--advantage-estimator {v['advantage_estimator']} needs --normalize-advantages",
    )
    v.require(
        not (v["use_rollout_logprobs"] and v["use_tis"]), "--use-rollout-logprobs leaves --use-tis nothing to correct; use one"
    )
    v.require(
        not v["get_mismatch_metrics"] or v["custom_tis_function_path"],
        "--get-mismatch-metrics needs --custom-tis-function-path",
    )
    v.require(
        not v["custom_tis_function_path"] or v["use_tis"] or v["use_rs"] or v["get_mismatch_metrics"],
        f"--custom-tis-function-path {v['custom_tis_function_path']} is called by nothing; add --use-tis, or "
        f"--get-mismatch-metrics to measure alone, or remove it",
    )
    v.require(v["tis_clip_low"] <= v["tis_clip"], f"--tis-clip-low {v['tis_clip_low']} is above --tis-clip {v['tis_clip']}")
    if v["use_rollout_routing_replay"]:
        v.derive("use_routing_replay", True, "--use-rollout-routing-replay is one, with the engines' choices")
    if v["use_routing_replay"]:
        v.require(
            "num_layers" not in v["model.megatron"] or v["model.megatron"].get("num_moe_experts"),
            "--use-routing-replay records which experts were chosen, and the model has none; remove it",
        )
        v.require(
            v["loss_type"] == "policy_loss" and v["compute_advantages_and_returns"],
            "--use-routing-replay takes experts from the pass of the old log-probs, which "
            f"--loss-type {v['loss_type']} does not make; remove it",
        )
    _importance(v)
    _lengths(v)
    v.require(
        v["advantage_estimator"] != "rloo" or v["n_samples_per_prompt"] > 1 or v["custom_reward_post_process_path"],
        f"--advantage-estimator rloo compares a sample with the others of its prompt, and --n-samples-per-prompt is "
        f"{v['n_samples_per_prompt']}; give at least 2",
    )
    v.require(
        v["advantage_estimator"] != "rloo" or v["rewards_normalization"],
        "--advantage-estimator rloo is the distance from the others' mean, and --disable-rewards-normalization takes it off; "
        "leave one of them out",
    )
    if v["eps_clip_high"] is None:
        v.derive("eps_clip_high", v["eps_clip"], "it defaults to --eps-clip")
    if v["advantage_estimator"] == "cispo" and v["eps_clip"] < 1:
        v.notes.append(f"CISPO with --eps-clip {v['eps_clip']} clips below as well; the paper does not (use 1 or more)")
    if v["loss_type"] == "custom_loss":
        v.require(v["custom_loss_function_path"], "--loss-type custom_loss needs --custom-loss-function-path")
    if v["loss_type"] == "sft_loss" and v["compute_advantages_and_returns"]:
        v.derive("compute_advantages_and_returns", False, "supervised training has no advantages")
    if v["n_samples_per_prompt"] == 1 and v["grpo_std_normalization"]:
        v.derive("grpo_std_normalization", False, "one sample per prompt has no spread to divide by")


def _lengths(v: Values) -> None:
    """What depends on the length of responses: Dr. GRPO's constant and DAPO's penalty."""
    constant, buffer, longest = v["pg_loss_length"], v["overlong_buffer_len"], v["rollout_max_response_len"]
    v.require(
        constant is None or not v["calculate_per_token_loss"],
        f"--pg-loss-length {constant} and --calculate-per-token-loss divide the policy loss by two things; use one",
    )
    v.require(
        constant is None or v["custom_pg_loss_reducer_function_path"] is None,
        f"--pg-loss-length {constant} and --custom-pg-loss-reducer-function-path divide the policy loss by two things; use one",
    )
    if constant is not None and v["advantage_estimator"] == "grpo" and v["grpo_std_normalization"]:
        v.notes.append("Dr. GRPO divides by no standard deviation either; --disable-grpo-std-normalization turns that off")
    if buffer is None:
        v.require(
            "overlong_penalty_factor" not in v.given,
            f"--overlong-penalty-factor {v['overlong_penalty_factor']:g} has no effect without --overlong-buffer-len; add it",
        )
        return
    v.require(
        longest is None or buffer < longest,
        f"--overlong-buffer-len {buffer} leaves no length without a penalty, --rollout-max-response-len is {longest}; lower it",
    )
    v.require(
        longest is not None,
        f"--overlong-buffer-len {buffer} counts from --rollout-max-response-len, which is not given; give it",
    )
    for name in ("custom_reward_post_process_path", "custom_convert_samples_to_train_data_path"):
        v.require(
            v[name] is None,
            f"--overlong-buffer-len shapes rewards before they are normalised, which --{name.replace('_', '-')} replaces; "
            "use one",
        )


def _importance(v: Values) -> None:
    """Bounds of importance weights and of rejection, and what asks for them without being on."""
    own = v["custom_tis_function_path"]
    if not (v["use_tis"] or v["use_rs"] or v["get_mismatch_metrics"]):
        asked = [name for name in ("tis_mode", "tis_level", "tis_batch_normalize", "rs_veto_threshold") if name in v.given]
        names = ", ".join("--" + name.replace("_", "-") for name in asked)
        v.require(not asked, f"{names} has no effect without --use-tis or --use-rs; add one or remove it")
        return
    upper, why = v["tis_upper_bound"], "it defaults to --tis-clip"
    if upper is None:
        v.derive("tis_upper_bound", upper := v["tis_clip"], why)
    if v["tis_lower_bound"] is None and not v["tis_clip_low"] and v["tis_mode"] in ("mask", "icepop"):
        v.derive("tis_lower_bound", 1 / upper, "without a bound of its own it is 1 / the upper one")
    elif v["tis_lower_bound"] is None:
        v.derive("tis_lower_bound", v["tis_clip_low"], "it defaults to --tis-clip-low")
    if v["use_rs"]:
        if v["rs_upper_bound"] is None:
            v.derive("rs_upper_bound", upper, "it defaults to --tis-upper-bound")
        if v["rs_lower_bound"] is None:
            lower, why = v["tis_lower_bound"], "it defaults to --tis-lower-bound"
            v.derive("rs_lower_bound", lower or 1 / v["rs_upper_bound"], why if lower else "it is 1 / the upper bound")
        _ordered(v, "rs")
        v.require(not v["use_rollout_logprobs"], "--use-rollout-logprobs leaves --use-rs nothing to compare; use one")
        if own is not None:
            v.notes.append(f"--use-rs is left to --custom-tis-function-path {own}, which replaces what is built in")
    _ordered(v, "tis")
    v.require(
        not v["tis_batch_normalize"] or v["use_tis"],
        "--tis-batch-normalize divides the weights of --use-tis, which is off; add it or leave the division out",
    )


def _ordered(v: Values, kind: str) -> None:
    low, high = v[f"{kind}_lower_bound"], v[f"{kind}_upper_bound"]
    v.require(
        low <= high, f"--{kind}-lower-bound {low:g} is above --{kind}-upper-bound {high:g}; no ratio lies between, so swap them"
    )
