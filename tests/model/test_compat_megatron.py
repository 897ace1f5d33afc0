"""Each correction of megatron-core is needed by the installed version, and does its work. A failure of a `still` test: delete
that guard."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from slime.compat.megatron import APPLIED, guards, prepare, version

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="describes the published package on a machine without CUDA")

_HERE = pathlib.Path(__file__).parent


def _run(*flags: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, str(_HERE / "published_megatron.py"), *flags], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


@pytest.fixture(scope="module")
def published() -> dict[str, str]:
    return _run()


@pytest.fixture(scope="module")
def guarded() -> dict[str, str]:
    return _run("--guarded")


def test_megatron_core_still_needs_the_host_build() -> None:
    code = (
        "import torch\nfrom megatron.core.transformer.moe.router import TopKRouter\nimport "
        "megatron.core.optimizer.clip_grads as c\n"
    )
    code += "p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)\nc.clip_grad_by_total_norm_fp32([p], 1.0, 2.0)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and ("torch.cuda" in done.stderr or "CUDA" in done.stderr or "AssertionError" in done.stderr)


def test_router_gating_still_needs_te_general_gemm(published: dict, guarded: dict) -> None:
    assert (published["router_gating"], guarded["router_gating"]) == ("NameError", "works")


def test_split_sizes_still_stay_tensors_on_the_cpu(published: dict, guarded: dict) -> None:
    assert (published["split_sizes"], guarded["split_sizes"]) == ("stays a tensor", "works")


def test_rng_tracker_still_restores_a_cuda_generator(published: dict, guarded: dict) -> None:
    assert (published["rng_restore"], guarded["rng_restore"]) == ("no effect", "works")


def test_rng_tracker_still_warns(published: dict) -> None:
    assert published["rng_noise"] == "warns"


def test_gloo_still_cannot_gather_unequal_shares() -> None:
    def share(rank: int) -> tuple[str, torch.Tensor, torch.Tensor]:
        from megatron.core.tensor_parallel import mappings

        own = torch.full((1 + 2 * rank, 2), float(rank + 1))
        try:
            dist.all_gather([torch.empty(1, 2), torch.empty(3, 2)], own)
            published = "works"
        except RuntimeError as error:
            published = str(error)
        whole = mappings._gather_along_first_dim(own, dist.group.WORLD, [1, 3])
        return published, whole, mappings._reduce_scatter_along_first_dim(whole * (rank + 1), dist.group.WORLD, [1, 3])

    prepare()
    for rank, (published, whole, summed) in enumerate(run_ranks(2, share)):
        assert "invalid tensor size" in published
        assert whole.tolist() == [[1, 1], [2, 2], [2, 2], [2, 2]]
        assert summed.tolist() == ([[3, 3]] if rank == 0 else [[6, 6]] * 3)


def test_adam_steps_still_shared_after_a_load(published: dict, guarded: dict) -> None:
    # 2 steps, a load, 1 step: 3. Four parameters share one counter in the published package, so it reads 2 + 4.
    assert published["adam_steps"] == "fresh cannot be saved, empty cannot be saved, step [6]"
    assert guarded["adam_steps"] == "fresh saves, empty saves, step [3]"


def test_transformer_engines_missing_version_still_cannot_be_compared(published: dict, guarded: dict) -> None:
    assert (published["te_version"], guarded["te_version"]) == ("TypeError", "missing")


def test_classes_of_an_offloading_optimizer_are_still_saved(published: dict) -> None:
    # That the guard takes them out is tests/training/test_optimizer_modes.py.
    assert published["classes_in_checkpoints"] == "saved"


def test_a_save_still_starts_a_manager_process(published: dict, guarded: dict) -> None:
    assert (published["results_queue"], guarded["results_queue"]) == ("1 processes", "0 processes")


def test_a_checkpoints_metadata_still_runs_what_it_names(published: dict, guarded: dict) -> None:
    assert published["closed_pickles"] == "the file was run"
    assert guarded["closed_pickles"] == "it names builtins.print, which no such file needs; nothing of it was run"


def test_every_guard_names_a_test_of_this_file() -> None:
    prepare()
    for guard in guards.GUARDS:
        assert guard.test in globals(), guard.name
        assert guard.applies(version(), on_host=True) and any(line.startswith(guard.name) for line in APPLIED)


def test_torch_itself_is_unchanged() -> None:
    """The host build speaks to megatron.core only."""
    prepare()
    assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
    assert torch.ones(1).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_an_untried_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from slime.compat import megatron

    monkeypatch.setattr(megatron, "APPLIED", [])
    monkeypatch.setattr(megatron, "version", lambda: (0, 15, 0))
    with pytest.raises(ValueError, match=r"megatron-core 0\.15\.0 is outside the tried range 0\.16\.1"):
        megatron.prepare()
