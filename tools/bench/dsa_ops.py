"""Times the DSA and general operators on one Hopper GPU, beside the peers that are installed and the machine's own limits.

    python3 tools/bench/dsa_ops.py [--out FILE.json] [--only NAME ...] [--repeats N]

Medians over random inputs, the L2 cache overwritten before each timed call; meanwhile the call is queued, so that the device's
time is measured and not Python's. The versions of the attention forward take turns. Prints a table with the floor of each row,
and the goals; --out also writes it as JSON, which dsa_table.py prints again. Peers: FlashMLA (flash_mla or sgl_kernel), the
cuDNN front-end's DSA backward (cudnn), DeepGEMM's FP8 scores (deep_gemm); an absent one is named with the reason.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import pathlib
import statistics
import sys
import traceback
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from slime.ops import experts, fp8  # noqa: E402
from slime.ops.vocab_logprob import linear_log_prob  # noqa: E402
from slime_plugins.models.glm5.ops import flash_mla, get_ops, hopper_ops, torch_ops  # noqa: E402
from tools.bench.dsa_table import BACKWARD, FORWARD, LOG_PROB, Row, Table  # noqa: E402

QUERIES, HEADS, KEYS, TOPK, SCALE = 2048, 64, 65536, 2048, 256**-0.5


class Bench:
    def __init__(self, repeats: int):
        self.table = Table()
        self.repeats = repeats
        self._l2 = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")  # 0.5 ms and more to fill

    def time(self, *calls: Callable[[], object]) -> list[float]:
        """Median milliseconds of each. They take turns: a warm card is slower, and should be so for all."""
        for call in calls * 2:
            call()
        times = [[] for _ in calls]
        for _ in range(self.repeats):
            for call, measured in zip(calls, times, strict=True):
                self._l2.zero_()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                end.record()
                torch.cuda.synchronize()
                measured.append(start.elapsed_time(end))
        return [statistics.median(measured) for measured in times]

    def add(self, operator: str, version: str, call: Callable[[], object], **figures) -> None:
        """Times `call`; figures: the other fields of Row."""
        self.add_by_turns(operator, {version: call}, **figures)

    def add_by_turns(self, operator: str, versions: dict[str, Callable[[], object]], **figures) -> None:
        """Times calls that do the same, a row each."""
        for version, milliseconds in zip(versions, self.time(*versions.values()), strict=True):
            self.table.rows.append(Row(operator, version, milliseconds, **figures))

    def absent(self, operator: str, version: str, why: str) -> None:
        self.table.rows.append(Row(operator, version, None, note=why))

    def peer(self, operator: str, version: str, make: Callable[[], Callable[[], object]], **figures) -> None:
        """An optional peer: whatever keeps it from running is reported, not raised."""
        try:
            call = make()
            call()
        except Exception as error:
            self.absent(operator, version, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
            return
        self.add(operator, version, call, **figures)


def extra_memory(call: Callable[[], object]) -> int:
    """Bytes at the peak of one call beyond what was allocated before it."""
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - base


def limits(bench: Bench) -> None:
    source = torch.randint(0, 1 << 30, (1 << 30,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    bench.add("limit", "device copy, 4.3 GB", lambda: target.copy_(source), bytes=2 * source.nbytes)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    bench.add("limit", "bf16 product 8192^3", lambda: a @ b, flops=2 * 8192**3)


def sparse_mla(bench: Bench) -> None:
    q = torch.randn(QUERIES, HEADS, 576, device="cuda").bfloat16()
    kv = torch.randn(KEYS, 576, device="cuda").bfloat16()
    grad = torch.randn(QUERIES, HEADS, 512, device="cuda").bfloat16()
    positions = torch.arange(KEYS - QUERIES, KEYS, device="cuda")
    indices = (torch.rand(QUERIES, TOPK, device="cuda") * (positions[:, None] + 1)).int()
    out, lse = hopper_ops.sparse_mla_forward(q, kv, indices, SCALE)

    pairs = QUERIES * HEADS * TOPK
    read = q.nbytes + kv.nbytes + indices.nbytes
    forward = {"flops": 2 * pairs * (576 + 512), "bytes": read + out.nbytes + lse.nbytes}
    chosen, (kernel, _, finding) = get_ops("cuda").sparse_mla, flash_mla.find(q.device)
    if kernel is None:
        bench.absent(FORWARD, "FlashMLA kernel", finding)
    for order, lists in (("", indices), (", ascending lists", indices.sort(dim=1).values)):
        versions = {
            "ours" + order: functools.partial(hopper_ops.sparse_mla_forward, q, kv, lists, SCALE),
            "as chosen" + order: functools.partial(chosen, q, kv, lists, scale=SCALE, v_dim=512),
        }
        if kernel is not None:
            versions["FlashMLA kernel" + order] = functools.partial(kernel, q, kv[:, None], lists[:, None], SCALE)
        bench.add_by_turns(FORWARD, versions, **forward)
    if kernel is not None:
        bench.table.row(FORWARD, "FlashMLA kernel").note = finding

    backward = {
        "flops": 2 * pairs * (576 + 512 + 576 + 576 + 512),
        "bytes": read + 2 * out.nbytes + lse.nbytes + q.nbytes + 2 * kv.nbytes,
    }

    def ours(store: int) -> Callable[[], object]:
        return lambda: hopper_ops.sparse_mla_backward(q, kv, indices, out, lse, grad, SCALE, store=store)

    bench.add(BACKWARD, "ours, staged (default)", ours(hopper_ops.STAGE), **backward)
    bench.add(BACKWARD, "ours, fp32 reductions", ours(hopper_ops.REDUCE), **backward)
    staging, hopper_ops.STAGING_BYTES = hopper_ops.STAGING_BYTES, hopper_ops.STAGING_BYTES // 4
    bench.add(BACKWARD, "ours, staged in 1.25 GB", ours(hopper_ops.STAGE), **backward)
    hopper_ops.STAGING_BYTES = staging
    with hopper_ops.deterministic():
        bench.add(BACKWARD, "ours, deterministic", ours(hopper_ops.STAGE), **backward)
    inputs = hopper_ops._prepare(q, kv, indices, out, lse, grad, SCALE)
    grad_q, grad_kv = torch.empty_like(q), torch.zeros(kv.shape, device="cuda")
    bench.add(
        BACKWARD, "ours, kernel without stores", lambda: hopper_ops._launch_backward(inputs, grad_q, grad_kv, hopper_ops.DROP),
        **backward, note="dKV computed and dropped",
    )  # fmt: skip

    def cudnn() -> Callable[[], object]:
        from cudnn.deepseek_sparse_attention import DSA  # the same name and arguments in 1.26 and 1.32

        sink = torch.full((HEADS,), -1e30, device="cuda")

        def run() -> dict:
            return DSA.sparse_attention_backward_wrapper(q, kv, out, grad, lse, sink, indices, softmax_scale=SCALE)

        ours_q, _ = hopper_ops.sparse_mla_backward(q, kv, indices, out, lse, grad, SCALE)
        apart = ((run()["dq"].float() - ours_q.float()).norm() / ours_q.float().norm()).item()
        if not apart < 1e-2:
            raise RuntimeError(f"its dq differs from ours by {apart:.1e} (relative)")
        return run

    bench.peer(BACKWARD, "cuDNN front-end", cudnn, **backward)


def deep_gemm_scores(deep_gemm: ModuleType) -> Callable[..., object]:
    """(q codes, (k codes, k scale), gates, starts, ends, keys) -> scores, by whichever name this version has."""
    if hasattr(deep_gemm, "fp8_mqa_logits"):  # sgl-deep-gemm 0.1 to 0.2.3
        return lambda q, k, gates, starts, ends, keys: deep_gemm.fp8_mqa_logits(q, k, gates, starts, ends, clean_logits=False)
    run = deep_gemm.fp8_fp4_mqa_logits  # the only one from 0.2.5 on
    options = {"clean_logits": False} if "clean_logits" in inspect.signature(run).parameters else {}
    return lambda q, k, gates, starts, ends, keys: run(q, k, gates, starts, ends, max_seqlen_k=keys, **options)


def indexer(bench: Bench) -> None:
    for keys in (KEYS, 1 << 20):
        index_over(bench, keys, with_peers=keys == KEYS)


def index_over(bench: Bench, keys: int, *, with_peers: bool) -> None:
    name = f"indexer, {keys} keys"
    q = torch.randn(QUERIES, 32, 128, device="cuda").bfloat16()
    gates = torch.randn(QUERIES, 32, device="cuda")
    k = torch.randn(keys, 128, device="cuda").bfloat16()
    q_codes, q_scale = torch_ops.quantize_vectors(q)
    k_codes, k_scale = torch_ops.quantize_vectors(k)
    folded = gates * q_scale
    starts = torch.zeros(QUERIES, dtype=torch.int32, device="cuda")
    ends = torch.arange(keys - QUERIES + 1, keys + 1, dtype=torch.int32, device="cuda")
    flops, picked = 2 * QUERIES * keys * 32 * 128, 4 * QUERIES * TOPK
    wide = {"flops": flops, "bytes": q.nbytes + k.nbytes + gates.nbytes + picked}
    codes = {"flops": flops, "bytes": q_codes.nbytes + k_codes.nbytes + k_scale.nbytes + gates.nbytes + picked, "fp8": True}

    def of_bf16() -> torch.Tensor:
        return hopper_ops.index_topk(q, k, gates, starts, ends, topk=TOPK)

    def of_codes() -> torch.Tensor:
        return hopper_ops._index_topk(q_codes, k_codes, folded, k_scale, starts, ends, TOPK)

    bench.add(name, "ours bf16", of_bf16, **wide, extra_bytes=extra_memory(of_bf16), note="scores and top-k")
    bench.add(name, "ours FP8", of_codes, **codes, extra_bytes=extra_memory(of_codes), note="scores and top-k of given codes")
    if not with_peers:
        return
    whole = "ours FP8 with quantising"
    bench.add(name, whole, lambda: hopper_ops.index_topk_fp8(q, k, gates, starts, ends, topk=TOPK), **wide | {"fp8": True})
    scores = torch.randn(QUERIES, keys, device="cuda")

    def deep_gemm() -> Callable[[], object]:
        import deep_gemm

        run = deep_gemm_scores(deep_gemm)
        return lambda: run(q_codes, (k_codes, k_scale), folded, starts, ends, keys)

    written = codes | {"bytes": codes["bytes"] - picked + scores.nbytes}
    bench.peer(name, "DeepGEMM scores", deep_gemm, **written, note="scores alone, all of them written")
    bench.add(name, "torch.topk", lambda: torch.topk(scores, TOPK), bytes=scores.nbytes + picked, note="top-k alone")


def quantise(bench: Bench) -> None:
    weight = torch.randn(2048 * 85, 6144, device="cuda").bfloat16()
    codes = torch.empty(weight.shape, dtype=fp8.FP8, device="cuda")
    scales = torch.empty(fp8.scale_shape(weight.shape), device="cuda")
    moved = weight.nbytes + codes.nbytes + scales.nbytes
    bench.add("block FP8, 2.1 GB", "ours", lambda: fp8.quantize_blockwise_into(weight, codes, scales), bytes=moved)


def grouped_experts(bench: Bench) -> None:
    tokens, hidden, width, number = 65536, 6144, 2048, 8
    x = torch.randn(tokens, hidden, device="cuda").bfloat16().requires_grad_()
    w1 = (torch.randn(number, 2 * width, hidden, device="cuda") / 78).bfloat16().requires_grad_()
    w2 = (torch.randn(number, hidden, width, device="cuda") / 45).bfloat16().requires_grad_()
    probs = torch.rand(tokens, device="cuda", requires_grad=True)
    grad = torch.randn(tokens, hidden, device="cuda").bfloat16()
    counts = torch.multinomial(torch.rand(number) + 0.5, tokens, replacement=True).bincount(minlength=number)
    flops = 2 * tokens * hidden * width * 3
    once = 2 * x.nbytes + w1.nbytes + w2.nbytes + probs.nbytes

    def both() -> None:
        torch.autograd.grad(experts.grouped_swiglu(x, counts, w1, w2, probs), (x, w1, w2, probs), grad)

    bench.add("experts", "ours, forward", lambda: experts.grouped_swiglu(x, counts, w1, w2, probs), flops=flops, bytes=once)
    bench.add("experts", "ours, forward + backward", both, flops=3 * flops, bytes=2 * once)


def log_prob(bench: Bench) -> None:
    rows, vocab, hidden = 16384, 38720, 6144
    x = torch.randn(rows, hidden, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocab, hidden, device="cuda") / 78).bfloat16().requires_grad_()
    targets, slopes = torch.randint(0, vocab, (rows,), device="cuda"), torch.randn(rows, device="cuda")

    def both() -> None:
        torch.autograd.grad((linear_log_prob(x, weight, targets)[0] * slopes).sum(), (x, weight))

    both()
    extra = extra_memory(both) - x.nbytes - weight.nbytes
    flops, once = 2 * rows * vocab * hidden, x.nbytes + weight.nbytes
    bench.add(LOG_PROB, "ours, forward", lambda: linear_log_prob(x, weight, targets), flops=flops, bytes=once)
    note = "three products counted, four made"
    bench.add(LOG_PROB, "ours, forward + backward", both, flops=3 * flops, bytes=2 * once, extra_bytes=extra, note=note)


def rope_and_norm(bench: Bench) -> None:
    from slime.model.layers import rms_norm
    from slime.ops.rope import rotate

    weight = torch.randn(6144, device="cuda").bfloat16().requires_grad_()
    x = torch.randn(8192, 6144, device="cuda").bfloat16().requires_grad_()
    queries = torch.randn(8192, 64, 256, device="cuda").bfloat16().requires_grad_()
    angle = torch.rand(8192, 32, device="cuda")
    cos, sin = angle.cos(), angle.sin()

    def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)

    def plain_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        passed, turned = x.split([192, 64], dim=-1)
        even, odd, cos, sin = turned[..., 0::2].float(), turned[..., 1::2].float(), cos[:, None], sin[:, None]
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
        return torch.cat([passed, turned.to(x.dtype)], dim=-1)

    def ours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(x, cos, sin, interleaved=True, first=192)

    norms = {"torch's rms_norm, in the model": rms_norm, "torch.compile": torch.compile(plain_norm), "plain": plain_norm}
    rotations = {"ours (Triton)": ours, "torch.compile": torch.compile(plain_rotation), "plain": plain_rotation}
    for version, norm in norms.items():
        _both(bench, "RMSNorm 8192 x 6144", version, lambda norm=norm: norm(x, weight, 1e-5), (x, weight), 2 * x.nbytes)
    for version, turn in rotations.items():
        both = 2 * queries.nbytes
        _both(bench, "RoPE, last 64 of 8192 x 64 x 256", version, lambda turn=turn: turn(queries, cos, sin), (queries,), both)


def rows(bench: Bench) -> None:
    """8,192 tokens to 8 of 256 experts each, and back."""
    from megatron.core.transformer.moe.moe_utils import permute, unpermute

    from slime.ops.rows import Order

    tokens = torch.randn(8192, 6144, device="cuda").bfloat16().requires_grad_()
    picked = torch.rand(8192, 256, device="cuda").topk(8).indices
    chosen = torch.zeros(8192, 256, dtype=torch.bool, device="cuda").scatter_(1, picked, True)
    order, (there, _, mapping) = Order.of(chosen, 8), permute(tokens, chosen, num_out_tokens=65536)
    spread = there.detach().requires_grad_()
    moved = tokens.nbytes + spread.nbytes
    bench.add("the order of the rows", "ours", lambda: Order.of(chosen, 8))
    _both(bench, "rows to experts", "ours", lambda: order.spread(tokens), (tokens,), moved)
    _both(
        bench, "rows to experts", "megatron-core, with its order",
        lambda: permute(tokens, chosen, num_out_tokens=65536)[0], (tokens,), moved,
    )  # fmt: skip
    _both(bench, "rows back", "ours (Triton)", lambda: order.collect(spread), (spread,), moved)
    _both(bench, "rows back", "megatron-core", lambda: unpermute(spread, mapping, tokens.shape), (spread,), moved)


def _both(bench: Bench, name: str, version: str, work: Callable, leaves: tuple[Tensor, ...], nbytes: int) -> None:
    """Forward, and backward alone; bytes of either at least."""
    with torch.no_grad():
        bench.add(name, version, work, bytes=nbytes)
    out = work()
    grad = torch.randn_like(out)
    backward = lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)  # noqa: E731
    bench.add(f"{name}, backward", version, backward, bytes=nbytes)


PARTS = {
    "limits": limits, "sparse_mla": sparse_mla, "indexer": indexer, "quantise": quantise, "experts": grouped_experts,
    "log_prob": log_prob, "rope_norm": rope_and_norm, "rows": rows,
}  # fmt: skip


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=10)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    asked = arguments(argv)
    if not torch.cuda.is_available():
        print("there is no CUDA device: this times kernels. A recorded file prints with tools/bench/dsa_table.py FILE.json")
        return 1
    bench, failed = Bench(asked.repeats), False
    for name in asked.only:
        try:
            PARTS[name](bench)
        except Exception as error:  # what was timed before is still printed and written
            traceback.print_exc()
            bench.absent(name, "FAILED", f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
            failed = True
        torch.cuda.empty_cache()
    bench.table.machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {get_ops('cuda').reason}"
    print("\n".join(bench.table.lines()))
    if asked.out:
        asked.out.write_text(bench.table.to_json())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
