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
from slime.model.local import unwrap
from slime.model.mtp import Draft, MtpGPTModel
from slime.ops.vocab_logprob import linear_log_prob, vocab_parallel_log_prob
from slime.parallel import Ranks
from slime.types.micro_batch import MicroBatch

prepare()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

LossFunction = Callable[[MicroBatch, Tensor, Draft | None], tuple[Tensor, dict[str, Tensor]]]
"""(micro-batch, logits [1, t, v/tp], what a multi-token-prediction layer in training made or None) -> (scalar to differentiate,
values to add up over micro-batches)."""


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

    def evaluate(self, micro_batches: Sequence[MicroBatch], read: Callable[[MicroBatch, Tensor], Any]) -> list[Any]:
        """Forward without gradient. -> read(micro-batch, logits) per micro-batch on the last stage, [] elsewhere."""
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


def run_chunk(chunk: Module, micro: MicroBatch, *, train: bool = False) -> Tensor | tuple[Tensor, Draft]:
    """One model chunk on one packed stream -> logits [1, t, v/tp] on the last stage, hidden states elsewhere.

    train: a chunk with a multi-token-prediction layer gives (logits, Draft).
    """
    bounds, longest = micro.layout.cu_seqlens, micro.layout.max_seqlen
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    following = {"labels": micro.targets[None]} if train and isinstance(unwrap(chunk), MtpGPTModel) else {}
    return chunk(
        input_ids=micro.tokens, position_ids=micro.position_ids, attention_mask=None, packed_seq_params=packed, **following
    )


def _differentiate(
    loss: LossFunction, micro: MicroBatch, output: Tensor | tuple[Tensor, Draft]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    logits, draft = output if isinstance(output, tuple) else (output, None)
    value, report = loss(micro, logits, draft)
    # megatron-core divides by nothing when the model config says calculate_per_token_loss; the token count is only its
    # bookkeeping.
    return value, torch.zeros((), dtype=torch.int, device=logits.device), report


def _collect(read: Callable, micro: MicroBatch, logits: Tensor, non_loss_data: bool) -> Any:
    assert non_loss_data, "evaluation passes collect values, not losses"
    return read(micro, logits)


def response_log_probs(
    micro: MicroBatch, logits: Tensor, ranks: Ranks, *, vocabulary: range, temperature: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every response token, whole on every rank of the context-parallel group.

    logits [1, t, v/tp] -> (log_probs [r], entropy [r]) fp32, differentiable; each rank's gradient is that of its own rows.
    vocabulary: global token ids of this rank's columns, padding excluded (slime.model.build.own_vocabulary).
    """
    rows = _own_columns(logits.squeeze(0), len(vocabulary))
    log_probs, entropy = vocab_parallel_log_prob(
        rows,
        micro.targets,
        group=ranks.tp_group if ranks.tp_size > 1 else None,
        vocab_start=vocabulary.start,
        temperature=temperature,
        chunk_size=chunk_size,
        with_entropy=True,
    )
    both = torch.stack([log_probs, entropy], dim=1)
    whole = _Whole.apply(both, micro.layout, ranks.cp_group if ranks.cp_size > 1 else None)[micro.response_rows]
    return whole[:, 0], whole[:, 1]


def draft_log_probs(micro: MicroBatch, draft: Draft, ranks: Ranks, *, vocabulary: range, chunk_size: int) -> Tensor:
    """Log-probability that the multi-token-prediction layer gives to every response token from two rows before it.

    -> [r] fp32, whole and differentiable as in response_log_probs; 0 for a token that no row guesses.
    """
    local, _ = linear_log_prob(
        draft.hidden,
        draft.weight[: len(vocabulary)],
        micro.draft_targets,
        group=ranks.tp_group if ranks.tp_size > 1 else None,
        vocab_start=vocabulary.start,
        chunk_size=chunk_size,
    )
    whole = _Whole.apply(local, micro.layout, ranks.cp_group if ranks.cp_size > 1 else None)
    # The row before a sample's first is another sample's: clamped, then left out.
    return torch.where(micro.draft_rows >= 0, whole[micro.draft_rows.clamp(min=0)], 0.0)


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
