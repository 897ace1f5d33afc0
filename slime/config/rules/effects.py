"""Flags that are taken because recipes carry them and change nothing, or less than one may think: a note at start says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from slime.config import front_end
from slime.config.training import CENTRED

if TYPE_CHECKING:
    from slime.config.rules.book import Values

ONE_ANSWER: Mapping[str, str] = {
    "train_backend": "there is one, megatron-core",
    "distributed_backend": "collectives are the device's (NCCL on CUDA, gloo elsewhere)",
    "rollout_data_transport": "rollouts go through Ray's object store",
    "use_distributed_optimizer": "the optimizer is always distributed",
    "accumulate_allreduce_grads_in_fp32": "gradients are always summed in float32",
    "enable_experimental": "no experimental part of megatron-core is in use",
    "main_params_dtype": "master weights are float32",
    "add_position_embedding": "the model families here are rotary and have no such table",
    "model_name": "model_type of config.json names the table of weight names",
    "log_probs_max_tokens_per_gpu": "passes without gradient run over the steps' own micro-batches, as in slime",
    "http_proxy": "requests between the run's own processes never use one, as in slime",
    "use_distributed_post": "the rollout actor sends every request itself",
    **front_end.WHY,
}
"""Attribute -> why its flag changes nothing."""

UNREAD: Mapping[str, str] = {
    "attention_softmax_in_fp32": "attention here always sums in float32",
    "attention_backend": "attention is torch's, or the plugin's kernels",
    "batch_invariant_mode": "it is about TransformerEngine's kernels",
    "cache_mla_latents": "it is about inference in the trainer",
    "disable_bf16_reduced_precision_matmul": "no code here reads it",
    "init_method_std": "every parameter comes from a checkpoint",
    "embedding_init_method_std": "every parameter comes from a checkpoint",
    "perform_initialization": "every parameter comes from a checkpoint",
    "use_cpu_initialization": "the device decides where a model is built",
    "log_max_attention_logit": "attention here holds no logits",
    "moe_extended_tp": "experts are cut by --expert-tensor-parallel-size",
    "moe_per_layer_logging": "there is no router loss to log",
    "moe_router_padding_for_fp8": "the trainer does not compute in FP8",
    "moe_router_topk_limited_devices": "groups limit the choice of experts, not devices",
    "num_layers_at_start_in_bf16": "the trainer does not compute in FP8",
    "num_layers_at_end_in_bf16": "the trainer does not compute in FP8",
    "pipeline_model_parallel_comm_backend": "the device decides how stages talk",
    "overlap_p2p_comm": "the schedule decides it: on with virtual stages, off without",
    "batch_p2p_comm": "the schedule decides it: off with virtual stages, on without",
    "activation_func_fp8_input_store": "the trainer does not compute in FP8",
    "apply_query_key_layer_scaling": "attention here scales by the heads' width, in float32",
    "async_tensor_model_parallel_allreduce": "megatron-core itself no longer reads it",
    "cp_comm_type": "context-parallel ranks exchange keys by this project's attention",
    "cross_entropy_fusion_impl": "log-probabilities are computed by slime.ops.vocab_logprob",
    "disable_parameter_transpose_cache": "it is TransformerEngine's",
    "ep_overlap_early_attn_memory_release": "micro-batches are not overlapped",
    "fused_single_qkv_rope": "its kernel is TransformerEngine's",
    "memory_efficient_layer_norm": "norms here are this project's own",
    "moe_use_legacy_grouped_gemm": "experts here run as one grouped product",
    "symmetric_ar_type": "it is TransformerEngine's",
    "use_fused_weighted_squared_relu": "the experts' activation is SiLU",
    "use_te_rng_tracker": "it is TransformerEngine's",
    "mlp_chunks_for_prefill": "it is about inference in the trainer",
    "moe_router_padding_for_quantization": "the trainer does not compute in FP8",
    "moe_token_drop_policy": "no token is dropped",
    "transformer_impl": "layers are this project's and megatron-core's own",
}
"""Field of megatron-core's config -> why no code that runs here reads it. A test records what a whole tiny run reads."""

UNREAD_OPTIMIZER: Mapping[str, str] = {
    "log_num_zeros_in_grad": "no metric shows it",
    "store_param_remainders": "it is TransformerEngine's Adam's",
    "suggested_communication_unit_size": "it is about FSDP",
    "disable_symmetric_registration": "it is about FSDP",
}
"""The same of its optimizer and its gradient buffers."""


_KL = "without --use-kl-loss and --kl-coef no KL is computed"
_KL_LOSS = "without --use-kl-loss the loss has no KL"
_EVALUATION = "there is no evaluation (--eval-prompt-data or --eval-config)"
_WANDB = "without --use-wandb nothing goes there"
_HEALTH = "without --use-fault-tolerance engines are not asked whether they are well"

