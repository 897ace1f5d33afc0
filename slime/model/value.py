"""The critic's last chunk: one value per row of the stream in the place of the output layer."""

from __future__ import annotations

import torch
from torch import Tensor

from slime.compat.megatron import prepare
from slime.model.head import LastChunk

prepare()

from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region  # noqa: E402


class ValueHead(torch.nn.Module):
    """[..., h] -> [...] float32, without a bias. It begins at 0, so that a new critic expects nothing, whatever the width."""

    def __init__(self, hidden_size: int, *, dtype: torch.dtype, device: torch.device, sequence_parallel: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size, dtype=dtype, device=device))
        # Each tensor-parallel rank sees its slice of the rows alone: megatron-core then sums the gradients over them.
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden.float() @ self.weight.float().t()).squeeze(-1)


class ValueChunk(LastChunk):
    """Called with `head_input=True`, as every last chunk, it returns values [t] float32 of the whole stream of this rank."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        weight = next(self.decoder.parameters())
        del self.output_layer
        self.value_head = ValueHead(
            self.config.hidden_size,
            dtype=weight.dtype,
            device=weight.device,
            sequence_parallel=self.config.sequence_parallel,
        )

    def head_input(self, hidden_states: Tensor) -> Tensor:
        values = self.value_head(hidden_states)  # [t / tp, 1]
        if self.config.sequence_parallel:
            # All ranks compute the same loss from all rows, so a row's gradient is whole on the rank that owns it.
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False, group=self.tp_group)
        return values.squeeze(1)

    def sharded_state_dict(self, *args: object, **kwargs: object) -> dict:
        # megatron-core looks for the output layer of a chunk that post-processes.
        self.post_process = False
        try:
            return super().sharded_state_dict(*args, **kwargs)
        finally:
            self.post_process = True
