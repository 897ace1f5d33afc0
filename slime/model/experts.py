"""Routed experts: this rank's experts stacked in two parameters, one grouped product each."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from slime.compat.megatron import prepare

prepare()

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory  # noqa: E402
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

    linear_fc1.weight [E, 2f, h] with the f gate rows first, linear_fc2.weight [E, h, f]; E = experts of this rank, f = their
    inner width / expert-TP. Under expert-TP the dispatcher gathers the group's tokens before, and after it reduce-scatters,
    which adds up the ranks' shares of a token's output.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: object = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if config.moe_apply_probs_on_input or config.add_bias_linear:
            raise ValueError("experts take neither --moe-apply-probs-on-input nor biases (pass --disable-bias-linear)")
        self.ep_group, self.etp_group, self.edp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        self.num_local_experts = num_local_experts
        inner, ranks = config.moe_ffn_hidden_size, dist.get_world_size(self.etp_group)
        if inner % ranks:
            raise ValueError(
                f"--expert-tensor-parallel-size {ranks} does not divide the experts' inner width {inner}; choose a divisor"
            )
        inner, hidden = inner // ranks, config.hidden_size
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
        """One [num_experts, out, in] tensor per matrix, cut along the experts and their inner width: loads under any EP and
        expert-TP."""
        axis = len(sharded_offsets)
        experts = (axis, dist.get_rank(self.ep_group), dist.get_world_size(self.ep_group))
        part, parts = dist.get_rank(self.etp_group), dist.get_world_size(self.etp_group)

        def piece(key: str, tensor: Tensor, replica_id: tuple, *cut: tuple) -> ShardedTensor:
            offsets = (*sharded_offsets, experts, *cut)
            return ShardedTensor.from_rank_offsets(key, tensor, *offsets, replica_id=replica_id, prepend_axis_num=axis)

        def gate_and_up(key: str, tensor: Tensor, replica_id: tuple, flattened_range: slice | None) -> list[ShardedTensor]:
            assert flattened_range is None, "optimizer state is saved in the shape of its parameters"
            gate, up = tensor.chunk(2, dim=1)
            places = ((gate, part), (up, parts + part))
            return [piece(key, half, replica_id, (axis + 1, place, 2 * parts)) for half, place in places]

        first, second, replica = (
            f"{prefix}linear_fc1.weight",
            f"{prefix}linear_fc2.weight",
            (0, 0, dist.get_rank(self.edp_group)),
        )
        if parts == 1:
            return {
                first: piece(first, self.linear_fc1.weight, replica),
                second: piece(second, self.linear_fc2.weight, replica),
            }
        return {
            first: ShardedTensorFactory(
                first, self.linear_fc1.weight, gate_and_up, lambda halves: torch.cat(halves, dim=1), replica
            ),
            second: piece(second, self.linear_fc2.weight, replica, (axis + 2, part, parts)),
        }
