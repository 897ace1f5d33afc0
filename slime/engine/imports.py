"""Modules that engines import only once they run, and what each is for: asked of a node before anything depends on it.

python3 -m slime.engine.imports        tries what the recipe's engines on GPUs need (the end of scripts/setup.sh)
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from slime.compat.sglang import with_system_libraries
from slime.config.engine_sizes import DEFAULT_TRANSFER

IMPORT_SECONDS = 120.0

EVERY_CUDA_ENGINE = {
    "sgl_kernel": "SGLang's kernels",
    "flashinfer": "sampling, and kernels compiled on first use",
    "torch_memory_saver": "an engine that gives its memory back while the trainer works",
}
TRANSFER_OPTION = "disaggregation_transfer_backend"
TRANSFER = {"mooncake": ("mooncake.engine", "KV from prefill to decode engines"),
            "mooncake_tcp": ("mooncake.engine", "KV from prefill to decode engines")}  # fmt: skip
"""disaggregation_transfer_backend -> module. SGLang names any failure of that import "not installed"."""
SPARSE_BACKENDS = ("nsa", "dsa")
RECIPE = EVERY_CUDA_ENGINE | {
    "deep_gemm": "FP8 matrix products and the indexer of sparse attention",
    "deep_ep": "experts' exchange between GPUs",
    "mooncake.engine": "KV from prefill to decode engines",
    "sglang_router": "the router in front of the engines",
    "ray": "the cluster",
    "megatron.core": "the trainer",
    "transformers": "tokenizers and configs",
}
"""Module -> what for, of the 744B recipe."""


def needed(settings: Iterable[Mapping[str, object]], *, disaggregated: bool, on_cuda: bool) -> dict[str, str]:
    """Module -> what for, of engines with these settings (one mapping per group, flags and overrides merged)."""
    modules: dict[str, str] = {}
    for group in settings:
        transfer = str(group.get(TRANSFER_OPTION, DEFAULT_TRANSFER))
        if disaggregated and transfer in TRANSFER:
            modules.update([TRANSFER[transfer]])
        if not on_cuda:
            continue
        modules |= EVERY_CUDA_ENGINE
        if str(group.get("attention_backend")) in SPARSE_BACKENDS or str(group.get("moe_runner_backend")) == "deep_gemm":
            modules["deep_gemm"] = RECIPE["deep_gemm"]
        if str(group.get("moe_a2a_backend")) == "deepep":
            modules["deep_ep"] = RECIPE["deep_ep"]
    return modules


def import_error(module: str) -> str:
    """What importing it after torch ends with, in a process of its own; "" where it works.

    Torch comes first in an engine too: it loads the CUDA libraries of its version, which the module may need and not bring.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", f"import torch, {module}"],
            capture_output=True,
            text=True,
            env=with_system_libraries(os.environ),
            timeout=IMPORT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"the import took more than {IMPORT_SECONDS:g} s"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return "" if done.returncode == 0 else (lines or [f"exit status {done.returncode}"])[-1]


def import_errors(modules: Iterable[str]) -> dict[str, str]:
    """Of those that cannot be imported, four processes at a time."""
    names = list(modules)
    with ThreadPoolExecutor(4) as pool:
        return {name: error for name, error in zip(names, pool.map(import_error, names), strict=True) if error}


def main() -> int:
    errors = import_errors(RECIPE)
    for module, purpose in RECIPE.items():
        print(f"{'FAILS' if module in errors else 'ok':5} {module}: {purpose}")
        if module in errors:
            print(f"      {errors[module]}")
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
