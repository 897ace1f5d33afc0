"""The last chunk can stop before its output layer, so that a loss multiplies in tiles and whole logits never exist.

A pass of 65,536 tokens over 154,880 words would be 20 GB of bf16 logits, 634 MB of them on one of TP4 x CP8 ranks, and as much
again for their gradient. `slime.ops.vocab_logprob.linear_log_prob` multiplies, reduces and forgets one tile at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slime.compat.megatron import prepare

prepare()

from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region  # noqa: E402


@dataclass(frozen=True)
class HeadInput:
    """Both factors of a packed stream's logits, as slime.ops.vocab_logprob.linear_log_prob takes them."""

    hidden: Tensor
    """[t, h], after the final norm, every row of the stream; backward sums the shares of the tensor-parallel ranks."""
    weight: Tensor
    """[v / tp, h]: the output layer's, or the embedding's where they are tied."""

    @property
    def device(self) -> torch.device:
        """megatron-core's schedules ask it of whatever the last chunk returned."""
        return self.hidden.device

    def logits(self) -> Tensor:
        """All of them, [1, t, v / tp]."""
        return torch.nn.functional.linear(self.hidden, self.weight)[None]


class LastChunk(GPTModel):
    """The chunk with the output layer. Called with `head_input=True` it returns a HeadInput, else logits [1, t, v / tp]."""

    _stops_at_head = False

    def forward(self, *args: object, head_input: bool = False, **kwargs: object) -> Tensor | HeadInput:
        self._stops_at_head = head_input
        return super().forward(*args, **kwargs)

    def _postprocess(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor | HeadInput:
        """What megatron-core runs after the decoder. hidden_states [t / tp, 1, h]."""
        if self._stops_at_head:
            return self.head_input(hidden_states)
        return super()._postprocess(hidden_states, *args, **kwargs)

    def head_input(self, hidden_states: Tensor) -> HeadInput:
        """Of final-normed rows [t / tp, 1, h]: TP is always with sequence parallelism, so each rank has its slice of them."""
        if self.config.sequence_parallel:
            # Each rank's gradient is that through its own words: the reduce-scatter of the backward pass adds them up.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=self.tp_group
            )
        tied = self.share_embeddings_and_output_weights
        return HeadInput(
            hidden_states.squeeze(1), self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        )
