"""Which rows or columns of a tensor an engine's rank loads where it cuts it. By SGLang's rules, without SGLang.

SGLang's loader is given a tensor under its checkpoint name in its whole shape, on every rank, and copies the rank's share out
of it (`narrow` in `layers/linear.py`, `layers/parameter.py`, `layers/vocab_parallel_embedding.py`, `layers/moe/
fused_moe_triton/layer.py`, alike in 0.5.15 to 0.5.23). The rest of the tensor is not read, so it need not arrive: a bucket
has room for it, and nothing is sent there. Where the loader pads, or has another cut for some model, the whole tensor goes.
"""

from __future__ import annotations

from collections.abc import Sequence

from slime.model.hf_config import HfConfig
from slime.model.names import Entry
from slime.model.placement import pieces_per_rank
from slime.weights.serving import Receiver
from slime.weights.wire import Format

VOCAB_PADDING = 64
"""Rows of a vocabulary are padded to a multiple of it before they are cut."""
OUTPUT_LAYER = "output_layer.weight"
MLP_ALIGNMENT, EXPERT_ALIGNMENT = 32, 128
"""Rows of a share that SGLang pads to on some devices and backends; a share that is no multiple of it may begin elsewhere."""


class Shares:
    """The shares that the engines of a sync make of a model."""

    def __init__(self, receivers: Sequence[Receiver], hf: HfConfig, form: Format):
        self._receivers, self._hf, self._form = tuple(receivers), hf, form
        self._any = any(receiver.cuts or receiver.cuts_head for receiver in receivers)
        self._whole = (1,) * len(receivers)
        self._found: dict[tuple, tuple[int, ...]] = {}

    def of(self, entry: Entry) -> tuple[int, ...]:
        """By receiver, into how many equal shares its ranks cut the entry's tensors; 1: each loads all of it."""
        if not self._any or entry.split == "none":
            return self._whole
        module = entry.name.rpartition(".")[0].rpartition("layers.")[2].partition(".")[2]
        key = module, entry.expert is None, tuple(tensor.shape for tensor in entry.hf)
        if key not in self._found:
            self._found[key] = tuple(self._count(entry, receiver) for receiver in self._receivers)
        return self._found[key]

    def _count(self, entry: Entry, receiver: Receiver) -> int:
        shares = receiver.tp if entry.expert is None else receiver.tp // receiver.ep
        cuts = receiver.cuts or (receiver.cuts_head and entry.name == OUTPUT_LAYER)
        if not cuts or shares == 1 or (entry.expert is not None and not receiver.fixed_experts):
            return 1
        if entry.split == "vocab":
            # A rank without any real row would not hear of the tensor, and its padding would stay as it is.
            rows = entry.hf[0].shape[0]
            return shares if borders(entry, rows, shares)[-2] < rows else 1
        return shares if self._is_even(entry, receiver, shares) else 1

    def _is_even(self, entry: Entry, receiver: Receiver, shares: int) -> bool:
        """Shares are of one size, on borders of FP8 blocks, and of no size that SGLang pads."""
        axis = 1 if entry.split == "columns" else 0
        lengths = [tensor.shape[axis] for tensor in entry.hf]
        if pieces_per_rank(entry) > 1 or any(length % shares for length in lengths):
            return False
        block = self._form.block or 1
        if any(length // shares % block for length, tensor in zip(lengths, entry.hf, strict=True) if self._form.is_fp8(tensor)):
            return False
        if entry.expert is not None:
            return lengths[0] // shares % EXPERT_ALIGNMENT == 0
        if ".shared_experts." in entry.name and receiver.ep > 1:
            return False  # it may be one of the routed experts of every rank
        if ".mlp." in entry.name:
            return lengths[0] // shares % MLP_ALIGNMENT == 0
        heads = self._hf["num_attention_heads"]
        return heads % shares == 0 and (self._hf.get("num_key_value_heads") or heads) % shares == 0


def borders(entry: Entry, length: int, shares: int) -> list[int]:
    """Where the shares begin and end along the axis; behind its real rows a vocabulary has shares without any."""
    if entry.split != "vocab":
        return [length * number // shares for number in range(shares + 1)]
    rows = -(-length // VOCAB_PADDING) * VOCAB_PADDING
    if rows % shares:
        rows = -(-length // (VOCAB_PADDING * shares)) * VOCAB_PADDING * shares
    return [min(length, rows // shares * number) for number in range(shares + 1)]
