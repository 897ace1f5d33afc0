"""Tokens to their experts and back: megatron-core's all-to-all, with fewer and repeatable moves of rows.

megatron-core finds the rows by their values (the host waits), sorts blocks that lie in order already where one rank has all
experts, and adds a token's rows up in their dtype, on a GPU in whatever order they come.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime.compat.megatron import prepare

prepare()

from megatron.core.transformer.moe.moe_layer import MoELayer  # noqa: E402
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher  # noqa: E402

from slime.ops.rows import Order  # noqa: E402


def own_dispatchers(model: torch.nn.Module) -> None:
    """Every MoE layer whose all-to-all drops and pads nothing gets the Dispatcher below.

    After the layers are built: megatron-core hands process groups to its MoELayer itself, not to a class derived from it.
    """
    for layer in model.modules():
        if isinstance(layer, MoELayer) and type(layer.token_dispatcher) is MoEAlltoAllTokenDispatcher:
            config = layer.config
            if config.moe_expert_capacity_factor is None and not config.moe_router_padding_for_quantization:
                layer.token_dispatcher = Dispatcher.like(layer.token_dispatcher)


class Dispatcher(MoEAlltoAllTokenDispatcher):
    """Every token goes to exactly --moe-router-topk experts."""

    @classmethod
    def like(cls, published: MoEAlltoAllTokenDispatcher) -> Dispatcher:
        own = cls.__new__(cls)
        vars(own).update(vars(published))
        return own

    @property
    def alone(self) -> bool:
        """This rank has all experts and all tokens for them."""
        return self.ep_size == 1 and self.tp_size == 1

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states [..., h]; routing_map bool and probs [t, experts] -> rows [t topk, h] by expert, probs [t topk]."""
        self.hidden_shape, self.probs, self.routing_map = hidden_states.shape, probs, routing_map
        if self.alone:
            self.tokens_per_expert = routing_map.sum(dim=0)
        else:
            self.tokens_per_expert = self.preprocess(routing_map)
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        if not self.alone:
            self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", self.tokens_per_expert)
        self.order = Order.of(routing_map, self.config.moe_router_topk)
        rows = self.order.spread(hidden_states.view(-1, self.hidden_shape[-1]))
        return rows, probs.flatten().gather(0, self.order.chosen)

    def token_dispatch(self, rows: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        return (rows, probs) if self.alone else super().token_dispatch(rows, probs)

    def dispatch_postprocess(self, rows: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.alone:
            return super().dispatch_postprocess(rows, probs)
        if self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act(rows)
        return rows, self.tokens_per_expert, probs

    def combine_preprocess(self, rows: Tensor) -> Tensor:
        return rows if self.alone else super().combine_preprocess(rows)

    def token_combine(self, rows: Tensor, *args: object, **kwargs: object) -> Tensor:
        return rows if self.alone else super().token_combine(rows, *args, **kwargs)

    def combine_postprocess(self, rows: Tensor) -> Tensor:
        """rows [t topk, h], as dispatched -> hidden_states' shape."""
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward(rows)
            self.shared_experts.post_forward_comm()
        out = self.order.collect(rows).view(self.hidden_shape)
        return out if self.shared_experts is None else out + self.shared_experts.get_output()
