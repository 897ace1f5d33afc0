"""Selected keys that travel with the hidden states, so that a pipeline stage may begin on a layer that shares an earlier one's.

The int32 indices of the last computing layer are appended to the hidden states as further rows, bit for bit, in the hidden
states' own dtype: one message, megatron-core's own. A side channel would need its own order of sends and receives under every
schedule (on NCCL two ranks that first send to each other and then receive block for ever, which interleaved stages of two ranks
do); rows of the message arrive when the message does, in the forward alone, and recomputation finds them in the micro-batch's
stream. What it costs: the gradient that comes back has as many rows, zeros for the indices.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from slime.compat.megatron import prepare

prepare()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402

from slime.model.hf_config import HfConfig  # noqa: E402
from slime.model.stream import Stream, stream_of  # noqa: E402
from slime.parallel import Ranks  # noqa: E402

logger = logging.getLogger(__name__)


def append_indices(hidden: Tensor, indices: Tensor) -> Tensor:
    """hidden [rows, 1, h] and int32 indices [rows, topk] -> [rows + carried_rows, 1, h]; gradients pass to hidden alone."""
    bits = indices.contiguous().flatten()
    box = hidden.new_zeros(carried_rows(bits.numel(), hidden.shape[2], hidden.element_size()), *hidden.shape[1:])
    box.view(-1).view(torch.int32)[: bits.numel()] = bits
    return torch.cat([hidden, box])


def take_indices(received: Tensor, rows: int, topk: int) -> tuple[Tensor, Tensor]:
    """The inverse: (hidden [rows, 1, h], int32 indices [rows, topk]), both views of `received`."""
    carried = carried_rows(rows * topk, received.shape[2], received.element_size())
    if received.shape[0] != rows + carried:
        raise RuntimeError(
            f"a pipeline stage expects {rows} rows of hidden states and {carried} of indices, but received "
            f"{received.shape[0]}; do all ranks have the same --dsa-send-indices?"
        )
    bits = received.detach()[rows:].view(-1).view(torch.int32)[: rows * topk]
    return received[:rows], bits.view(rows, topk)


def carried_rows(count: int, width: int, item_bytes: int) -> int:
    """Rows of `width` items that hold `count` int32 numbers."""
    return -(-count * 4 // (width * item_bytes))


@dataclass(frozen=True)
class Relay:
    """What one model chunk hands on: `source` is the 1-based computing layer, None where nothing travels."""

    receives: int | None
    sends: int | None
    topk: int

    @staticmethod
    def for_chunk(hf: HfConfig, layers: range) -> Relay:
        """layers: 0-based, of this chunk. Indices cross a border in front of a shared layer, and no other."""
        return Relay(_source(hf, layers.start), _source(hf, layers.stop), hf["index_topk"])


def _source(hf: HfConfig, border: int) -> int | None:
    crosses = 0 < border < hf.num_layers and not hf.runs_indexer(border)
    return hf.index_source(border) + 1 if crosses else None


def relay_indices(decoder: torch.nn.Module, relay: Relay, ranks: Ranks) -> None:
    """Make a TransformerBlock take the indices off what it receives and append them to what it sends."""

    def stream(packed: PackedSeqParams, device: torch.device) -> Stream:
        t = int(packed.cu_seqlens_q[-1]) // ranks.cp_size
        return stream_of(packed, t, cp_group=ranks.cp_group if ranks.cp_size > 1 else None, contiguous=True, device=device)

    def before(block: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        # The block reads what arrived from this attribute, not from its arguments.
        received = block.input_tensor
        here = stream(kwargs["packed_seq_params"], received.device)
        hidden, here.indices[relay.receives] = take_indices(received, len(here.rows) // ranks.tp_size, relay.topk)
        block.input_tensor = hidden

    def after(block: torch.nn.Module, args: tuple, kwargs: dict, hidden: Tensor) -> Tensor:
        return append_indices(hidden, stream(kwargs["packed_seq_params"], hidden.device).indices[relay.sends])

    if relay.receives is not None:
        decoder.register_forward_pre_hook(before, with_kwargs=True)
    if relay.sends is not None:
        decoder.register_forward_hook(after, with_kwargs=True)


def describe(relay: Relay, ranks: Ranks, max_rows: int | None) -> str:
    """One line for the start-up log. max_rows: --max-tokens-per-gpu."""
    per_row = 4 * relay.topk
    if max_rows is None:
        amount = f"{per_row:,} bytes per row"
    else:
        amount = f"{per_row * max_rows // ranks.tp_size / 2**20:.1f} MiB per rank and micro-batch of {max_rows:,} rows"
    return (
        f"indices of layer {relay.sends} travel from pipeline stage {ranks.pp_rank} to the next: {amount}, as int32 forward "
        "and as zeros back"
    )
