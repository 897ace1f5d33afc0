"""What an update carries, read back with SGLang's own restrictions but without SGLang."""

from __future__ import annotations

import io
import pickle

import torch
from engine.engines import payload

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
    back = read(payload(named.items()))
    assert list(back) == list(named)
    for name, tensor in named.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert torch.equal(back[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_payload_does_not_follow_later_changes_of_the_weights():
    weight = torch.zeros(4)
    sent = payload([("w", weight)])
    weight += 1
    assert read(sent)["w"].tolist() == [0.0] * 4


def test_an_empty_bucket_has_a_byte_and_no_tensor():
    assert read(payload([])) == {}
    assert Restricted(io.BytesIO(payload([]))).load()["flattened_tensor"].tolist() == [0]
