"""Importance weights and rejection against numbers by hand, a second formula in numpy, and what infinity must not do."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from slime.algorithms import importance
from slime.training.importance_functions import importance_function, vanilla_tis_function, weight_moments

T = torch.tensor
LN2 = math.log(2.0)


def args(**changes) -> SimpleNamespace:
    values = dict(
        use_tis=True, tis_mode="clip", tis_level="token", tis_lower_bound=0.0, tis_upper_bound=2.0, use_rs=False,
        rs_level="token", rs_lower_bound=0.5, rs_upper_bound=2.0, rs_veto_threshold=None, tis_clip=2.0, tis_clip_low=0.0,
    )  # fmt: skip
    return SimpleNamespace(**values | changes)


def weighed(*, train, rollout, masks, **changes):
    lengths = [len(mask) for mask in masks]
    loss, kept, shown = importance_function(
        args(**changes),
        pg_loss=torch.ones(sum(lengths)),
        train_log_probs=[T(x) for x in train],
        rollout_log_probs=[T(x) for x in rollout],
        loss_masks=[T(x) for x in masks],
        total_lengths=lengths,
        response_lengths=lengths,
    )
    return loss, torch.cat(list(kept)), shown


# Ratios 4, 1/4, 1 of one sample (the last token is not trained), and 3/2, 1/100 of another.
TRAIN = [[2 * LN2, -2 * LN2, 0.0], [math.log(1.5), math.log(0.01)]]
ROLLOUT = [[0.0, 0.0, 0.0], [0.0, 0.0]]
MASKS = [[1.0, 1.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("changes", "weights", "kept"),
    [
        (dict(tis_mode="truncate"), [2, 0.25, 1, 1.5, 0.01], [1, 1, 0, 1, 1]),
        (dict(tis_mode="clip", tis_lower_bound=0.5), [2, 0.5, 1, 1.5, 0.5], [1, 1, 0, 1, 1]),
        (dict(tis_mode="icepop", tis_lower_bound=0.5), [0, 0, 1, 1.5, 0], [1, 1, 0, 1, 1]),
        (dict(tis_mode="mask", tis_lower_bound=0.5), [4, 0.25, 1, 1.5, 0.01], [0, 0, 0, 1, 0]),
        # Products over trained tokens: 1 and 0.015; geometric means: 1 and sqrt(0.015) = 0.1225.
        (dict(tis_level="sequence", tis_lower_bound=0.1), [1, 1, 1, 0.1, 0.1], [1, 1, 0, 1, 1]),
        (dict(tis_level="geometric", tis_lower_bound=0.1), [1, 1, 1, 0.015**0.5, 0.015**0.5], [1, 1, 0, 1, 1]),
        (dict(tis_mode="mask", tis_level="geometric", tis_lower_bound=0.5), [1, 1, 1, 0.015**0.5, 0.015**0.5], [1, 1, 0, 0, 0]),
        # Rejection apart from weights, and without them.
        (dict(tis_mode="truncate", use_rs=True), [2, 0.25, 1, 1.5, 0.01], [0, 0, 0, 1, 0]),
        (dict(use_tis=False, use_rs=True), [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]),
        (dict(use_tis=False, use_rs=True, tis_mode="mask", rs_level="sequence"), [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]),
        # A token below 0.02 takes its whole sample with it, one that is not trained takes nothing.
        (
            dict(use_rs=True, rs_lower_bound=0.0, rs_upper_bound=9.0, rs_veto_threshold=0.02),
            [2, 0.25, 1, 1.5, 0.01],
            [1, 1, 0, 0, 0],
        ),
    ],
)  # fmt: skip
def test_modes_levels_and_rejection_by_hand(changes, weights, kept):
    loss, mask, _ = weighed(train=TRAIN, rollout=ROLLOUT, masks=MASKS, **changes)
    torch.testing.assert_close(loss, T(weights, dtype=torch.float32))
    assert mask.tolist() == kept


def test_reported_shares_by_hand():
    _, _, shown = weighed(train=TRAIN, rollout=ROLLOUT, masks=MASKS, use_rs=True, rs_veto_threshold=0.02)
    torch.testing.assert_close(shown["tis"], T([4.0, 0.25, 1.0, 1.5, 0.01]))
    assert shown["tis_clipfrac"].tolist() == [1, 0, 0, 0, 0]
    assert shown["rs_dropped"].tolist() == [1, 1, 0, 1, 1] and shown["rs_vetoed"].tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("mode", ["truncate", "clip", "mask", "icepop"])
def test_weights_equal_a_second_formula_sample_by_sample(level, mode):
    rng = np.random.default_rng([len(level), len(mode)])
    lengths = [3, 7, 1, 5]
    train, rollout = ([-rng.random(n) * 2 for n in lengths] for _ in range(2))
    masks = [(rng.random(n) < 0.7).astype(float) for n in lengths]
    expected_weights, expected_masks = [], []
    for a, b, m in zip(train, rollout, masks, strict=True):
        gap = a - b
        if level == "sequence":
            gap = np.full(len(gap), (gap * m).sum())
        if level == "geometric":
            gap = np.full(len(gap), (gap * m).sum() / max(m.sum(), 1))
        ratio = np.exp(gap)
        outside = (ratio < 0.6) | (ratio > 1.4)
        expected_weights += {
            "truncate": np.minimum(ratio, 1.4), "clip": np.clip(ratio, 0.6, 1.4), "mask": ratio,
            "icepop": np.where(outside, 0, ratio),
        }[mode].tolist()  # fmt: skip
        expected_masks += (m * (~outside if mode == "mask" else 1)).tolist()
    loss, kept, _ = weighed(
        train=train, rollout=rollout, masks=masks, tis_level=level, tis_mode=mode, tis_lower_bound=0.6, tis_upper_bound=1.4
    )
    np.testing.assert_allclose(loss.numpy(), expected_weights, rtol=1e-5)
    assert kept.tolist() == expected_masks


def test_without_further_flags_it_is_the_truncation_of_tis_clip():
    pairs = dict(pg_loss=torch.arange(5.0), train_log_probs=[T(x) for x in TRAIN], rollout_log_probs=[T(x) for x in ROLLOUT])
    masks = [T(mask) for mask in MASKS]
    mine = importance_function(args(tis_lower_bound=0.5), loss_masks=masks, **pairs)
    known = vanilla_tis_function(args(tis_clip_low=0.5), loss_masks=masks, **pairs)
    torch.testing.assert_close(mine[0], known[0])
    assert mine[2].keys() == known[2].keys()
    for name in known[2]:
        torch.testing.assert_close(mine[2][name], known[2][name])


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("mode", ["truncate", "clip", "mask", "icepop"])
def test_a_token_to_which_the_engine_gave_no_probability_leaves_everything_finite(level, mode):
    train, rollout = [[-1.0, -2.0, -60.0], [-1.0]], [[-math.inf, -2.0, -1.0], [-1.0]]
    loss, kept, shown = weighed(
        train=train, rollout=rollout, masks=[[1.0, 1.0, 1.0], [1.0]], tis_level=level, tis_mode=mode, tis_lower_bound=0.5,
        use_rs=True, rs_level=level, rs_veto_threshold=1e-4,
    )  # fmt: skip
    assert all(value.isfinite().all() for value in (loss, kept, *shown.values()))
    assert kept.tolist() == [0, 0, 0, 1], "e^-59 is below the veto"


def test_the_mean_weight_counts_trained_tokens_or_samples():
    pair = dict(train_log_probs=T(TRAIN[0]), rollout_log_probs=T(ROLLOUT[0]), mask=T(MASKS[0]))
    assert weight_moments(args(), **pair).tolist() == pytest.approx([2, 2.25]), "min(4, 2) and 1/4; the masked one is left out"
    assert weight_moments(args(tis_level="sequence"), **pair).tolist() == pytest.approx([1, 1.0])
    assert weight_moments(args(), **pair | dict(mask=T([0.0, 0.0, 0.0]))).tolist() == [0, 0]
    loss, _, _ = importance_function(
        args(), pg_loss=torch.ones(1), train_log_probs=[T([LN2])], rollout_log_probs=[T([0.0])], loss_masks=[T([1.0])],
        mean_weight=4.0,
    )  # fmt: skip
    assert loss.tolist() == pytest.approx([0.5])


def test_a_misspelt_mode_or_level_is_named():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="not by 'cut'"):
        importance.weigh(one, mode="cut", low=0.5, high=2.0)
    with pytest.raises(ValueError, match="not of 'turn'"):
        importance.ratios(one, one, one, torch.zeros(1, dtype=torch.long), 1, level="turn")