BELONGS: tuple[tuple[tuple[str, ...], Callable[[Values], object], str], ...] = (
    (("use_unbiased_kl",), lambda v: v["use_kl_loss"], _KL_LOSS),
    (("kl_loss_type",), lambda v: v["use_kl_loss"] or v["kl_coef"], _KL),
    (("opsm_delta",), lambda v: v["use_opsm"], "without --use-opsm no sequence is masked"),
    (
        (
            "skip_eval_before_train", "eval_input_key", "eval_label_key", "eval_tool_key", "eval_reward_key",
            "n_samples_per_eval_prompt", "eval_temperature", "eval_top_p", "eval_top_k", "eval_max_response_len",
            "eval_max_prompt_len", "eval_min_new_tokens", "eval_max_context_len",
        ),
        lambda v: v["datasets"],
        _EVALUATION,
    ),
    (
        (
            "wandb_mode", "wandb_dir", "wandb_key", "wandb_host", "wandb_team", "wandb_group", "wandb_project",
            "wandb_random_suffix", "wandb_always_use_train_step", "wandb_run_id",
        ),
        lambda v: v["use_wandb"],
        _WANDB,
    ),
    (
        ("tb_project_name", "tb_experiment_name"),
        lambda v: v["use_tensorboard"],
        "without --use-tensorboard no such file is written",
    ),
    (
        ("rollout_health_check_interval", "rollout_health_check_timeout", "rollout_health_check_first_wait"),
        lambda v: v["use_fault_tolerance"],
        _HEALTH,
    ),
    (
        ("gamma",),
        lambda v: v["advantage_estimator"] in ("ppo", "reinforce_plus_plus"),
        "only ppo and reinforce_plus_plus discount",
    ),
    (
        ("lr_wsd_decay_iters", "lr_wsd_decay_style"),
        lambda v: v["lr_decay_style"] == "WSD",
        "only --lr-decay-style WSD has a last decay",
    ),
    (("sgd_momentum",), lambda v: v["optimizer"] == "sgd", "only --optimizer sgd has it"),
    (("adam_beta1", "adam_beta2", "adam_eps"), lambda v: v["optimizer"] == "adam", "only --optimizer adam has it"),
    (("mtp_loss_scaling_factor",), lambda v: v["enable_mtp_training"], "without --enable-mtp-training there is no such loss"),
    (
        ("micro_batch_size",),
        lambda v: not v["use_dynamic_batch_size"],
        "with --use-dynamic-batch-size tokens fill a micro-batch (--max-tokens-per-gpu)",
    ),
    (
        ("max_tokens_per_gpu",),
        lambda v: v["use_dynamic_batch_size"],
        "without --use-dynamic-batch-size a micro-batch is --micro-batch-size samples",
    ),
    (
        ("dsa_core_axis", "dsa_move_cost", "dsa_index_scoring", "dsa_attention_forward", "dsa_send_indices"),
        lambda v: v.hf is None or v.hf.has_indexer,
        "the model has no sparse attention",
    ),
    (
        ("apply_chat_template_kwargs",),
        lambda v: v["apply_chat_template"] or not v["rollout_function_path"].startswith("slime.rollout.sglang_rollout."),
        "without --apply-chat-template no template is rendered",
    ),
)  # fmt: skip
"""(attributes, where they mean something, why they do not elsewhere)."""


def belongs_to_another(v: Values) -> None:
    """Flags of something that this configuration has not."""
    for names, means_something, why in BELONGS:
        asked = [name for name in names if name in v.given]
        if asked and not means_something(v):
            v.notes += [f"{spelled(name)} changes nothing: {why}" for name in asked]
    one, centred = v["n_samples_per_prompt"] == 1, v["advantage_estimator"] in CENTRED and v["rewards_normalization"]
    makes_more = v["custom_generate_function_path"] or v["custom_reward_post_process_path"]
    alone = v["loss_type"] == "policy_loss" and not (v["use_opd"] or v["use_kl_loss"] or v["kl_coef"] or v["entropy_coef"])
    if one and centred and alone and not makes_more and v["compute_advantages_and_returns"] and not v["debug_rollout_only"]:
        v.notes.append(
            f"--n-samples-per-prompt 1 learns nothing: --advantage-estimator {v['advantage_estimator']} takes the mean of a "
            "prompt's rewards off each, and the mean of one is itself; give more samples, or --disable-rewards-normalization"
        )


OTHERWISE: Mapping[str, str] = {
    "wandb_random_suffix": "--disable-wandb-random-suffix",
    "add_position_embedding": "--no-position-embedding",
    "perform_initialization": "--no-initialization",
    "overlap_p2p_comm": "--overlap-p2p-communication",
}
"""Attributes and fields whose flag has another name."""


def spelled(name: str) -> str:
    """The flag that sets the attribute or field."""
    return OTHERWISE.get(name, "--" + name.replace("_", "-"))


def without_effect(v: Values) -> None:
    for name, why in ONE_ANSWER.items():
        if name in v.given:
            v.notes.append(f"{spelled(name)} changes nothing: {why}")
    for names, given in ((UNREAD, v["model.megatron"]), (UNREAD_OPTIMIZER, {**v["optimizer.megatron"], **v["optimizer.ddp"]})):
        v.notes += [f"{spelled(name)} changes nothing: {why}" for name, why in names.items() if name in given]
