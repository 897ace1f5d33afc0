"""FlashMLA's sparse forward: the first installed package that carries one and gives the reference's result on this device.

* `flash_mla` (sgl-flash-mla 1.0, which SGLang 0.5.23 requires, or a build of deepseek-ai/FlashMLA): `flash_mla_sparse_fwd`. In
  sgl-flash-mla Hopper's kernels and rows of 576 are behind `use_legacy=True`; the lse is natural.
* `sgl_kernel` (sglang-kernel while it held FlashMLA, 0.4.5 of SGLang 0.5.17): `torch.ops.sgl_kernel.sparse_prefill_fwd`, whose
  lse counts in log2.

Names and bases of the logarithm change between versions, so neither is taken on trust: `try_out` runs a few rows.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from slime_plugins.models.glm5.ops import torch_ops

DK, DV = 576, 512

Kernel = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""q [t, h, 576] with h 64 or a multiple of 128, kv [T, 1, 576], indices [t, 1, k] with k a multiple of 128, scale
-> (out [t, h, 512], lse [t, h] in a base that try_out finds)."""
Forward = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""The signature and results of hopper_ops.sparse_mla_forward: any number of heads and keys, natural logarithm."""


def _of_flash_mla() -> Kernel:
    import flash_mla

    run = flash_mla.flash_mla_sparse_fwd
    options = {"use_legacy": True} if "use_legacy" in inspect.signature(run).parameters else {}

    def kernel(q: Tensor, kv: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, _, lse = run(q, kv, indices, scale, DV, **options)
        return out, lse

    return kernel


def _of_sglang_kernel() -> Kernel:
    import sgl_kernel.flash_mla  # noqa: F401  (registers the operator)

    run = torch.ops.sgl_kernel.sparse_prefill_fwd

    def kernel(q: Tensor, kv: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, _, lse = run(q, kv, indices, scale, DV, None, None)
        return out, lse

    return kernel


PACKAGES: Mapping[str, Callable[[], Kernel]] = {"flash_mla": _of_flash_mla, "sgl_kernel": _of_sglang_kernel}
"""Module name -> loader of its kernel, newest first."""


@functools.cache
def find(device: torch.device) -> tuple[Kernel | None, Forward | None, str]:
    """-> (the kernel, the forward made of it, what was found); (None, None, reasons) where no package serves."""
    return choose(PACKAGES, device)


def choose(packages: Mapping[str, Callable[[], Kernel]], device: torch.device) -> tuple[Kernel | None, Forward | None, str]:
    """`find` among `packages`: the first one that loads, runs and agrees with the reference."""
    refused = []
    for name, load in packages.items():
        try:
            kernel = load()
            per_nat = try_out(kernel, device)
        except (ImportError, AttributeError, OSError, RuntimeError, TypeError, ValueError) as error:
            refused.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
            continue
        base = "natural" if per_nat == 1.0 else "log2"
        return (
            kernel,
            functools.partial(_forward, kernel, per_nat),
            f"FlashMLA of {name}, {base} lse, agrees with the reference",
        )
    return None, None, "no FlashMLA: " + "; ".join(refused)


def try_out(kernel: Kernel, device: torch.device) -> float:
    """Nats per unit of the kernel's lse: 1, or ln 2 where it counts in log2. Raises ValueError where the kernel is wrong.

    Three rows of 64 heads: a full list, one with holes, one without a key.
    """
    random = torch.Generator().manual_seed(0)  # the caller's random state stays as it is
    q, kv = (torch.randn(shape, generator=random).bfloat16().to(device) for shape in ((3, 64, DK), (200, DK)))
    indices = torch.randint(0, 200, (3, 128), generator=random, dtype=torch.int32).to(device)
    indices[1, ::3], indices[2] = -1, -1
    scale = 256**-0.5
    want, want_lse = torch_ops.sparse_mla(q.float(), kv.float(), indices, scale=scale, v_dim=DV)
    found = {}
    for per_nat in (1.0, math.log(2.0)):
        out, lse = _forward(kernel, per_nat, q, kv, indices, scale)
        found[per_nat] = ((lse - want_lse)[:2].abs().max().item(), ((out - want).norm() / want.norm()).item())
        if found[per_nat][0] < 1e-2 and found[per_nat][1] < 1e-2 and lse[2].isneginf().all() and not out[2].any():
            return per_nat
    (lse_error, out_error) = found[1.0]
    raise ValueError(
        f"its output is off by {out_error:.1e} (relative), its lse by {lse_error:.1e}, or a row without a key is not 0"
    )


def _forward(kernel: Kernel, per_nat: float, q: Tensor, kv: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Heads and lists padded to what the kernel takes."""
    heads = q.shape[1]
    padded_heads = 64 if heads <= 64 else -(-heads // 128) * 128
    missing_keys = -indices.shape[1] % 128
    queries = q if padded_heads == heads else torch.nn.functional.pad(q, (0, 0, 0, padded_heads - heads))
    keys = torch.nn.functional.pad(indices, (0, missing_keys), value=-1) if missing_keys else indices
    out, lse = kernel(queries, kv[:, None], keys[:, None], scale)
    if padded_heads != heads:
        out, lse = out[:, :heads].contiguous(), lse[:, :heads].contiguous()
    if per_nat != 1.0:
        lse = lse * per_nat
    # A row without a valid key has out 0 and lse +inf there, -inf here.
    return out, lse.nan_to_num(nan=math.nan, posinf=-math.inf, neginf=-math.inf)
