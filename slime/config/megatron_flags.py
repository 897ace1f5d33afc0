"""Megatron's flags: one per field of the stored table, and hand-written rows where flag and field differ.

Values land in `model.megatron` (TransformerConfig, MLATransformerConfig), `optimizer.megatron` or `optimizer.ddp`, under
megatron-core's field names. Flags that a section dataclass declares itself are not repeated here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from slime.config.expressions import layer_frequency
from slime.config.flags import SCALARS, Converter, Flag, one_of, to_bool, to_float, to_int
from slime.config.megatron_table import read_table
from slime.config.ranges import ANY, Range, within

SECTION_OF = {
    "ModelParallelConfig": "model.megatron",
    "TransformerConfig": "model.megatron",
    "MLATransformerConfig": "model.megatron",
    "OptimizerConfig": "optimizer.megatron",
    "DistributedDataParallelConfig": "optimizer.ddp",
}
_LATER_FP8 = "FP8 or FP4 training"
_LATER_GRAPH = "CUDA graphs in the trainer"

INTERNAL = {
    "virtual_pipeline_model_parallel_size", "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout", "params_dtype", "fp16", "bf16", "gated_linear_unit", "activation_func", "num_moe_experts",
    "layernorm_epsilon", "layernorm_zero_centered_gamma", "add_bias_linear", "fp8", "fp4", "perform_initialization",
    "variable_seq_lengths", "pipeline_dtype", "autocast_dtype", "enable_autocast", "rotary_base", "rotary_percent",
    "multi_latent_attention", "calculate_per_token_loss", "grad_reduce_in_fp32", "check_for_nan_in_grad", "bucket_size",
    "use_distributed_optimizer", "bias_activation_fusion", "microbatch_group_size_per_vp_stage", "test_mode", "timers",
    "gradient_reduce_div_fusion", "deallocate_pipeline_outputs", "overlap_p2p_comm", "batch_p2p_comm", "barrier_with_L1_time",
    "num_query_groups", "persist_layer_norm", "masked_softmax_fusion", "bias_dropout_fusion", "apply_rope_fusion",
    "gradient_accumulation_fusion", "moe_token_dropping", "num_microbatches_with_partial_activation_checkpoints",
    "quant_recipe", "config_logger_dir", "delay_wgrad_compute", "average_in_collective", "mtp_num_layers",
    "mtp_loss_scaling_factor", "mtp_standalone", "fp8_param_gather",
}  # fmt: skip
"""Fields without a flag of their own name: set by this project, derived, or named otherwise below."""

LATER_PREFIXES = {
    "fp8": _LATER_FP8, "fp4": _LATER_FP8, "first_last_layers_bf16": _LATER_FP8, "tp_only_amax_red": _LATER_FP8,
    "cuda_graph": _LATER_GRAPH, "enable_cuda_graph": _LATER_GRAPH, "external_cuda_graph": _LATER_GRAPH,
    "tp_comm": "TransformerEngine's overlapped tensor-parallel communication", "use_kitchen": "the kitchen library",
    "kitchen": "the kitchen library", "mamba": "Mamba layers", "is_hybrid_model": "Mamba layers",
    "use_mamba": "Mamba layers", "flash_decode": "inference in the trainer", "inference": "inference in the trainer",
    "use_inference": "inference in the trainer", "cpu_offloading": "activation offloading",
    "fine_grained": "activation offloading", "offload_modules": "activation offloading",
    "min_offloaded": "activation offloading", "muon": "the Muon optimizer", "use_megatron_fsdp": "FSDP",
    "use_custom_fsdp": "FSDP", "fsdp": "FSDP", "data_parallel_sharding_strategy": "FSDP",
    "outer_dp_sharding": "FSDP", "nccl_ub": "FSDP", "hybrid_context_parallel": "hybrid context parallelism",
    "hierarchical_context": "hierarchical context parallelism", "max_seqlen_per_dp_cp_rank": "hybrid context parallelism",
    "moe_enable_routing_replay": "routing replay", "hetero": "heterogeneous layers", "hetereo": "heterogeneous layers",
    "experimental_attention_variant": "megatron-core's own sparse attention (the GLM plugin brings one)",
    "dsa_": "megatron-core's own sparse attention (the GLM plugin brings one)", "linear_": "linear attention layers",
    "keep_fp8": _LATER_FP8, "reuse_grad_buf_for_mxfp8": _LATER_FP8, "preserve_fp32_weights": "FSDP",
    "loss_scale": "fp16 training",
    "initial_loss_scale": "fp16 training", "min_loss_scale": "fp16 training", "hysteresis": "fp16 training",
    "decoupled_": "a learning rate of its own for embeddings", "init_model_with_meta_device": "FSDP",
    "account_for_": "a split that counts embedding and loss as layers (--pipeline-model-parallel-layout places every layer)",
    "defer_embedding_wgrad": "apex's fused weight gradients", "wgrad_deferral_limit": "apex's fused weight gradients",
    "distribute_saved_activations": "saved activations shared without sequence parallelism",
    "use_ring_exchange_p2p": "a torch that is built with ring exchange",
    "overlap_p2p_comm_warmup_flush": "overlapped transfers in warm-up and flush",
    "overlap_moe_expert_parallel_comm": "overlapped micro-batches",
    "overlap_param_gather_with_optimizer_step": "weights that are gathered while the optimizer steps",
    "num_distributed_optimizer_instances": "several distributed optimizers",
    "moe_layer_recompute": "the older spelling (--recompute-granularity selective --recompute-modules moe)",
}  # fmt: skip
"""Beginning of a field name -> what is missing; such a flag parses and is refused."""


_COUNT, _POSITIVE, _SHARE, _WEIGHT = Range(low=1), Range(above=0), Range(low=0, below=1), Range(low=0)
RANGES = {
    **dict.fromkeys(
        ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "kv_channels",
         "num_moe_experts", "recompute_num_layers", "moe_shared_expert_intermediate_size", "moe_ffn_hidden_size",
         "moe_router_topk", "moe_router_num_groups", "moe_router_group_topk", "q_lora_rank", "kv_lora_rank", "qk_head_dim",
         "qk_pos_emb_head_dim", "v_head_dim", "original_max_position_embeddings", "moe_latent_size"), _COUNT),
    **dict.fromkeys(("hidden_dropout", "attention_dropout"), _SHARE),
    "layernorm_epsilon": Range(above=0, below=1),
    **dict.fromkeys(("moe_router_topk_scaling_factor", "moe_expert_capacity_factor", "rotary_scaling_factor", "softmax_scale",
                     "init_method_std", "embedding_init_method_std"), _POSITIVE),
    **dict.fromkeys(("moe_router_bias_update_rate", "moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_input_jitter_eps"), _WEIGHT),
}  # fmt: skip
"""Field -> the numbers that it takes; other whole numbers begin at 0, other numbers are finite."""


def _bounded(row: Flag, *, whole: bool) -> Flag:
    return replace(row, convert=within(row.convert, RANGES.get(row.dest, _WEIGHT if whole else ANY)))


def _list_or_one(convert: Converter) -> Callable[[tuple[object, ...]], object]:
    return lambda values: values[0] if len(values) == 1 else list(values)


def _window(text: str) -> tuple[int, int]:
    left, _, right = text.strip("() ").partition(",")
    return to_int(left), to_int(right)


def _kind(annotation: str) -> tuple[Converter, int | str] | None:
    """Converter and number of values for an annotation of the table; None when a flag cannot say it."""
    bare = annotation
    if match := re.fullmatch(r"Optional\[(.*)\]", bare):
        bare = match.group(1)
    if match := re.fullmatch(r"Literal\[(.*)\]", bare):
        return one_of(tuple(word.strip(" '") for word in match.group(1).split(","))), 1
    if bare == "Union[int, List[int]]":
        return layer_frequency, 1
    listed = {
        "List[int]": to_int, "list[int]": to_int, "List[str]": str, "list[str]": str, "Union[str, List[str]]": str,
        "Union[float, List[float]]": to_float, "Union[str, CudaGraphScope, List[str], List[CudaGraphScope]]": str,
    }  # fmt: skip
    if bare in listed:
        return listed[bare], "one or more"
    if bare == "Tuple[int, int]":
        return _window, 1
    if bare == "AttnBackend":
        return one_of(("flash", "fused", "unfused", "local", "auto")), 1
    scalars = {"int": int, "float": float, "str": str, "bool": bool}
    return (SCALARS[scalars[bare]], 1) if bare in scalars else None


def _generated(taken: set[str]) -> Iterator[Flag]:
    for cls, section in SECTION_OF.items():
        for name, row in read_table()[cls].items():
            text = "--" + name.replace("_", "-")
            if name in INTERNAL or text in taken:
                continue
            kind = _kind(str(row["type"]))
            if kind is None:
                continue
            taken.add(text)
            later = next((why for start, why in LATER_PREFIXES.items() if name.startswith(start)), "")
            if row["type"] == "bool" or row["type"] == "Optional[bool]":
                yield Flag(text, name, section, to_bool, 0, True, later=later)
                yield Flag("--no-" + text[2:], name, section, to_bool, 0, False, later=later)
            else:
                row_type = str(row["type"])
                flag = Flag(text, name, section, kind[0], kind[1], later=later, optional=row_type.startswith("Optional"))
                yield _bounded(flag, whole=row_type in ("int", "Optional[int]"))


M, D = "model.megatron", "optimizer.ddp"
HAND_WRITTEN: tuple[Flag, ...] = (
    Flag("--num-experts", "num_moe_experts", M, to_int),
    Flag("--norm-epsilon", "layernorm_epsilon", M, to_float),
    Flag("--layernorm-epsilon", "layernorm_epsilon", M, to_float),
    Flag("--apply-layernorm-1p", "layernorm_zero_centered_gamma", M, to_bool, 0, True),
    Flag("--disable-bias-linear", "add_bias_linear", M, to_bool, 0, False),
    Flag("--num-query-groups", "num_query_groups", M, to_int),
    Flag("--no-rope-fusion", "apply_rope_fusion", M, to_bool, 0, False),
    Flag("--no-masked-softmax-fusion", "masked_softmax_fusion", M, to_bool, 0, False),
    Flag("--no-bias-dropout-fusion", "bias_dropout_fusion", M, to_bool, 0, False),
    Flag("--no-bias-swiglu-fusion", "bias_activation_fusion", M, to_bool, 0, False),
    Flag("--no-bias-gelu-fusion", "bias_activation_fusion", M, to_bool, 0, False),
    Flag("--no-gradient-accumulation-fusion", "gradient_accumulation_fusion", M, to_bool, 0, False),
    Flag("--no-persist-layer-norm", "persist_layer_norm", M, to_bool, 0, False),
    Flag("--no-initialization", "perform_initialization", M, to_bool, 0, False),
    Flag("--overlap-p2p-communication", "overlap_p2p_comm", M, to_bool, 0, True),
    Flag("--no-overlap-p2p-communication", "overlap_p2p_comm", M, to_bool, 0, False),
    Flag("--fp8-format", "fp8", M, one_of(("e4m3", "hybrid")), later=_LATER_FP8),
    Flag("--fp8-param-gather", "fp8_param_gather", D, to_bool, 0, True, later=_LATER_FP8),
    Flag("--use-gated-attention", "attention_output_gate", M, to_bool, 0, True,
         later="attention with an output gate (Qwen3-Next, Qwen3.5)"),
    Flag("--fp4-format", "fp4", M, one_of(("e2m1",)), later=_LATER_FP8),
    Flag("--ddp-average-in-collective", "average_in_collective", D, to_bool, 0, True,
         later="averaged gradients (every denominator is in the loss weights; gradients are summed)"),
)  # fmt: skip

ALIASES = {
    "num_experts": "num_moe_experts",
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "fp8_format": "fp8",
}
"""Name that plugins know from Megatron's argparse -> field of the table."""


def megatron_flags(taken: set[str]) -> list[Flag]:
    """Every Megatron flag that no section declares. `taken` holds the flag names that sections declare."""
    rows = [_bounded(row, whole=row.convert is to_int) for row in HAND_WRITTEN if row.name not in taken]
    return rows + list(_generated(taken | {row.name for row in rows}))


def default_of(name: str) -> object:
    """megatron-core's default of a field, for plugins that read a flag which was not given. Raises KeyError."""
    for cls in SECTION_OF:
        row = read_table()[cls].get(name)
        if row is not None and not str(row["default"]).startswith("<"):
            return row["default"]
    raise KeyError(name)
