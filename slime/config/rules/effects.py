"""Flags that are taken because recipes carry them and change nothing, or less than one may think: a note at start says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from slime.config import front_end

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


def without_effect(v: Values) -> None:
    for name, why in ONE_ANSWER.items():
        if name in v.given:
            v.notes.append(f"--{name.replace('_', '-')} changes nothing: {why}")
    for names, given in ((UNREAD, v["model.megatron"]), (UNREAD_OPTIMIZER, {**v["optimizer.megatron"], **v["optimizer.ddp"]})):
        v.notes += [f"--{name.replace('_', '-')} changes nothing: {why}" for name, why in names.items() if name in given]
