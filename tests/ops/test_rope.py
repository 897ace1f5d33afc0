"""Rotary positions against multiplication of complex numbers."""

import pytest
import torch

from slime.ops.rope import rotate


def turned(x, angle, interleaved):
    """Pairs as complex numbers times e^(i angle), in float64."""
    pairs = angle.shape[1]
    parts = x.double().view(*x.shape[:2], pairs, 2) if interleaved else x.double().view(*x.shape[:2], 2, pairs).transpose(2, 3)
    turn = torch.polar(torch.ones_like(angle.double()), angle.double())[:, None]
    out = torch.view_as_real(torch.view_as_complex(parts.contiguous()) * turn)
    return (out if interleaved else out.transpose(2, 3)).reshape(x.shape)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("first", [0, 5, 2])
def test_pairs_turn_by_their_angle_and_the_rest_passes(interleaved, first):
    x, angle = torch.randn(4, 3, 11), torch.rand(4, 3) * 6
    want = x.double().clone()
    want[..., first : first + 6] = turned(x[..., first : first + 6], angle, interleaved)
    got = rotate(x, angle.cos(), angle.sin(), interleaved=interleaved, first=first)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(got[..., :first], x[..., :first]) and torch.equal(got[..., first + 6 :], x[..., first + 6 :])


def test_rotation_by_hand():
    """A quarter turn: (1, 0) becomes (0, 1) in each pair, wherever its two members lie; the rest passes."""
    x = torch.tensor([[[1.0, 0, 2, 0, 9]]])
    quarter = (torch.zeros(1, 2), torch.ones(1, 2))
    assert rotate(x, *quarter, interleaved=True).flatten().tolist() == [0, 1, 0, 2, 9]
    y = torch.tensor([[[1.0, 2, 0, 0, 9]]])
    assert rotate(y, *quarter, interleaved=False).flatten().tolist() == [0, 0, 1, 2, 9]
