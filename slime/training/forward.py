"""Run micro-batches through the (pipelined) model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from slime.batch.layout import SequenceLayout
from slime.compat.megatron import prepare
from slime.device import Device
from slime.model.head import HeadInput, LastChunk
from slime.model.local import unwrap
from slime.model.mtp import MtpGPTModel
from slime.model.stream import TOLD
from slime.ops.vocab_logprob import Kept, linear_log_prob, vocab_parallel_log_prob
from slime.parallel import Ranks
from slime.training.index_replay import ReplayedIndices
from slime.types.micro_batch import MicroBatch

prepare()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

Output = HeadInput | Tensor
"""Of the last chunk: what its output layer would multiply, a critic's values [t], or, from a model of the user's own, logits
[1, t, v/tp]."""
LossFunction = Callable[[MicroBatch, Output, HeadInput | None], tuple[Tensor, dict[str, Tensor]]]
"""(micro-batch, output, that of a multi-token-prediction layer in training or None) -> (scalar to differentiate, values to add
up over micro-batches)."""


@dataclass(frozen=True)
class Pipeline:
    """This rank's chunks and where it stands; every method is called by all ranks together, with equally many micro-batches."""

    chunks: Sequence[Module]
    ranks: Ranks
    device: Device

    @property
    def config(self) -> Any:
        """megatron-core's TransformerConfig, which the schedules read."""
        return self.chunks[0].config

    def train(self, micro_batches: Sequence[MicroBatch], loss: LossFunction) -> list[dict[str, Tensor]]:
        """Forward and backward of one step; gradients are summed into the buffers. -> the loss's values per micro-batch on the
        last stage, [] elsewhere."""
        return self._run(micro_batches, partial(_differentiate, loss), forward_only=False)

    def evaluate(self, micro_batches: Sequence[MicroBatch], read: Callable[[MicroBatch, Output], Any]) -> list[Any]:
        """Forward without gradient. -> read(micro-batch, output) per micro-batch on the last stage, [] elsewhere."""
        with torch.no_grad():
            return self._run(micro_batches, partial(_collect, read), forward_only=True)

    def _run(self, micro_batches: Sequence[MicroBatch], finish: Callable, *, forward_only: bool) -> list[Any]:
        def step(iterator, chunk):
            micro = next(iterator).to(self.device.torch_device)
            return run_chunk(chunk, micro, train=not forward_only), partial(finish, micro)

        # Every virtual stage walks through the same micro-batches by itself.
        iterators = [iter(micro_batches) for _ in self.chunks]
        single = len(self.chunks) == 1
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators[0] if single else iterators,
            model=self.chunks[0] if single else list(self.chunks),
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].tokens.shape[1],  # shapes are exchanged per micro-batch (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )


def run_chunk(chunk: Module, micro: MicroBatch, *, train: bool = False) -> Output | tuple[Output, HeadInput]:
    """One model chunk on one packed stream -> Output on the last stage, hidden states elsewhere.

    train: a chunk with a multi-token-prediction layer gives (output, the layer's HeadInput).
    """
    bounds, longest = micro.layout.cu_seqlens, micro.layout.max_seqlen
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    if micro.selections is not None:
        setattr(packed, TOLD, ReplayedIndices(micro.selections, micro.layout.lengths))
    model, wanted = unwrap(chunk), {}
    if isinstance(model, LastChunk):
        wanted["head_input"] = True
    if isinstance(model, MtpGPTModel) and train:
        wanted["labels"] = micro.targets[None]
    return chunk(
        input_ids=micro.tokens, position_ids=micro.position_ids, attention_mask=None, packed_seq_params=packed, **wanted
    )


