"""A rank's own part of the model and of its training state, counted where it was built."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from slime.model.local import local_tensors, unwrap
from slime.training.memory import gradient_tensors
from slime.training.optimizer import parts_of
from slime.training.start_page import RankShare

if TYPE_CHECKING:
    from slime.training.trainer import Trainer


def share_of(trainer: Trainer) -> RankShare:
    """Counted from the chunks, gradient buffers and optimizers that this rank has built."""
    ranks, models = trainer.ranks, [unwrap(chunk) for chunk in trainer.model]
    counts = dict.fromkeys(("parameters", "expert_parameters", "trained", "owned", "owned_experts", "weight_bytes"), 0)
    for local in local_tensors(trainer.model, ranks, experts=False):
        parameter = local.parameter
        if parameter is None or getattr(parameter, "shared", False):
            continue
        number, sharded = parameter.numel(), getattr(parameter, "tensor_model_parallel", False)
        replica = ranks.edp_rank if local.is_expert else dist.get_rank(ranks.dp_cp_group)
        own = replica == 0 and (sharded or ranks.tp_rank == 0)
        counts["parameters"] += number
        counts["expert_parameters"] += number * local.is_expert
        counts["trained"] += number * parameter.requires_grad
        counts["owned"] += number * own
        counts["owned_experts"] += number * (own and local.is_expert)
        counts["weight_bytes"] += parameter.nbytes
    optimizer = _optimizer_bytes(trainer)
    return RankShare(
        rank=ranks.rank,
        stage=ranks.pp_rank,
        grid=(
            f"TP {ranks.tp_size} x CP {ranks.cp_size} x PP {ranks.pp_size} x DP {ranks.dp_size}; "
            f"experts: expert-TP {ranks.etp_size} x EP {ranks.ep_size} x PP {ranks.pp_size} x DP {ranks.edp_size}"
        ),
        chunks=tuple(tuple(layer.layer_number for layer in model.decoder.layers) for model in models),
        has_embedding=any(model.pre_process for model in models),
        has_head=any(model.post_process for model in models),
        gradient_bytes=sum(tensor.nbytes for tensor in gradient_tensors(trainer).values()),
        optimizer_bytes=optimizer,
        optimizer_on_host=bool(trainer.optimizer is not None and trainer.optimizer.config.optimizer_cpu_offload),
        **counts,
    )


def _optimizer_bytes(trainer: Trainer) -> int:
    """Of this rank's shards: main parameters where the model's are not fp32, and one (SGD) or two (Adam) moments."""
    total = 0
    for part in parts_of(trainer.optimizer) if trainer.optimizer is not None else []:
        if part.optimizer is None:
            continue
        rules = part.config
        moments = [rules.exp_avg_dtype, rules.exp_avg_sq_dtype] if rules.optimizer == "adam" else [torch.float32]
        main = 0 if rules.params_dtype == torch.float32 else rules.main_params_dtype.itemsize
        per_number = main + sum(dtype.itemsize for dtype in moments)
        total += per_number * sum(p.numel() for group in part.optimizer.param_groups for p in group["params"])
    return total
