"""megatron-core's TransformerConfig from ours, with the reason for every value that is not the user's."""

from __future__ import annotations

import logging
from dataclasses import fields

import torch
import torch.nn.functional as F

from slime.compat.megatron import prepare

prepare()

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig  # noqa: E402

from slime.config.rules.effects import UNREAD  # noqa: E402
from slime.device import Device  # noqa: E402

logger = logging.getLogger(__name__)

# Field -> why it cannot be honoured without TransformerEngine or apex.
NEEDS_OTHER_PACKAGES = {
    "moe_permute_fusion": "its kernel is TransformerEngine's",
    "gradient_accumulation_fusion": "its kernel is apex's",
    "masked_softmax_fusion": "attention here is torch's own",
    "bias_activation_fusion": "its fused SwiGLU is compiled per process; torch's own is used",
    "bias_dropout_fusion": "there is neither bias nor dropout to fuse",
    "apply_rope_fusion": "its kernel is TransformerEngine's",
    "persist_layer_norm": "its kernel is apex's",
    "tp_comm_overlap": "it is TransformerEngine's",
    "cross_entropy_loss_fusion": "log-probabilities are computed by slime.ops.vocab_logprob",
    "moe_grouped_gemm": "the experts here always run as one grouped product (slime.ops.experts)",
    "moe_router_fusion": "its kernel is TransformerEngine's",
    "moe_shared_expert_overlap": "it needs two CUDA streams inside TransformerEngine's linears",
}

# Selective recomputation of modules that keep nothing worth recomputing here, or cannot be.
_NOTHING_TO_RECOMPUTE = {
    "core_attn": "attention here never holds a score matrix",
    "mla_up_proj": "keys and values are not expanded (sparse attention), or SDPA keeps them",
    "layernorm": "megatron-core drops a norm's output by TransformerEngine's checkpoint",
    "moe_act": "the grouped experts keep it; recompute the module 'moe' to save that memory",
}

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def params_dtype(config: object, device: Device) -> torch.dtype:
    """--params-dtype (or --bf16), else the device's default."""
    if config.model.params_dtype != "auto":
        return _DTYPES[config.model.params_dtype]
    return torch.bfloat16 if config.model.bf16 else device.default_params_dtype


def transformer_config(
    config: object, device: Device, *, dtype: torch.dtype | None = None, weights_only: bool = False
) -> tuple[TransformerConfig, list[str]]:
    """(megatron-core's config, notes: one line per value changed, with the reason).

    dtype overrides the config's parameter dtype. weights_only: the model will hold weights and never compute (conversion).

    `config.model.megatron` holds the values of the command line under megatron-core's field names; `config.parallel` the sizes.
    Raises ValueError for combinations that would compute something else than asked.
    """
    parallel, model = config.parallel, config.model
    values = dict(model.megatron)
    notes: list[str] = []
    _refuse(parallel, values, weights_only)
    for name in UNREAD:  # said at start to change nothing; megatron-core's constructor may still refuse one
        values.pop(name, None)
    for name, reason in NEEDS_OTHER_PACKAGES.items():
        if values.pop(name, False):
            notes.append(f"{name} off: {reason}")
        values[name] = False
    _dispatcher(values, notes)
    _recompute(values, notes)
    if model.swiglu or values.get("gated_linear_unit"):
        values.update(gated_linear_unit=True, activation_func=F.silu)
    if dtype is None:
        dtype = params_dtype(config, device)
        if config.model.params_dtype == "auto" and not config.model.bf16:
            notes.append(f"params_dtype {dtype}: {device.default_params_dtype_reason}")
    values.update(_parallel_values(parallel, mtp=bool(model.mtp_num_layers)))
    values.update(
        mtp_num_layers=model.mtp_num_layers or None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        transformer_impl="local",
        use_cpu_initialization=device.kind == "host",
        perform_initialization=False,  # every parameter comes from a checkpoint; the loader proves that none is missing
        deallocate_pipeline_outputs=True,
        variable_seq_lengths=True,
        # The driver owns the denominators: token losses arrive weighted, so gradients are summed and never divided.
        calculate_per_token_loss=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    known = {field.name for cls in (TransformerConfig, MLATransformerConfig) for field in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"not fields of the installed megatron-core's TransformerConfig: {', '.join(unknown)}")
    if model.multi_latent_attention or values.get("multi_latent_attention"):
        values.update(multi_latent_attention=True)
        values.setdefault("rope_type", "rope")
        return MLATransformerConfig(**values), notes
    plain = {field.name for field in fields(TransformerConfig)}
    return TransformerConfig(**{name: value for name, value in values.items() if name in plain}), notes


def _refuse(parallel: object, values: dict[str, object], weights_only: bool) -> None:
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel and not weights_only:
        raise ValueError(
            f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size} needs --sequence-parallel: "
            "without it megatron-core "
            f"doubles the gradients of head norms and cannot train MoE layers"
        )
    if values.get("layernorm_zero_centered_gamma"):
        raise ValueError("--apply-layernorm-1p is for models trained with it; none of the supported ones is")
    for name in ("hidden_dropout", "attention_dropout"):
        if values.get(name):
            raise ValueError(
                f"--{name.replace('_', '-')} {values[name]}: dropout would separate trained from served probabilities; pass 0"
            )


