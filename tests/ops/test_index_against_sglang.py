"""FP8 scoring and selection against SGLang's own functions, taken from the text of the installed package.

Importing those modules costs 10 s and wants triton; the functions compared here are plain torch and stand by themselves.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from slime_plugins.models.glm5.ops import torch_ops

SCORES = "srt/layers/attention/dsa/utils.py"
TOPK = "srt/layers/attention/dsa/dsa_topk_backend.py"
REFERENCE = "test/kernels/paged_mqa.py"
KERNELS = (
    "kernels/jit/csrc/deepseek_v4/main_norm_rope.cuh",  # q
    "kernels/jit/csrc/deepseek_v32/indexer_k.cuh",
    "kernels/jit/csrc/dsa/fused_store_index_cache.cuh",
)


@pytest.fixture(scope="module")
def package() -> Path:
    found = importlib.util.find_spec("sglang")
    if found is None or Version(importlib.metadata.version("sglang")) < Version("0.5.23"):
        pytest.skip("sglang 0.5.23 or newer is not installed")
    return Path(found.submodule_search_locations[0])


def function(package: Path, file: str, name: str):
    """One module-level function of a file that needs nothing but torch."""
    tree = ast.parse((package / file).read_text())
    chosen = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    for argument in [*chosen[0].args.args, *chosen[0].args.kwonlyargs]:
        argument.annotation = None
    chosen[0].returns = None
    space = {"torch": torch}
    exec(compile(ast.Module(chosen, type_ignores=[]), file, "exec"), space)
    return space[name]


def nearest_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Bytes of the nearest e4m3 values, of two the even one, from the definition of the format: x [n] within +-448."""
    magnitudes = [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:119]
    table = torch.tensor(magnitudes, dtype=torch.float64)
    gap = (x.double().abs()[:, None] - table).abs()
    best = gap.argmin(dim=1)  # the first of two
    following = (best + 1).clamp_max(126)
    tie = gap.gather(1, best[:, None]) == gap.gather(1, following[:, None])
    best = torch.where(tie[:, 0] & (best % 2 == 1), following, best)
    return (best + 128 * x.signbit()).to(torch.uint8)


def test_codes_and_scales_are_those_of_the_engines_kernels():
    x = torch.cat([torch.randn(300, 128) * torch.logspace(-6, 4, 300)[:, None], torch.zeros(1, 128)]).bfloat16()
    codes, scale = torch_ops.quantize_vectors(x)
    largest = x.float().abs().amax(1).numpy()
    want = largest.clip(min=largest.dtype.type(1e-4)) / largest.dtype.type(448)
    reciprocal = torch.from_numpy(largest.dtype.type(1) / want)
    quotients = (x.float() * reciprocal[:, None]).clamp(-448, 448)
    assert torch.equal(scale, torch.from_numpy(want))
    assert torch.equal(codes.view(torch.uint8).flatten(), nearest_e4m3(quotients.flatten()))


@pytest.mark.parametrize("file", KERNELS)
def test_the_engines_kernels_still_quantise_by_this_formula(package, file):
    text = " ".join((package / file).read_text().split())
    assert "const auto scale = fmaxf(1e-4f, abs_max) / " in text and "const auto inv_scale = 1.0f / scale;" in text
    assert "[0] * inv_scale" in text or "x0 * inv_scale" in text


def packed(lengths: list[int], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (starts, ends) of `rows` random positions of packed samples, of which one row has no key."""
    position = torch.randint(0, sum(lengths), (rows,)).sort().values
    cuts = torch.tensor([0, *lengths]).cumsum(0)
    starts = cuts[torch.searchsorted(cuts, position, right=True) - 1]
    ends = position + 1
    ends[rows // 2] = starts[rows // 2]
    return starts.int(), ends.int()


def engine_selection(package: Path, scores, starts, ends, topk: int) -> list[list[int]]:
    local = function(package, TOPK, "_topk_unfused")(
        scores, ends - starts, topk, row_starts=starts, topk_op=torch.topk, topk_op_kwargs={"dim": -1}
    )
    return [[int(start) + j for j in row.tolist() if j >= 0] for start, row in zip(starts, local, strict=True)]


def test_random_vectors_select_what_the_engine_selects(package):
    q, k, gates = torch.randn(30, 32, 128).bfloat16(), torch.randn(640, 128).bfloat16(), torch.randn(30, 32)
    starts, ends = torch.zeros(30, dtype=torch.int32), torch.randint(100, 641, (30,)).int()
    q_codes, q_scale = torch_ops.quantize_vectors(q)
    k_codes, k_scale = torch_ops.quantize_vectors(k)
    # The reference of SGLang's own tests of its CUDA kernels: pages of 64 keys, one query per sequence.
    table = torch.arange(10).expand(30, 10)
    scores = function(package, REFERENCE, "ref_fp8_paged_mqa_logits")(
        q_codes[:, None], k_codes.view(10, 64, 128), k_scale.view(10, 64), gates * q_scale, ends, table, 640, 64
    )
    ours = torch_ops.index_topk_fp8(q, k, gates, starts, ends, topk=64)
    for row, own, theirs in zip(scores, ours.tolist(), engine_selection(package, scores, starts, ends, 64), strict=True):
        assert len(theirs) == 64
        apart = sorted(set(own) ^ set(theirs))
        # Float32 sums in another order: only keys at the threshold itself may change places.
        assert (row[apart] - row[theirs].min()).abs().sum() <= 1e-5 * row[own].abs().max()


def test_ties_and_packed_samples_select_what_the_engine_selects_and_the_lowest_positions(package):
    # Vectors of 0 and +-448 have scale 1, and k times a power of two that scale: every product, weight and sum is exact.
    q, k = torch.zeros(40, 8, 128), 448.0 * torch.randint(-1, 2, (500, 128))
    q.scatter_(2, torch.randint(0, 128, (40, 8, 2)), 448.0)
    k *= 2.0 ** torch.randint(-2, 3, (500, 1))
    gates = torch.randint(-2, 4, (40, 8)).float()
    starts, ends = packed([1, 120, 379], 40)
    q_codes, q_scale = torch_ops.quantize_vectors(q)
    k_codes, k_scale = torch_ops.quantize_vectors(k)
    assert (q_scale == 1).all() and (k_scale.log2() % 1 == 0).all()
    scores = function(package, SCORES, "_fp8_mqa_logits_torch")(q_codes, (k_codes, k_scale), gates * q_scale, starts, ends)
    ours = torch_ops.index_topk_fp8(q, k, gates, starts, ends, topk=50).tolist()
    theirs = engine_selection(package, scores, starts, ends, 50)
    ties = 0
    for row, own, engine, start, end in zip(scores, ours, theirs, starts.tolist(), ends.tolist(), strict=True):
        own = [j for j in own if j >= 0]
        assert len(own) == len(engine) == min(50, end - start)
        assert row[own].sort().values.equal(row[engine].sort().values)
        best = sorted(range(start, end), key=lambda j: (-float(row[j]), j))[: len(own)]
        assert own == sorted(best)
        ties += len(own) == 50 and int((row[start:end] == row[own].min()).sum()) > int((row[own] == row[own].min()).sum())
    assert ties > 20  # rows in which some of several equal scores are left out
