"""Nothing lost, nothing twice, whatever the lengths and the split."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.batch.layout import SequenceLayout

splits = st.tuples(
    st.lists(st.integers(1, 37), max_size=6), st.integers(1, 5), st.integers(1, 9), st.sampled_from(["contiguous", "zigzag"])
)


def all_ranks(lengths, cp_size, multiple, kind):
    return [getattr(SequenceLayout, kind)(lengths, cp_rank=rank, cp_size=cp_size, multiple=multiple) for rank in range(cp_size)]


@settings(max_examples=200, deadline=None)
@given(splits)
def test_every_row_is_on_exactly_one_rank_and_ranks_are_equally_long(split):
    lengths, cp_size, multiple, _ = split
    layouts = all_ranks(*split)
    held = torch.cat([layout.rows for layout in layouts])
    assert sorted(held[held >= 0].tolist()) == list(range(sum(lengths)))
    sizes = {len(layout.rows) for layout in layouts}
    assert len(sizes) == 1 and sizes.pop() % multiple == 0
    assert layouts[0].cu_seqlens[-1] == len(held), "boundaries cover the padded stream of all ranks"


@settings(max_examples=100, deadline=None)
@given(splits, st.integers(0, 2**31))
def test_what_ranks_take_apart_a_sum_makes_whole(split, seed):
    layouts = all_ranks(*split)
    stream = torch.randn(sum(split[0]), 3, generator=torch.Generator().manual_seed(seed))
    whole = sum(layout.spread(layout.take(stream, float("nan"))) for layout in layouts)
    assert torch.equal(whole, stream)


@settings(max_examples=100, deadline=None)
@given(splits)
def test_attention_sees_each_sample_inside_boundaries_of_its_own(split):
    """Undo the split as ring attention would, and find every sample between two neighbouring boundaries."""
    lengths, cp_size, _, kind = split
    layouts = all_ranks(*split)
    bounds = layouts[0].cu_seqlens.tolist()
    if kind == "contiguous" or cp_size == 1:
        padded = torch.cat([layout.rows for layout in layouts])
    else:
        pieces, offset = [], 0
        for low, high in zip(bounds[:-1], bounds[1:]):
            share = (high - low) // cp_size
            chunks = {}
            for rank, layout in enumerate(layouts):
                front, back = (
                    layout.rows[offset : offset + share].chunk(2) if share > 1 else (layout.rows[offset : offset + 1], None)
                )
                chunks[rank] = front
                chunks[2 * cp_size - 1 - rank] = back
            pieces += [chunks[number] for number in sorted(chunks) if chunks[number] is not None]
            offset += share
        padded = torch.cat(pieces)
    start = 0
    for low, high, length in zip(bounds[:-1], bounds[1:], lengths):
        assert padded[low:high][:length].tolist() == list(range(start, start + length))
        assert (padded[low:high][length:] == -1).all()
        start += length


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5))
def test_zigzag_gives_every_rank_equally_many_causal_pairs_of_samples_that_divide(chunks, cp_size):
    lengths = [2 * cp_size * chunk for chunk in chunks]
    position = torch.cat([torch.arange(1, length + 1) for length in lengths])
    pairs = {int(layout.take(position, 0).sum()) for layout in all_ranks(lengths, cp_size, 1, "zigzag")}
    assert pairs == {sum(length * (length + 1) // 2 for length in lengths) // cp_size}


@settings(max_examples=100, deadline=None)
@given(splits)
def test_contiguous_ranks_hold_the_stream_in_order_and_zigzag_chunks_stay_ascending(split):
    lengths, cp_size, multiple, _ = split
    held = torch.cat([layout.rows for layout in all_ranks(lengths, cp_size, multiple, "contiguous")])
    assert held[: sum(lengths)].tolist() == list(range(sum(lengths))) and (held[sum(lengths) :] == -1).all()
    assert len(held) - sum(lengths) < cp_size * multiple or not lengths, "no more padding than the multiple asks for"
    for layout in all_ranks(lengths, cp_size, multiple, "zigzag"):
        rows = layout.rows[layout.rows >= 0]
        assert (rows.diff() > 0).all(), "a rank never holds a later row before an earlier one"


def test_zigzag_halves_causal_work_evenly_by_hand():
    first = SequenceLayout.zigzag([8], cp_rank=0, cp_size=2)
    second = SequenceLayout.zigzag([8], cp_rank=1, cp_size=2)
    assert first.rows.tolist() == [0, 1, 6, 7] and second.rows.tolist() == [2, 3, 4, 5]
    assert first.cu_seqlens.tolist() == [0, 8]


def test_contiguous_pads_at_the_end_as_a_sequence_of_its_own():
    layout = SequenceLayout.contiguous([3, 2], cp_rank=1, cp_size=2, multiple=4)
    assert layout.rows.tolist() == [4, -1, -1, -1]
    assert layout.cu_seqlens.tolist() == [0, 3, 5, 8] and layout.max_seqlen == 3


def test_a_length_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"lengths \[3, 0\]"):
        SequenceLayout.contiguous([3, 0])
