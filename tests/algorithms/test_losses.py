"""Every formula against numbers worked out by hand or by another route."""

from __future__ import annotations

import math

import pytest
import torch
from test_importance import args

from slime.algorithms import advantages, importance, kl, policy_loss
from slime.algorithms.entropy import entropy
from slime.algorithms.sft import nll
from slime.training.importance_functions import icepop_function, importance_function, vanilla_tis_function

T = torch.tensor
LN2 = math.log(2.0)


@pytest.mark.parametrize(
    "kind, up, down",
    [
        ("k1", LN2, -LN2),
        ("k2", LN2**2 / 2, LN2**2 / 2),
        ("k3", 0.5 - 1 + LN2, 2 - 1 - LN2),  # e^-d - 1 + d at d = +-ln 2
        ("low_var_kl", 0.5 - 1 + LN2, 2 - 1 - LN2),
    ],
)
def test_kl_estimators_at_a_ratio_of_two_and_of_a_half(kind, up, down):
    value = kl.approx_kl(T([-1.0, -1.0]), T([-1.0 - LN2, -1.0 + LN2]), kind)
    torch.testing.assert_close(value, T([up, down]))


def test_the_mean_of_k1_and_k3_over_the_policy_is_the_true_divergence():
    p, q = torch.softmax(T([0.3, -1.0, 2.0, 0.1]), 0), torch.softmax(T([1.0, 0.0, 0.5, -2.0]), 0)
    true = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p * kl.approx_kl(p.log(), q.log(), kind)).sum(), true)


def test_unbiased_kl_of_another_policys_samples_is_the_policys_own():
    p, q, sampler = (torch.softmax(T(x), 0) for x in ([0.3, -1.0, 2.0], [1.0, 0.0, 0.5], [0.0, 0.0, 0.0]))
    estimate = (sampler * kl.approx_kl(p.log(), q.log(), "k3", importance_log_ratio=p.log() - sampler.log())).sum()
    torch.testing.assert_close(estimate, (p * (p / q).log()).sum())


def test_low_var_kl_is_bounded_and_a_wrong_kind_is_named():
    assert kl.approx_kl(T([-30.0]), T([-1.0]), "low_var_kl").item() == 10.0
    with pytest.raises(ValueError, match="'k4' is none of k1, k2"):
        kl.approx_kl(T([0.0]), T([0.0]), "k4")


