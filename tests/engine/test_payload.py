"""What an update carries, read back with SGLang's own restrictions but without SGLang."""

from __future__ import annotations

import io
import pickle

import pytest
import torch

from slime.device import get_device
from slime.engine.payload import ALIGNMENT, bucket_payload, flat, flatten_bucket
from slime.ops.fp8 import quantize_blockwise


class Restricted(pickle.Unpickler):
    """SGLang 0.5.23 admits exact names only; these are the ones that a bucket needs."""

    ALLOWED = {
        ("types", "SimpleNamespace"), ("torch", "Size"), ("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict"),
        ("torch.storage", "_load_from_bytes"), ("torch", "float8_e4m3fn"), ("torch", "float32"), ("torch", "bfloat16"),
    }  # fmt: skip

    def find_class(self, module, name):
        assert (module, name) in self.ALLOWED, f"{module}.{name} would be refused"
        return super().find_class(module, name)


def read(payload: bytes) -> dict[str, torch.Tensor]:
    bucket = Restricted(io.BytesIO(payload)).load()
    whole = bucket["flattened_tensor"]
    assert whole.dtype == torch.uint8
    return {meta.name: whole[meta.start_idx : meta.end_idx].view(meta.dtype).reshape(meta.shape) for meta in bucket["metadata"]}


def test_tensors_of_mixed_types_come_back_bit_for_bit():
    codes, scale = quantize_blockwise(torch.randn(3, 5))
    named = {
        "a": codes,
        "a_scale_inv": scale,
        "b": torch.randn(7).bfloat16(),
        "c": torch.tensor(2.5),
        "d": torch.randn(4, 6).t(),
    }
    back = read(flatten_bucket(named.items(), get_device()))
    assert list(back) == list(named)
    for name, tensor in named.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert torch.equal(back[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_every_tensor_starts_where_any_type_can_be_viewed():
    bucket = flat([("odd", torch.ones(3, dtype=torch.bfloat16)), ("float", torch.ones(5))])
    assert [meta.start % ALIGNMENT for meta in bucket.metas] == [0, 0]
    assert read(bucket_payload(bucket, get_device()))["float"].tolist() == [1.0] * 5


def test_a_payload_does_not_follow_later_changes_of_the_weights():
    weight = torch.zeros(4)
    payload = flatten_bucket([("w", weight)], get_device())
    weight += 1
    assert read(payload)["w"].tolist() == [0.0] * 4


def test_an_empty_bucket_is_refused():
    with pytest.raises(ValueError, match="at least one tensor"):
        flatten_bucket([], get_device())
