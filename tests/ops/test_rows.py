"""Rows of tokens to several targets and back, against loops."""

import torch

from slime.ops.rows import Order


def choice(t, targets, k):
    return torch.zeros(t, targets, dtype=torch.bool).scatter_(1, torch.rand(t, targets).topk(k).indices, True)


def test_rows_lie_by_target_then_by_token():
    chosen = torch.tensor([[0, 1, 1], [1, 0, 1], [0, 1, 1]]).bool()
    order = Order.of(chosen, 2)
    assert order.token.tolist() == [1, 0, 2, 0, 1, 2]  # of target 0: token 1; of target 1: 0 and 2; of target 2: all
    assert order.chosen.tolist() == [3, 1, 7, 2, 5, 8]
    assert order.places.tolist() == [[1, 3], [0, 4], [2, 5]]


def test_spread_and_collect_are_each_others_transpose_and_sum_in_the_rows_order():
    chosen = choice(17, 9, 4)
    order = Order.of(chosen, 4)
    tokens, rows = torch.randn(17, 6, requires_grad=True), torch.randn(68, 6, requires_grad=True)
    spread, collected = order.spread(tokens), order.collect(rows)
    of_token = [[j for j in range(68) if order.token[j] == i] for i in range(17)]
    for i, places in enumerate(of_token):
        assert len(places) == 4 and all(torch.equal(spread[j], tokens[i]) for j in places)
        total = torch.zeros(6)
        for j in places:
            total = total + rows[j]
        assert torch.equal(collected[i], total)
    (spread_back,) = torch.autograd.grad(spread, tokens, rows.detach())
    (collected_back,) = torch.autograd.grad(collected, rows, tokens.detach())
    assert torch.equal(spread_back, collected) and torch.equal(collected_back, spread)


def test_sums_of_bf16_rows_are_rounded_once():
    order = Order.of(torch.ones(1, 3, dtype=torch.bool), 3)
    rows = torch.tensor([[1.0], [2**-8], [2**-8]]).bfloat16()  # one at a time each half of the last place would be lost
    assert order.collect(rows).item() == 1.0 + 2**-7


def test_no_tokens_at_all():
    order = Order.of(torch.zeros(0, 5, dtype=torch.bool), 2)
    assert order.spread(torch.zeros(0, 3)).shape == (0, 3) and order.collect(torch.zeros(0, 3)).shape == (0, 3)
