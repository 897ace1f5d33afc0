"""Routed experts: this rank's experts stacked in two parameters, one grouped product each."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from slime.compat.megatron import prepare

prepare()

from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from slime.model.layers import new_parameter  # noqa: E402
from slime.ops.experts import grouped_swiglu  # noqa: E402


class StackedWeight(torch.nn.Module):
    """[experts of this rank, out, in]. The global name of row e is `<this>.weight{first + e}`."""

    def __init__(self, config: TransformerConfig, *shape: int) -> None:
        super().__init__()
        self.weight = new_parameter(config, *shape, sharded_tokens=False)
        # False always, not only with EP > 1: gradients of experts are summed over the expert-data-parallel group, which is
        # right for every layout. megatron-core takes the dense group when EP is 1, wrong under TP > 1, and its optimizer then
        # has another structure, which is why checkpoints could not change between EP 1 and EP > 1.
        self.weight.allreduce = False


class GroupedExperts(MegatronModule):
    """SwiGLU experts over tokens that the dispatcher has sorted by expert.

    linear_fc1.weight [E, 2f, h] with the f gate rows first, linear_fc2.weight [E, h, f]; E = experts of this rank.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: object = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if dist.get_world_size(pg_collection.expt_tp) > 1:
            raise ValueError(
                f"--expert-tensor-parallel-size {dist.get_world_size(pg_collection.expt_tp)}: experts are whole "
                "on their rank here; "
                f"pass --expert-tensor-parallel-size 1 and raise --expert-model-parallel-size instead"
            )
        if config.moe_apply_probs_on_input or config.add_bias_linear:
            raise ValueError("experts take neither --moe-apply-probs-on-input nor biases (pass --disable-bias-linear)")
        self.ep_group, self.edp_group = pg_collection.ep, pg_collection.expt_dp
        self.num_local_experts = num_local_experts
        inner, hidden = config.moe_ffn_hidden_size, config.hidden_size
        self.linear_fc1 = StackedWeight(config, num_local_experts, 2 * inner, hidden)
        self.linear_fc2 = StackedWeight(config, num_local_experts, hidden, inner)

    @property
    def first_expert(self) -> int:
        """Global number of this rank's first expert."""
        return dist.get_rank(self.ep_group) * self.num_local_experts

    def forward(self, hidden: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """hidden [n, h] sorted by expert, tokens_per_expert [E], probs [n] -> ([n, h], no bias)."""
        out = grouped_swiglu(hidden, tokens_per_expert, self.linear_fc1.weight, self.linear_fc2.weight, probs)
        return out, None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """One [num_experts, out, in] tensor per matrix, cut along the experts: loads under any EP."""
        before = len(sharded_offsets)
        place = (before, dist.get_rank(self.ep_group), dist.get_world_size(self.ep_group))
        sharded = {}
        for name, module in (("linear_fc1", self.linear_fc1), ("linear_fc2", self.linear_fc2)):
            key = f"{prefix}{name}.weight"
            sharded[key] = ShardedTensor.from_rank_offsets(
                key,
                module.weight,
                *sharded_offsets,
                place,
                replica_id=(0, 0, dist.get_rank(self.edp_group)),
                prepend_axis_num=before,
            )
        return sharded