def _dispatcher(values: dict[str, object], notes: list[str]) -> None:
    chosen = values.get("moe_token_dispatcher_type", "allgather")
    if chosen != "alltoall":
        if values.get("num_moe_experts") and "moe_token_dispatcher_type" in values:
            why = "flex needs DeepEP and TransformerEngine" if chosen == "flex" else "its sums differ with the batch's padding"
            notes.append(f"moe_token_dispatcher_type alltoall instead of {chosen}: {why}")
        values["moe_token_dispatcher_type"] = "alltoall"
    # With all-to-all megatron-core refuses the flag that a recipe for flex carries.
    if values.pop("moe_enable_deepep", False):
        notes.append("moe_enable_deepep off: experts are reached by all-to-all")


def _recompute(values: dict[str, object], notes: list[str]) -> None:
    if values.get("recompute_granularity") != "selective":
        return
    kept = []
    for module in values.get("recompute_modules") or ["core_attn"]:
        if module in _NOTHING_TO_RECOMPUTE:
            notes.append(f"recompute_modules: {module} is left out, {_NOTHING_TO_RECOMPUTE[module]}")
        else:
            kept.append(module)
    values["recompute_modules"] = kept


def _parallel_values(parallel: object, *, mtp: bool) -> dict[str, object]:
    tp, vpp = parallel.tensor_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    values = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": vpp,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size or tp,
        "sequence_parallel": bool(parallel.sequence_parallel and tp > 1),
        "num_layers_in_first_pipeline_stage": parallel.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": parallel.decoder_last_pipeline_num_layers,
    }
    if parallel.pipeline_model_parallel_layout:
        values["pipeline_model_parallel_layout"] = _with_mtp(parallel.pipeline_model_parallel_layout, mtp)
    # With interleaving, batched point-to-point gave a wrong loss on gloo (6.4027 against 6.4511), overlapped is exact.
    values.update(overlap_p2p_comm=vpp is not None, batch_p2p_comm=vpp is None)
    return values


def _with_mtp(layout: str, mtp: bool) -> str:
    """The layout string with the multi-token-prediction layer (m) where it belongs: just before the loss (L)."""
    if not mtp:
        return layout
    if "m" not in layout:
        return layout.replace("L", "mL")
    if "mL" not in layout:
        raise ValueError(
            f"--pipeline-model-parallel-layout {layout}: the multi-token-prediction layer (m) shares the output layer's stage; "
            "write mL, or leave m out and it is added"
        )
    return layout
