"""MLA's absorbed products against einsum in float64."""

import pytest
import torch

from slime_plugins.models.glm5.ops.absorb import AbsorbedQueries, ReleasedValues, absorbed_queries, released_values


@pytest.mark.parametrize(
    ("absorb", "release"),
    [(absorbed_queries, released_values), (AbsorbedQueries.apply, ReleasedValues.apply)],
    ids=["of this machine", "of a GPU"],
)
def test_values_and_gradients(absorb, release):
    torch.manual_seed(0)
    query, up = torch.randn(5, 3, 6 + 2).double(), torch.randn(3, 6 + 4, 7).double()
    out = torch.randn(5, 3, 7).double()
    leaves = [tensor.requires_grad_() for tensor in (query, up, out)]
    w_key, w_value = up.split([6, 4], dim=1)
    got = (absorb(query, w_key), release(out, w_value))
    keys = torch.cat([torch.einsum("thn,hnl->thl", query[..., :6], w_key), query[..., 6:]], dim=-1)
    want = (keys, torch.einsum("thl,hvl->thv", out, w_value))
    directions = [torch.randn_like(tensor) for tensor in want]
    for mine, right in zip(got, want, strict=True):
        torch.testing.assert_close(mine, right)
    grads, right_grads = (torch.autograd.grad(pair, leaves, directions, retain_graph=True) for pair in (got, want))
    for mine, right in zip(grads, right_grads, strict=True):
        torch.testing.assert_close(mine, right)
