"""Which FlashMLA is taken: decided by what the kernel computes, tried here with kernels made of plain torch."""

import importlib.util
import math

import pytest
import torch

from slime_plugins.models.glm5.ops import flash_mla, torch_ops

CPU = torch.device("cpu")


def kernel_with(unit: float = 1.0, *, wrong: float = 0.0, empty_lse: float = math.inf):
    """A kernel of FlashMLA's shapes whose lse counts in `unit` nats and is inf for a row without a key."""

    def kernel(q, kv, indices, scale):
        assert q.shape[1] in (64, 128) and kv.shape[1] == indices.shape[1] == 1 and indices.shape[2] % 128 == 0
        out, lse = torch_ops.sparse_mla(q, kv[:, 0], indices[:, 0], scale=scale, v_dim=512)
        return out + wrong, torch.where(lse.isneginf(), empty_lse, lse / unit)

    return kernel


def missing():
    raise ImportError("No module named 'flash_mla'")


def crashing(q, kv, indices, scale):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device")


@pytest.mark.parametrize("unit,base", [(1.0, "natural"), (math.log(2), "log2")])
def test_the_base_of_the_logarithm_is_found_and_any_number_of_heads_and_keys_is_taken(unit, base):
    _, forward, finding = flash_mla.choose({"a": missing, "b": lambda: kernel_with(unit)}, CPU)
    assert finding == f"FlashMLA of b, {base} lse, agrees with the reference"
    for heads, keys in ((5, 70), (64, 128), (80, 1)):
        q, kv = torch.randn(4, heads, 576), torch.randn(90, 576)
        indices = torch.randint(-1, 90, (4, keys)).int()
        indices[2] = -1
        out, lse = forward(q, kv, indices, 0.1)
        want, want_lse = torch_ops.sparse_mla(q, kv, indices, scale=0.1, v_dim=512)
        assert out.is_contiguous()
        # Close and not equal: a product of 64 heads may be cut otherwise than one of 5.
        torch.testing.assert_close((out, lse), (want, want_lse))
        assert lse[2].isneginf().all()


@pytest.mark.parametrize("kernel,why", [
    (crashing, "RuntimeError: CUDA error: no kernel image"),
    (kernel_with(wrong=0.5), "ValueError: its output is off by"),
    (kernel_with(unit=3.0), "ValueError: its output is off by"),
    (kernel_with(empty_lse=0.0), "a row without a key is not 0"),
])  # fmt: skip
def test_a_kernel_that_fails_or_computes_something_else_is_refused_with_the_reason(kernel, why):
    found, forward, finding = flash_mla.choose({"a": missing, "b": lambda: kernel}, CPU)
    assert found is None and forward is None
    assert finding.startswith("no FlashMLA: a: ImportError: No module named 'flash_mla'; b: ") and why in finding


def test_the_next_package_is_taken_when_the_first_is_refused():
    _, forward, finding = flash_mla.choose({"a": lambda: crashing, "b": lambda: kernel_with()}, CPU)
    assert forward is not None and finding.startswith("FlashMLA of b")


def test_nothing_is_installed_here_and_the_finding_names_both_packages():
    if any(importlib.util.find_spec(name) for name in flash_mla.PACKAGES):
        pytest.skip("a package with FlashMLA is installed")
    _, forward, finding = flash_mla.find(CPU)
    assert forward is None and "flash_mla: ModuleNotFoundError" in finding and "sgl_kernel: ModuleNotFoundError" in finding