def test_clipped_loss_by_hand_in_all_four_corners():
    log_ratio = T([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    loss, clipped = policy_loss.clipped_loss(log_ratio, T([2.0, 2.0, -2.0, -2.0]), eps_clip=0.2, eps_clip_high=0.28)
    # A > 0: -min(r, 1.28) A and free below; A < 0: free above, -max(r, 0.8) A below
    torch.testing.assert_close(loss, T([-2.56, -1.0, 3.0, 1.6]))
    assert clipped.tolist() == [1, 0, 0, 1]
    loss.sum().backward()
    torch.testing.assert_close(log_ratio.grad, T([0.0, -1.0, 3.0, 0.0]))


def test_dual_clip_bounds_the_loss_of_negative_advantages_only():
    log_ratio = T([10.0, 10.0, 2.0]).log()
    loss, _ = policy_loss.clipped_loss(log_ratio, T([-1.0, 1.0, -1.0]), eps_clip=0.2, eps_clip_high=0.2, eps_clip_c=3.0)
    torch.testing.assert_close(loss, T([3.0, -1.2, 2.0]))
    with pytest.raises(ValueError, match="--eps-clip-c 1.0"):
        policy_loss.clipped_loss(log_ratio, log_ratio, eps_clip=0.2, eps_clip_high=0.2, eps_clip_c=1.0)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    log_probs = T([-1.0, -2.0]).requires_grad_()
    loss, clipped = policy_loss.cispo_loss(
        log_probs - T([-3.0, -2.0]), log_probs, T([1.0, -2.0]), eps_clip=0.2, eps_clip_high=3.0
    )
    torch.testing.assert_close(loss, T([4.0, -4.0]))  # weight min(e^2, 4) = 4, and 1
    assert clipped.tolist() == [1, 0]
    loss.sum().backward()
    torch.testing.assert_close(log_probs.grad, T([-4.0, 2.0]))


def test_gspo_uses_one_ratio_per_sequence_and_ignores_masked_tokens():
    log_ratio = T([0.1, 0.3, 9.0, -0.2]).requires_grad_()
    value = policy_loss.sequence_log_ratio(log_ratio, T([1.0, 1.0, 0.0, 1.0]), T([0, 0, 0, 1]), 2)
    torch.testing.assert_close(value, T([0.2, 0.2, 0.2, -0.2]))
    value[:2].sum().backward()
    torch.testing.assert_close(log_ratio.grad, T([1.0, 1.0, 0.0, 0.0]))


def test_off_policy_sequences_with_negative_advantage_are_dropped():
    log_ratio, mask = T([-0.4, -0.2, -0.4, -0.2, 0.4, 0.2]), torch.ones(6)
    keep = policy_loss.off_policy_sequence_mask(
        log_ratio, T([-1.0, -1.0, 1.0, 1.0, -1.0, -1.0]), mask, T([0, 0, 1, 1, 2, 2]), 3, delta=0.25
    )
    assert keep.tolist() == [0, 0, 1, 1, 1, 1]


def test_truncated_importance_clamps_and_icepop_drops():
    train, rollout = T([0.0, 0.0, 0.0]), -T([0.25, 1.5, 4.0]).log()
    tis = importance.truncated(train, rollout, low=0.5, high=2.0)
    torch.testing.assert_close(tis.weight, T([0.5, 1.5, 2.0]))
    assert tis.changed.tolist() == [1, 0, 1]
    never = importance.icepop(T([-1.0, -3.0]), T([-math.inf, -3.0]), low=0.5, high=2.0)
    assert never.weight.tolist() == [0.0, 1.0] and never.changed.tolist() == [1.0, 0.0], "an infinite ratio is outside"
    pop = importance.icepop(train, rollout, low=0.5, high=2.0)
    torch.testing.assert_close(pop.weight, T([0.0, 1.5, 0.0]))
    torch.testing.assert_close(pop.ratio, T([0.25, 1.5, 4.0]))
    assert not tis.weight.requires_grad


def test_reinforce_plus_plus_by_hand():
    value = advantages.reinforce_plus_plus(2.0, T([1.0, 2.0, 5.0]), T([1.0, 1.0, 0.0]), kl_coef=0.1, gamma=0.5)
    # token rewards: -0.1, -0.2 + 2, 0; returns from the back: 0, 1.8, -0.1 + 0.9
    torch.testing.assert_close(value, T([0.8, 1.8, 0.0]))
    with pytest.raises(ValueError, match="trains none"):
        advantages.reinforce_plus_plus(1.0, T([0.0]), T([0.0]), kl_coef=0.0, gamma=1.0)


def test_generalized_advantages_by_hand():
    """Four trained tokens and one of an environment between them (its value and reward play no part); gamma 1/2, lambda 1/2."""
    rewards, values, mask = T([0.0, 1.0, 9.0, 0.0, 2.0]), T([1.0, 2.0, 7.0, 3.0, 4.0]), T([1.0, 1.0, 0.0, 1.0, 1.0])
    # deltas from the back: 2 - 4 = -2, 0 + 4/2 - 3 = -1, 1 + 3/2 - 2 = 0.5, 0 + 2/2 - 1 = 0, each plus a quarter of the next
    found, returns = advantages.generalized(rewards, values, mask, gamma=0.5, lambd=0.5)
    torch.testing.assert_close(found, T([0.03125, 0.125, 0.0, -1.5, -2.0]))
    torch.testing.assert_close(returns, T([1.03125, 2.125, 0.0, 1.5, 2.0]))


def test_generalized_advantages_at_their_ends():
    """lambda 1: the return less the value, whatever values say meanwhile; lambda 0: one step's surprise; no values: returns."""
    generator = torch.Generator().manual_seed(2)
    rewards, values = torch.randn(2, 40, generator=generator)
    mask = (torch.rand(40, generator=generator) < 0.7).float()
    steps = torch.nonzero(mask).flatten()
    discounted = T([sum(0.9 ** (k - t) * float(rewards[steps[k]]) for k in range(t, len(steps))) for t in range(len(steps))])
    found, returns = advantages.generalized(rewards, values, mask, gamma=0.9, lambd=1.0)
    torch.testing.assert_close(returns[steps], discounted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[steps], discounted - values[steps], rtol=1e-4, atol=1e-5)
    following = torch.cat([values[steps][1:], torch.zeros(1)])
    found, _ = advantages.generalized(rewards, values, mask, gamma=0.9, lambd=0.0)
    torch.testing.assert_close(found[steps], rewards[steps] + 0.9 * following - values[steps])
    whole, none = mask * 0 + 1, torch.zeros(40)
    found, _ = advantages.generalized(none, none, whole, gamma=0.9, lambd=0.9)
    assert not found.any()
    plus_plus = advantages.reinforce_plus_plus(2.0, rewards, whole, kl_coef=0.1, gamma=0.9)
    token = advantages.token_rewards(2.0, rewards, whole, kl_coef=0.1)
    torch.testing.assert_close(advantages.generalized(token, none, whole, gamma=0.9, lambd=1.0)[1], plus_plus)


def test_the_value_loss_by_hand():
    values, old, returns = T([1.0, 2.0, -1.0]).requires_grad_(), T([0.5, 0.5, 0.0]), T([2.0, 0.0, 1.0])
    loss, clipped = policy_loss.clipped_value_loss(values, old, returns, value_clip=0.2)
    # (1-2)^2 = 1 or (0.7-2)^2 = 1.69; (2-0)^2 = 4 or 0.7^2; (-1-1)^2 = 4 or (-0.2-1)^2
    torch.testing.assert_close(loss, T([1.69, 4.0, 4.0]))
    assert clipped.tolist() == [1, 0, 0]
    loss.sum().backward()
    torch.testing.assert_close(values.grad, T([0.0, 4.0, -4.0]))


def test_simple_advantages_by_hand():
    assert advantages.broadcast_reward(-0.5, 3).tolist() == [-0.5] * 3
    torch.testing.assert_close(advantages.reinforce_plus_plus_baseline(1.0, T([1.0, -2.0]), kl_coef=0.1), T([0.9, 1.2]))
    torch.testing.assert_close(advantages.distilled(T([1.0, 1.0]), T([-1.0, -2.0]), T([-2.0, -1.0]), coef=0.5), T([0.5, 1.5]))


def test_whitening_over_ranks_equals_whitening_the_whole_batch():
    generator = torch.Generator().manual_seed(0)
    values, mask = torch.randn(50, generator=generator) * 3 + 7, (torch.rand(50, generator=generator) > 0.3).float()
    parts = [advantages.masked_moments(values[a:b], mask[a:b]) for a, b in ((0, 13), (13, 13), (13, 50))]
    kept = values[mask > 0]
    expected = (values - kept.mean()) / kept.std()
    torch.testing.assert_close(advantages.whitened(values, sum(parts)), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no token"):
        advantages.whitened(values, torch.zeros(3, dtype=torch.float64))


def test_entropy_of_a_fair_coin_and_of_an_impossible_word():
    torch.testing.assert_close(entropy(T([[0.0, 0.0, -torch.inf]])), T([LN2]))


def test_sft_loss_is_the_negative_log_likelihood():
    assert nll(T([-0.5, -2.0])).tolist() == [0.5, 2.0]


def numeric_gradient(function, at: torch.Tensor, step: float = 1e-6) -> torch.Tensor:
    """Central differences of a sum, in float64."""
    slopes = []
    for index in range(len(at)):
        shift = torch.zeros_like(at)
        shift[index] = step
        slopes.append(float((function(at + shift).sum() - function(at - shift).sum()) / (2 * step)))
    return torch.tensor(slopes, dtype=at.dtype)


WEIGHTED = {
    "truncate": dict(tis_mode="truncate"),
    "clip, by sequence": dict(tis_level="sequence", tis_lower_bound=0.2),
    "mask, geometric": dict(tis_mode="mask", tis_level="geometric", tis_lower_bound=0.5),
    "icepop": dict(tis_mode="icepop", tis_lower_bound=0.2, tis_upper_bound=4.0),
    "rejection": dict(use_tis=False, use_rs=True, rs_lower_bound=0.2, rs_upper_bound=4.0),
}
"""Flags of importance weights beside those of test_importance.args; each drops or bounds some tokens and not all."""
NAMES = ["clipped", "dual clip", "sequence", "cispo", "value", "k2", "k3", "low_var_kl", "unbiased"]


@pytest.mark.parametrize("name", [*NAMES, "vanilla tis", "slime's icepop", *WEIGHTED])
def test_gradients_equal_finite_differences(name):
    """Each function is given the log-probs twice: to differentiate, and as what it must take for a constant."""
    generator = torch.Generator().manual_seed(5)
    log_ratio, advantages, other = (torch.randn(12, generator=generator, dtype=torch.float64) for _ in range(3))
    segments, mask = torch.arange(12) // 4, (torch.arange(12) % 5 > 0).double()

    def clipped(x, c=None):
        return policy_loss.clipped_loss(x, advantages, eps_clip=0.2, eps_clip_high=0.3, eps_clip_c=c)[0]

    def weighed(function, **flags):
        def loss(x, constant):
            found, masks, _ = function(
                args(**flags), pg_loss=clipped(x), train_log_probs=constant.split(4), rollout_log_probs=other.split(4),
                loss_masks=mask.split(4), total_lengths=[5] * 3, response_lengths=[4] * 3,
            )  # fmt: skip
            return found * torch.cat(list(masks))

        return loss

    functions = {
        "clipped": lambda x, _: clipped(x),
        "dual clip": lambda x, _: clipped(x, 1.5),
        "sequence": lambda x, _: clipped(policy_loss.sequence_log_ratio(x, mask, segments, 3)),
        "cispo": lambda x, constant: policy_loss.cispo_loss(constant - other, x, advantages, eps_clip=0.2, eps_clip_high=0.3)[
            0
        ],
        "k2": lambda x, _: _kl64(x, other, "k2"),
        "k3": lambda x, _: _kl64(x, other, "k3"),
        "low_var_kl": lambda x, _: _kl64(x, other, "low_var_kl"),
        "value": lambda x, _: policy_loss.clipped_value_loss(x, other, advantages, value_clip=0.5)[0],
        "unbiased": lambda x, _: _kl64(x, other, "k3", x - advantages),
        "vanilla tis": weighed(vanilla_tis_function, tis_clip=1.5),
        "slime's icepop": weighed(icepop_function, tis_clip_low=0.2, tis_clip=4.0),
        **{weights: weighed(importance_function, **flags) for weights, flags in WEIGHTED.items()},
    }
    x = log_ratio.clone().requires_grad_()
    functions[name](x, x).sum().backward()
    # KL is in float32, so its step is larger and the rest rougher.
    rounding, step = (2e-2, 1e-2) if name in ("k2", "k3", "low_var_kl", "unbiased") else (1e-6, 1e-6)
    numeric = numeric_gradient(lambda at: functions[name](at, log_ratio), log_ratio, step)
    torch.testing.assert_close(x.grad, numeric, rtol=rounding, atol=rounding)
    assert x.grad.any()


def _kl64(log_probs, reference, kind, ratio=None):
    return kl.approx_kl(log_probs, reference, kind, importance_log_ratio=ratio).double()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_infinite_ratio_leaves_loss_and_gradient_finite(sign):
    for far in (math.inf, -math.inf, 90.0, -90.0):
        log_ratio = T([0.1, far, 0.0]).requires_grad_()
        bounded = importance.bounded_log_ratio(log_ratio)
        mask, segments = torch.ones(3), torch.zeros(3, dtype=torch.long)
        sequence = policy_loss.sequence_log_ratio(bounded, mask, segments, 1)
        advantages = T([sign] * 3)
        losses = [
            policy_loss.clipped_loss(ratio, advantages, eps_clip=0.2, eps_clip_high=0.2)[0] for ratio in (bounded, sequence)
        ]
        losses.append(policy_loss.cispo_loss(bounded, T([-1.0, -2.0, -3.0]), advantages, eps_clip=0.2, eps_clip_high=3.0)[0])
        assert all(loss.isfinite().all() for loss in losses)
        sum(loss.sum() for loss in losses).backward()
        assert log_ratio.grad.isfinite().all(), (far, log_ratio.grad)


def test_k3_far_from_the_reference_is_large_and_its_gradient_a_number():
    for kind in ("k3", "low_var_kl"):
        log_probs = T([-200.0, -1.0]).requires_grad_()
        value = kl.approx_kl(log_probs, T([-1.0, -1.0]), kind)
        value.sum().backward()
        assert value.isfinite().all() and log_probs.grad.isfinite().all(), kind
