"""Rules about placement, the algorithm, batches, evaluation, engines and checkpoints; each changes the values it takes."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from slime.config.engine_groups import groups_without_yaml, read_models
from slime.config.errors import ConfigError
from slime.config.eval_datasets import read_eval_datasets
from slime.config.facts import HF_MODEL_TYPES

if TYPE_CHECKING:
    from slime.config.resolve import Values


def debug_modes(v: Values) -> None:
    if v["load_debug_rollout_data"] is not None:
        v.derive("debug_train_only", True, "--load-debug-rollout-data replays rollouts, so no engine is started")
    v.require(
        not (v["debug_train_only"] and v["debug_rollout_only"]),
        "--debug-rollout-only and --debug-train-only (which --load-debug-rollout-data implies) exclude each other",
    )
    if v["dump_details"] is not None:
        v.derive(
            "save_debug_rollout_data",
            os.path.join(v["dump_details"], "rollout_data", "{rollout_id}.pt"),
            "--dump-details is given",
        )
        v.derive(
            "save_debug_train_data", os.path.join(v["dump_details"], "train_data", "{rollout_id}.pt"), "--dump-details is given"
        )
    same = v["save_debug_rollout_data"] is not None and v["save_debug_rollout_data"] == v["load_debug_rollout_data"]
    v.require(
        not same, "--save-debug-rollout-data and --load-debug-rollout-data name the same files; replaying would overwrite them"
    )
    v.require(
        v["save_debug_train_data"] is None or v["save_debug_train_data"] != v["save_debug_rollout_data"],
        "--save-debug-train-data and --save-debug-rollout-data name the same files; one would overwrite the other",
    )
    for name in ("ci_save_grad_norm", "ci_load_grad_norm"):
        whole = v[name] is None or ("{rollout_id}" in v[name] and "{step_id}" in v[name])
        v.require(whole, f"--{name.replace('_', '-')} must hold {{rollout_id}} and {{step_id}}, got {v[name]!r}")
    share = v["load_debug_rollout_data_subsample"]
    v.require(
        share is None or 0 < share <= 1, f"--load-debug-rollout-data-subsample is a share above 0, at most 1; got {share}"
    )
    for name in ("save_debug_rollout_data", "load_debug_rollout_data", "save_debug_train_data"):
        v.require(
            v[name] is None or "{rollout_id}" in v[name],
            f"--{name.replace('_', '-')} must hold {{rollout_id}}, got {v[name]!r}",
        )


def placement(v: Values) -> None:
    """Who gets which GPUs, and who gives them back."""
    actor = v["actor_num_nodes"] * v["actor_num_gpus_per_node"]
    v.require(
        actor >= 1,
        f"--actor-num-nodes {v['actor_num_nodes']} times --actor-num-gpus-per-node {v['actor_num_gpus_per_node']} is no GPU",
    )
    if "distributed_backend" in v.given:
        v.notes.append("--distributed-backend changes nothing: collectives are the device's (NCCL on CUDA, gloo elsewhere)")
    if v["offload"]:
        v.require(
            v["offload_train"] is not False and v["offload_rollout"] is not False,
            "--offload contradicts --no-offload-train/--no-offload-rollout",
        )
        v.derive("offload_train", True, "--offload is given")
        v.derive("offload_rollout", True, "--offload is given")
    if v["debug_rollout_only"]:
        _rollout_only(v, actor)
    if v["debug_train_only"]:
        v.derive("rollout_num_gpus", 0, "--debug-train-only starts no engine")
    if v["colocate"]:
        v.derive(
            "offload_train", True if v["offload_train"] is None else v["offload_train"], "--colocate: engines need the memory"
        )
        v.derive(
            "offload_rollout",
            True if v["offload_rollout"] is None else v["offload_rollout"],
            "--colocate: the trainer needs the memory",
        )
        if v["rollout_num_gpus"] is None:
            v.derive("rollout_num_gpus", actor, f"--colocate: engines use the {actor} training GPUs")
        if 0 < v["rollout_num_gpus"] < actor:
            v.notes.append(
                f"{actor - v['rollout_num_gpus']} training GPUs idle during rollout: --rollout-num-gpus {v['rollout_num_gpus']}"
            )
    v.derive("offload_train", bool(v["offload_train"]), "training and rollout have GPUs of their own")
    v.derive("offload_rollout", bool(v["offload_rollout"]), "training and rollout have GPUs of their own")


def _rollout_only(v: Values, actor: int) -> None:
    if v["rollout_num_gpus"] is None:
        v.require(v["colocate"], "--debug-rollout-only needs --rollout-num-gpus (or --colocate)")
        v.derive("rollout_num_gpus", actor, "--colocate: engines use the training GPUs")
    gpus = v["rollout_num_gpus"] or 0
    per_node = min(v["num_gpus_per_node"], gpus)
    v.derive("actor_num_gpus_per_node", per_node, "--debug-rollout-only places engines alone")
    v.derive("actor_num_nodes", gpus // per_node if per_node else 0, "--debug-rollout-only places engines alone")
    for name in ("colocate", "offload_train", "offload_rollout"):
        v.derive(name, False, "--debug-rollout-only has no trainer")


def engines(v: Values) -> None:
    """Models and groups of engines; their GPUs must add up."""
    if v["debug_train_only"]:
        v.notes.append("no engine is started (--debug-train-only)")
        return
    per_engine = v["rollout_num_gpus_per_engine"]
    v.require(per_engine >= 1, f"--rollout-num-gpus-per-engine must be at least 1, got {per_engine}")
    v.require(
        v["sglang_config"] is None or v["prefill_num_servers"] is None,
        "--sglang-config and --prefill-num-servers exclude each other",
    )
    for name in ("rollout_health_check_interval", "rollout_health_check_timeout"):
        v.require(v[name] > 0, f"--{name.replace('_', '-')} must be positive, got {v[name]:g}")
    v.stop_if_wrong()
    _attention_dp(v)
    if v["sglang_config"] is not None:
        models, notes = read_models(v["sglang_config"], hf_checkpoint=v["hf_checkpoint"], default_gpus_per_engine=per_engine)
        v.notes += notes
        total = sum(group.num_gpus for model in models for group in model.server_groups)
        if v["rollout_num_gpus"] is None:
            v.derive("rollout_num_gpus", total, f"the groups of {v['sglang_config']} add up to it")
        listed = " + ".join(str(group.num_gpus) for model in models for group in model.server_groups)
        v.require(
            total == v["rollout_num_gpus"],
            f"{v['sglang_config']}: num_gpus of all groups is {listed} = {total}, but rollout has {v['rollout_num_gpus']} GPUs"
            + (" (all training GPUs, because of --colocate)" if v["colocate"] and "rollout_num_gpus" not in v.given else ""),
        )
        v["groups"] = models
        return
    v.require(v["rollout_num_gpus"] is not None, "--rollout-num-gpus is needed without --colocate (0 starts the router alone)")
    v.stop_if_wrong()
    v["groups"] = groups_without_yaml(
        rollout_num_gpus=v["rollout_num_gpus"],
        gpus_per_engine=per_engine,
        prefill_num_servers=v["prefill_num_servers"],
        model_path=v["hf_checkpoint"],
    )


def _attention_dp(v: Values) -> None:
    """Checks of --sglang-* that need no SGLang: whole numbers that must divide."""
    sglang = v["sglang"]
    sizes = {}
    for short, long in (("dp_size", "data_parallel_size"), ("pp_size", "pipeline_parallel_size")):
        text = sglang.get(short, sglang.get(long, "1"))
        v.require(
            str(text).isdigit() and int(text) > 0,
            f"--sglang-{short.replace('_', '-')} must be a whole number above 0, got {text!r}",
        )
        sizes[short] = int(text) if str(text).isdigit() else 1
    v.require(
        sizes["dp_size"] == 1 or sglang.get("enable_dp_attention"),
        f"--sglang-dp-size {sizes['dp_size']} needs --sglang-enable-dp-attention",
    )
    v.require(
        v["rollout_num_gpus_per_engine"] % max(sizes["pp_size"], 1) == 0,
        f"--rollout-num-gpus-per-engine {v['rollout_num_gpus_per_engine']} is no multiple of "
        f"--sglang-pp-size {sizes['pp_size']}",
    )


def algorithm(v: Values) -> None:
    v.require(
        v["rollout_temperature"] > 0,
        f"--rollout-temperature must be above 0 (the trainer divides by it), got {v['rollout_temperature']}",
    )
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
    v.require(v["eps_clip_c"] is None or v["eps_clip_c"] > 1, f"--eps-clip-c must be above 1, got {v['eps_clip_c']}")
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


def batch(v: Values) -> None:
    prompts, samples = v["rollout_batch_size"], v["n_samples_per_prompt"]
    v.require(
        prompts is not None and prompts > 0, f"--rollout-batch-size (prompts per rollout) is needed, above 0; got {prompts}"
    )
    v.require(samples > 0, f"--n-samples-per-prompt must be above 0, got {samples}")
    v.stop_if_wrong()
    total = prompts * samples
    steps = v["num_steps_per_rollout"]
    if steps is not None:
        v.require(
            steps > 0 and total % steps == 0,
            f"{total} samples ({prompts} x {samples}) do not divide into --num-steps-per-rollout {steps}",
        )
        v.stop_if_wrong()
        v.require(
            v["global_batch_size"] in (None, total // steps),
            f"--num-steps-per-rollout {steps} means a global batch of {total // steps}, "
            f"but --global-batch-size is {v['global_batch_size']}",
        )
        v.derive("global_batch_size", total // steps, f"{prompts} x {samples} samples in {steps} steps")
    if v["global_batch_size"] is None:
        v.derive("global_batch_size", total, f"all {prompts} x {samples} samples of a rollout make one step")
    v.require(
        v["global_batch_size"] > 0 and total % v["global_batch_size"] == 0,
        f"{total} samples ({prompts} x {samples}) are no multiple of --global-batch-size {v['global_batch_size']}; "
        "the rest would be lost",
    )
    if v["balance_by_flops"]:
        v.require(v["use_dynamic_batch_size"], "--balance-by-flops needs --use-dynamic-batch-size")
        v.derive("balance_data", True, "--balance-by-flops implies it")
    if v["use_dynamic_batch_size"]:
        v.require(v["max_tokens_per_gpu"], "--use-dynamic-batch-size needs --max-tokens-per-gpu")
    if v["log_probs_max_tokens_per_gpu"] is None and v["max_tokens_per_gpu"] is not None:
        v.derive("log_probs_max_tokens_per_gpu", v["max_tokens_per_gpu"], "it defaults to --max-tokens-per-gpu")
    v.require(v["micro_batch_size"] > 0, f"--micro-batch-size must be above 0, got {v['micro_batch_size']}")
    v.require(
        v["log_probs_chunk_size"] == -1 or v["log_probs_chunk_size"] > 0,
        f"--log-probs-chunk-size is -1 (all) or above 0, got {v['log_probs_chunk_size']}",
    )
    if v["over_sampling_batch_size"] is None:
        v.derive("over_sampling_batch_size", prompts, "it defaults to --rollout-batch-size")
    v.require(
        v["over_sampling_batch_size"] >= prompts,
        f"--over-sampling-batch-size {v['over_sampling_batch_size']} is below --rollout-batch-size {prompts}",
    )
    v.require(
        v["partial_rollout"] or not v["mask_offpolicy_in_partial_rollout"],
        "--mask-offpolicy-in-partial-rollout needs --partial-rollout",
    )


def lengths(v: Values) -> None:
    """How many rollouts, and how long prompts may be."""
    if v["num_rollout"] is None:
        v.require(v["num_epoch"] is not None, "give --num-rollout or --num-epoch")
        v.require(
            v["num_epoch"] is None or v["rollout_global_dataset"],
            "--num-epoch needs a data set to count; with --disable-rollout-global-dataset give --num-rollout",
        )
        if v["num_epoch"] is not None:
            v.notes.append(
                f"num_rollout is known once the prompts are read: {v['num_epoch']} epochs x "
                f"(prompts // {v['rollout_batch_size']})"
            )
    elif v["num_epoch"] is not None:
        v.notes.append(f"--num-epoch {v['num_epoch']} is not used, because --num-rollout is given")
    needs_prompts = v["rollout_global_dataset"] and v["num_rollout"] != 0 and v["load_debug_rollout_data"] is None
    v.require(
        not needs_prompts or v["prompt_data"],
        "--prompt-data is needed (or --disable-rollout-global-dataset with a rollout function of your own)",
    )
    context = v["rollout_max_context_len"]
    if context is not None:
        if v["rollout_max_prompt_len"] is None:
            v.derive("rollout_max_prompt_len", context - 1, "--rollout-max-context-len leaves one token for the response")
        v.require(
            v["rollout_max_prompt_len"] <= context - 1,
            f"--rollout-max-prompt-len {v['rollout_max_prompt_len']} must be below --rollout-max-context-len {context}",
        )
        if v["eval_max_context_len"] is None:
            v.derive("eval_max_context_len", context, "it defaults to --rollout-max-context-len")


def evaluation(v: Values) -> None:
    try:
        v["datasets"], notes = read_eval_datasets(v)
    except ConfigError as error:
        v.mistakes.append(str(error))
        return
    v.notes += notes
    if v["datasets"]:
        v["eval_prompt_data"] = tuple(word for one in v["datasets"] for word in (one.name, one.path))
    v.require(v["eval_interval"] is None or v["datasets"], "--eval-interval needs --eval-prompt-data or --eval-config")
    v.require(
        v["eval_interval"] is None or v["eval_interval"] > 0, f"--eval-interval must be above 0, got {v['eval_interval']}"
    )
    v.require(
        v["num_rollout"] != 0 or v["datasets"], "--num-rollout 0 only evaluates; give --eval-prompt-data or --eval-config"
    )
    if v["eval_function_path"] is None:
        v.derive("eval_function_path", v["rollout_function_path"], "it defaults to --rollout-function-path")
    if v["eval_reward_key"] is None and v["reward_key"] is not None:
        v.derive("eval_reward_key", v["reward_key"], "it defaults to --reward-key")


def saving(v: Values) -> None:
    v.require(v["save_interval"] is None or v["save"], "--save-interval needs --save")
    v.require(
        v["save_interval"] is None or v["save_interval"] > 0, f"--save-interval must be above 0, got {v['save_interval']}"
    )
    interval = v["ref_update_interval"]
    if interval is not None:
        v.require(interval > 0, f"--ref-update-interval must be above 0, got {interval}")
        v.require(
            v["save_interval"] is None or interval < 1 or v["save_interval"] % interval == 0,
            f"--save-interval {v['save_interval']} is no multiple of --ref-update-interval {interval}: a run could not be "
            "continued, because a checkpoint does not hold the reference",
        )
        if not (v["use_kl_loss"] or v["kl_coef"]):
            v.notes.append("--ref-update-interval changes nothing: without --use-kl-loss and --kl-coef there is no reference")
    v.require(v["save_hf"] is None or v["save"], "--save-hf writes along with checkpoints; it needs --save")
    v.require(
        not v["use_tensorboard"] or v["tb_project_name"] or v.facts.tensorboard_dir,
        "--use-tensorboard needs --tb-project-name or the environment variable TENSORBOARD_DIR",
    )


def initial_weights(v: Values) -> None:
    """Where the first weights come from: --load if it holds a checkpoint, else --ref-load, else the HF folder."""
    if v["debug_rollout_only"]:
        return
    kind = v.facts.load
    if kind == "iteration":
        folder = v["load"].rstrip("/")
        step = re.fullmatch(r"iter_0*(\d+)", os.path.basename(folder))
        hint = f" --ckpt-step {step.group(1)}" if step else ""
        v.mistakes.append(f"--load {v['load']} is one iteration's folder; give --load {os.path.dirname(folder) or '.'}{hint}")
        return
    if kind == "unknown":
        v.mistakes.append(
            f"--load {v['load']} is an HF model of a type that no weight-name table knows ({', '.join(HF_MODEL_TYPES)})"
        )
        return
    if kind == "megatron":
        return
    why = {
        "nothing": f"--load {v['load']} holds no checkpoint" if v["load"] else "--load is not given",
        "release": f"--load {v['load']} is a converted model without optimizer state",
        "hf": f"--load {v['load']} is an HF model without optimizer state",
    }[kind]
    for name in ("no_load_optim", "no_load_rng", "finetune"):
        v.derive(name, True, why)
    if v["start_rollout_id"] is None:
        v.derive("start_rollout_id", 0, why)
    if kind == "nothing" and v["ref_load"] is not None:
        v.derive("load", v["ref_load"], why + "; the run starts from --ref-load")
        v.derive("ckpt_step", v["ref_ckpt_step"], "the run starts from --ref-load")
    elif kind == "nothing":
        v.derive("load", v["hf_checkpoint"], why + " and there is no --ref-load; the run starts from --hf-checkpoint")
