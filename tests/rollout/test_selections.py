"""Selections of sparse attention in few bytes: what goes in comes out, row by row, whoever told it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.types.sample import Sample
from slime.types.selections import Piece, Selections, refusal


def drawn(first: int, end: int, topk: int, seed: int = 0) -> np.ndarray:
    """Per token topk different places up to its own, in no order; below topk anything."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(place + 1)[:topk] if place >= topk else np.full(topk, -1) for place in range(first, end)]
    return np.array(rows, np.int32).reshape(-1, topk)


def test_a_row_by_hand():
    """Token 4 reads 0, 1 and 4 of 0..4: gaps 0, 0 and 2. Token 400 reads 0, 1 and 399: the last gap 397 is 255 and 142 more."""
    piece = Piece.of({2: np.array([[4, 0, 1]])}, 4, 3)
    assert (piece.first, piece.end) == (4, 5) and piece.rows(2, 3, 6).tolist() == [[-1] * 3, [0, 1, 4], [-1] * 3]
    assert Piece.of({2: np.array([[399, 1, 0]])}, 400, 3).rows(2, 400, 401).tolist() == [[0, 1, 399]]
    head = json.loads(piece.to_bytes().partition(b"\n")[0])
    assert head["layers"] == [2] and head["sizes"] == [[piece.nbytes]]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 700), st.integers(0, 600), st.integers(0, 9))
def test_any_rows_come_back_sorted(topk, first, count, seed):
    places = {layer: drawn(first, first + count, topk, seed + layer) for layer in (0, 5)}
    piece = Piece.from_bytes(Piece.of(places, first, topk).to_bytes())
    assert piece.end == first + count
    for layer, rows in places.items():
        for low, high in ((first, first + count), (first + count // 3, first + count // 2 + 1)):
            found = piece.rows(layer, low, high)
            for place, row in zip(range(low, high), found, strict=True):
                told = max(topk, first) <= place < first + count
                assert row.tolist() == (sorted(rows[place - first].tolist()) if told else [-1] * topk)


def test_bytes_come_near_the_entropy():
    """2048 of 8192 places cost log2 C(8192, 2048) = 6640 bits, 830 bytes; uint16 would take 4096."""
    piece = Piece.of({0: drawn(8192, 8200, 2048)}, 8192, 2048)
    assert 830 * 8 < piece.nbytes < 1.2 * 830 * 8


@pytest.mark.parametrize("row", [[0, 0, 1], [0, 1, 6], [-1, 0, 1]])
def test_what_is_no_selection_is_named(row):
    with pytest.raises(ValueError, match="layer 7: the token at place 5 reads .* not 3 different places up to its own"):
        Piece.of({7: np.array([row])}, 5, 3)


def test_answers_of_two_engines_and_two_turns_make_one():
    """Prompt of 5, answer of 4: the prefill engine read 5 tokens, the decode engine 3 more. Then a second turn of 6 and 2."""
    first, later, turn = ({1: drawn(*span, 2, seed=3)} for span in ((0, 5), (5, 8), (8, 16)))
    sample = Sample(tokens=[0] * 5)
    told = {"prompt_indexer_topk": Piece.of(first, 0, 2).to_bytes(), "indexer_topk": Piece.of(later, 5, 2).to_bytes()}
    sample.append_response_tokens(tokens=[1] * 4, log_probs=[-1] * 4, meta_info=told)
    assert sample.rollout_indexer_topk.end == 8 and not sample.rollout_indexer_topk.has_gap
    sample.append_response_tokens(tokens=[2] * 6, trainable=False)
    told = {"indexer_topk": Piece.of(turn, 8, 2).to_bytes()}
    sample.append_response_tokens(tokens=[1] * 2, log_probs=[-1] * 2, meta_info=told)
    whole = np.concatenate([first[1], later[1], turn[1]])
    again = Sample.from_dict(sample.to_dict()).rollout_indexer_topk
    assert (again.rows(1, 2, 16, 2) == np.sort(whole[2:], -1)).all() and (again.rows(1, 0, 2, 2) == -1).all()
    assert again.nbytes == sum(piece.nbytes for piece in again.pieces) > 0


def test_a_piece_that_a_decode_engine_lost_is_a_gap_and_a_tail_is_none():
    pieces = [Piece.of({1: drawn(*span, 2)}, span[0], 2) for span in ((0, 5), (7, 9))]
    assert Selections(tuple(pieces)).has_gap and not Selections(tuple(pieces[:1])).has_gap
    assert not Selections(()).has_gap
    at_the_end = Piece.of({1: np.zeros((0, 2), np.int32)}, 9, 2)
    assert Selections((pieces[0], at_the_end)).has_gap, "it came back for the last token alone"


@pytest.mark.parametrize(
    "told, words",
    [
        (Piece.of({1: drawn(0, 6, 2)}, 0, 2).to_bytes(), "selections end at token 6, but the engines have read 8"),
        (b"nonsense", "8 bytes are no selections of an engine"),
        (refusal("layer 3: it is so"), "an engine cannot say what its attention read: layer 3: it is so"),
    ],
)
def test_another_answer_is_one_line_and_changes_nothing(told, words):
    sample = Sample(index=7, tokens=[0] * 5)
    with pytest.raises(ValueError, match=f"sample 7: {words}"):
        sample.append_response_tokens(tokens=[1] * 4, log_probs=[-1] * 4, meta_info={"indexer_topk": told})
    assert sample.response_length == 0 and sample.rollout_indexer_topk is None
    sample.rollout_indexer_topk = Selections((Piece.of({2: drawn(0, 5, 2)}, 0, 2),))
    other = Piece.of({1: drawn(0, 8, 2)}, 0, 2).to_bytes()
    with pytest.raises(ValueError, match=r"in layers \[1\] follow some of 2 in layers \[2\]: they are another model's"):
        sample.append_response_tokens(tokens=[1] * 4, log_probs=[-1] * 4, meta_info={"indexer_topk": other})
