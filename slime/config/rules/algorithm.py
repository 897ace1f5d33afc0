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
        not v["custom_tis_function_path"] or v["use_tis"] or v["get_mismatch_metrics"],
        f"--custom-tis-function-path {v['custom_tis_function_path']} is called by nothing; add --use-tis, or "
        f"--get-mismatch-metrics to measure alone, or remove it",
    )
    v.require(v["tis_clip_low"] <= v["tis_clip"], f"--tis-clip-low {v['tis_clip_low']} is above --tis-clip {v['tis_clip']}")
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
