"""Multi-token prediction (MTP): one more decoder layer that guesses the token after the next one.

    h'_i = eh_proj([enorm(embedding(token_{i+1})), hnorm(h_i)])      the embedding first
    logits_i = output_layer(final_layernorm(transformer_layer(h'_i)))   a guess at token_{i+2}

h is the trunk's hidden state *after* its final norm, rows keep the trunk's positions, and the layer has an indexer of its own:
so the released GLM-5.2 layer and SGLang's draft model (`deepseek_nextn.py`) have it. Embedding and output layer are the
trunk's.

**What learns.** The layer's own parameters, and nothing else: hidden states, embeddings and the output matrix enter without
gradient, as in slime. A draft model that serves the policy must follow it, not pull at it, so the policy's gradients are the
same to the bit with and without MTP.

The layer lives on the last pipeline stage, beside the output layer, under megatron-core's names (`mtp.layers.0.*`) and in
megatron-core's slot for it, which keeps a copy of the embedding there and in step with the first stage's. Its forward is ours:
megatron-core's rolls tokens within its own context-parallel layout, while here the packer says which token follows which row.
"""

from __future__ import annotations

import torch
import torch.utils.checkpoint
from torch import Tensor

from slime.compat.megatron import prepare

prepare()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.multi_token_prediction import (  # noqa: E402
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec, build_module  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset  # noqa: E402

from slime.model.head import HeadInput, LastChunk  # noqa: E402
from slime.model.layers import DuplicatedLinear, RMSNorm  # noqa: E402


class MtpLayer(MegatronModule):
    """Everything of the module docstring between the embedding and the output layer. [t / tp, 1, h] twice -> [t / tp, 1, h]."""

    def __init__(
        self,
        config: TransformerConfig,
        transformer_layer: ModuleSpec,
        layer_number: int = 1,
        vp_stage: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        """layer_number: 1-based among the MTP layers; the decoder layer inside counts on from the trunk's last one."""
        super().__init__(config=config)
        self.layer_number = layer_number
        self.enorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.hnorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        # Whole on every tensor-parallel rank: each multiplies its own slice of the sequence, and nothing is exchanged.
        self.eh_proj = DuplicatedLinear(2 * config.hidden_size, config.hidden_size, config=config)
        # A layer adds its stage's offset to the number that it is given.
        number = config.num_layers - get_transformer_layer_offset(config, vp_stage) + layer_number
        self.transformer_layer = build_module(transformer_layer, config=config, layer_number=number, vp_stage=vp_stage)
        self.final_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, embedded: Tensor, hidden: Tensor, packed: PackedSeqParams) -> Tensor:
        """embedded: of the token after each row. hidden: the trunk's, after its final norm."""
        if self.config.recompute_granularity == "full" and self.training:
            # The re-entrant kind would lose the gradient: its inputs need none.
            return torch.utils.checkpoint.checkpoint(self._compute, embedded, hidden, packed, use_reentrant=False)
        return self._compute(embedded, hidden, packed)

    def _compute(self, embedded: Tensor, hidden: Tensor, packed: PackedSeqParams) -> Tensor:
        both = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
        out, _ = self.transformer_layer(hidden_states=both, attention_mask=None, packed_seq_params=packed)
        return self.final_layernorm(out)


def mtp_block_spec(transformer_layer: ModuleSpec) -> ModuleSpec:
    """For GPTModel's `mtp_block_spec`: one MtpLayer around this decoder layer."""
    layer = ModuleSpec(MtpLayer, params={"transformer_layer": transformer_layer})
    return ModuleSpec(MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer]))


class MtpGPTModel(LastChunk):
    """The last chunk of a model with an MTP layer.

    Called with `labels` [1, t], the token after each row, it returns (the trunk's output, the layer's HeadInput): row i's
    guesses at tokens i + 1 and i + 2; the draft's weight is without gradient. Without labels (log-probability passes) the MTP
    layer does not run and the trunk's output comes alone.
    """

    def _postprocess(
        self,
        hidden_states: Tensor,
        labels: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: object,
    ) -> Tensor | HeadInput | tuple[Tensor | HeadInput, HeadInput]:
        """What megatron-core runs after the decoder."""
        head = self.head_input(hidden_states)
        trunk = head if self._stops_at_head else head.logits()
        if labels is None:
            return trunk
        embedded = self.embedding(input_ids=labels, position_ids=None)
        # The first stage's embedding has its gradient from the trunk. A copy on a later stage has none, yet gradient buffers
        # wait for one from every parameter.
        embedded = embedded.detach() if self.pre_process else _ZeroGradient.apply(embedded)
        drafted = self.mtp.layers[0](embedded, hidden_states.detach(), packed_seq_params)
        draft = self.head_input(drafted)
        return trunk, HeadInput(draft.hidden, draft.weight.detach())


class _ZeroGradient(torch.autograd.Function):
    """The same values; a gradient of zeros."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)
