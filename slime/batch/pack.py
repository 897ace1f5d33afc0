"""Pack samples of a RolloutBatch into one MicroBatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from slime.batch.layout import SequenceLayout
from slime.types import RolloutBatch
from slime.types.micro_batch import MicroBatch

Column = Mapping[int, "np.ndarray | Tensor"]
"""Per-token values by sample position, each [response_length]."""


def pack(
    batch: RolloutBatch,
    positions: Sequence[int],
    *,
    loss_weight: np.ndarray,
    denominator: float = 1.0,
    contiguous: bool = True,
    cp_rank: int = 0,
    cp_size: int = 1,
    multiple: int = 1,
    columns: Mapping[str, Column] | None = None,
) -> MicroBatch:
    """The micro-batch of the samples at `positions`, in that order, as context-parallel rank `cp_rank` sees it.

    loss_weight (float64 [n] over the batch) and denominator are the StepPlan's. contiguous: --allgather-cp, else zigzag.
    multiple: rows per rank are a multiple of it. columns: further per-token MicroBatch fields by name (old_log_probs,
    ref_log_probs, advantages); rollout and teacher log-probs come from the batch. No positions give a stream of padding
    without a response token.
    """
    positions = tuple(int(position) for position in positions)
    make = SequenceLayout.contiguous if contiguous else SequenceLayout.zigzag
    lengths = [len(batch.tokens[position]) for position in positions]
    layout = make(lengths, cp_rank=cp_rank, cp_size=cp_size, multiple=multiple)
    tokens = [batch.tokens[position] for position in positions]
    responses = [int(batch.response_lengths[position]) for position in positions]
    # The row of token j - 1 predicts token j, so a response of R tokens ends one row before its sample does.
    rows = [
        np.arange(start + length - response - 1, start + length - 1)
        for start, length, response in zip(layout.starts, lengths, responses, strict=True)
    ]
    # The row of token j - 2 guesses token j; no row of the sample guesses its second token.
    draft_rows = [np.where(row > start, row - 1, -1) for start, row in zip(layout.starts, rows, strict=True)]
    given: dict[str, Column] = dict(columns or {})
    for name in ("rollout_log_probs", "teacher_log_probs"):
        column = getattr(batch, name)
        if column is not None:
            given[name] = {position: column[position] for position in positions}
    return MicroBatch(
        positions=positions,
        layout=layout,
        tokens=_local(layout, tokens)[None],
        position_ids=_local(layout, [np.arange(length) for length in lengths])[None],
        targets=_local(layout, tokens, ahead=1),
        draft_targets=_local(layout, tokens, ahead=2),
        response_rows=_join(rows, np.int64),
        draft_rows=_join(draft_rows, np.int64),
        segments=_join([np.full(response, number) for number, response in enumerate(responses)], np.int64),
        loss_mask=_join([batch.loss_masks[position] for position in positions], np.float32),
        loss_weight=_join(
            [np.full(response, loss_weight[position]) for position, response in zip(positions, responses, strict=True)],
            np.float32,
        ),
        denominator=denominator,
        metadata=None if batch.metadata is None else tuple(batch.metadata[position] for position in positions),
        **_kept(batch, positions, layout),
        **{name: _join_column(name, column, positions, responses) for name, column in given.items()},
    )


def _kept(batch: RolloutBatch, positions: Sequence[int], layout: SequenceLayout) -> dict[str, Tensor]:
    """The MicroBatch fields of the words that local rows are limited to."""
    if batch.kept_words is None:
        return {}
    counts, ids = np.zeros(layout.length, np.int64), [np.zeros(0, np.int64)]
    for position, start, length in zip(positions, layout.starts, layout.lengths, strict=True):
        kept, response = batch.kept_words[position], int(batch.response_lengths[position])
        first = start + length - response - 1  # the row that predicts the first response token
        counts[first : first + response] = np.diff(kept.offsets)
        ids.append(kept.ids)
    begins, rows = np.cumsum(counts) - counts, layout.rows.numpy()
    own = np.where(rows >= 0, counts[rows], 0) if layout.length else np.zeros(len(rows), np.int64)
    local = np.repeat(np.arange(len(rows)), own)
    within = np.arange(len(local)) - np.repeat(np.cumsum(own) - own, own)
    words = np.concatenate(ids)[begins[rows[local]] + within] if len(local) else np.zeros(0, np.int64)
    fields = {"kept_limited": own > 0, "kept_rows": local, "kept_words": words.astype(np.int64)}
    return {name: torch.from_numpy(value) for name, value in fields.items()}


def _local(layout: SequenceLayout, pieces: Sequence[np.ndarray], *, ahead: int = 0) -> Tensor:
    """int64 [t]: each local row's value of its sample, or that `ahead` places on; 0 on padding and where a sample has ended.

    Every value is written once, straight to its row: a stream of all ranks in between would be a copy of the batch.
    """
    local = np.zeros(len(layout.rows), np.int64)
    rows = layout.rows.numpy()
    held = np.flatnonzero(rows >= 0)
    if layout.is_a_slice:
        first = int(rows[0]) if len(held) else 0
        for start, piece in zip(layout.starts, pieces, strict=True):
            low, high = max(start, first), min(start + len(piece) - ahead, first + len(held))
            if low < high:
                local[low - first : high - first] = piece[low - start + ahead : high - start + ahead]
        return torch.from_numpy(local)
    for start, piece in zip(layout.starts, pieces, strict=True):
        own = held[(rows[held] >= start) & (rows[held] < start + len(piece) - ahead)]
        local[own] = piece[rows[own] - start + ahead]
    return torch.from_numpy(local)


def _join(pieces: Sequence[np.ndarray], dtype: type) -> Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(piece, dtype) for piece in pieces]) if pieces else np.zeros(0, dtype))


def _join_column(name: str, column: Column, positions: Sequence[int], responses: Sequence[int]) -> Tensor:
    pieces = [torch.as_tensor(column[position], dtype=torch.float32) for position in positions]
    for position, response, piece in zip(positions, responses, pieces, strict=True):
        if piece.shape != (response,):
            raise ValueError(f"column {name} of sample position {position} has shape {tuple(piece.shape)}, not ({response},)")
    return torch.cat(pieces) if pieces else torch.zeros(0)