def _differentiate(
    loss: LossFunction, micro: MicroBatch, output: Output | tuple[Output, HeadInput]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    trunk, draft = output if isinstance(output, tuple) else (output, None)
    value, report = loss(micro, trunk, draft)
    # megatron-core divides by nothing when the model config says calculate_per_token_loss; the token count is only its
    # bookkeeping.
    return value, torch.zeros((), dtype=torch.int, device=value.device), report


def _collect(read: Callable, micro: MicroBatch, output: Output, non_loss_data: bool) -> Any:
    assert non_loss_data, "evaluation passes collect values, not losses"
    return read(micro, output)


def response_log_probs(
    micro: MicroBatch, output: Output, ranks: Ranks, *, vocabulary: range, temperature: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every response token among the words that sampling left it, whole on every rank of the
    context-parallel group.

    -> (log_probs [r], entropy [r]) fp32, differentiable; each rank's gradient is that of its own rows. vocabulary: global token
    ids of this rank's words, padding excluded (slime.model.build.own_vocabulary). chunk_size: rows of logits at once.
    """
    kept = None
    if micro.kept_limited is not None:
        kept = Kept(micro.kept_limited, micro.kept_rows, micro.kept_words)
    how = {"temperature": temperature, "chunk_size": chunk_size, "with_entropy": True, "kept": kept}
    log_probs, entropy = _log_probs(output, micro.targets, ranks, vocabulary, **how)
    both = torch.stack([log_probs, entropy], dim=1)
    whole = _Whole.apply(both, micro.layout, ranks.cp_group if ranks.cp_size > 1 else None)[micro.response_rows]
    return whole[:, 0], whole[:, 1]


def response_values(micro: MicroBatch, output: Tensor, ranks: Ranks) -> Tensor:
    """A critic's value before every response token [r] fp32, whole on every rank of the context-parallel group."""
    return _Whole.apply(output, micro.layout, ranks.cp_group if ranks.cp_size > 1 else None)[micro.response_rows]


def draft_log_probs(micro: MicroBatch, draft: HeadInput, ranks: Ranks, *, vocabulary: range, chunk_size: int) -> Tensor:
    """Log-probability that the multi-token-prediction layer gives to every response token from two rows before it.

    -> [r] fp32, whole and differentiable as in response_log_probs; 0 for a token that no row guesses.
    """
    local, _ = _log_probs(draft, micro.draft_targets, ranks, vocabulary, chunk_size=chunk_size)
    whole = _Whole.apply(local, micro.layout, ranks.cp_group if ranks.cp_size > 1 else None)
    # The row before a sample's first is another sample's: clamped, then left out.
    return torch.where(micro.draft_rows >= 0, whole[micro.draft_rows.clamp(min=0)], 0.0)


def _log_probs(output: Output, targets: Tensor, ranks: Ranks, vocabulary: range, **how: Any) -> tuple[Tensor, Tensor | None]:
    """(log-probability of each target [t], entropy [t] or None) of this context-parallel rank's rows."""
    how |= {"group": ranks.tp_group if ranks.tp_size > 1 else None, "vocab_start": vocabulary.start}
    if isinstance(output, HeadInput):
        return linear_log_prob(output.hidden, output.weight, targets, num_words=len(vocabulary), **how)
    return vocab_parallel_log_prob(_own_columns(output.squeeze(0), len(vocabulary)), targets, **how)


def _own_columns(rows: Tensor, count: int) -> Tensor:
    """Without the columns that pad the vocabulary: their logit is 0, and would take part in every softmax."""
    if count == rows.shape[1]:
        return rows
    if count == 0:
        # This rank holds padding alone; one impossible word keeps it in the reductions.
        return rows[:, :1].masked_fill(torch.ones_like(rows[:, :1], dtype=torch.bool), float("-inf"))
    return rows[:, :count]


class _Whole(torch.autograd.Function):
    """[t, ...] of every context-parallel rank -> the whole stream [T, ...] on each of them.

    All ranks go on to compute the same loss from it, so a row's gradient is complete on its owner without another collective.
    """

    @staticmethod
    def forward(ctx, local: Tensor, layout: SequenceLayout, group: dist.ProcessGroup | None) -> Tensor:
        ctx.layout = layout
        stream = layout.spread(local)
        if group is not None:
            dist.all_reduce(stream, group=group)
        return stream

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.layout.take(gradient, 0.0), None, None
