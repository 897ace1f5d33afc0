"""Times the DSA and general operators on one Hopper GPU, beside the peers that are installed and the machine's own limits.

    python3 tools/bench/dsa_ops.py [--out FILE.json] [--only NAME ...] [--repeats N]

Medians over random inputs, the L2 cache overwritten before each timed call. Prints one table; --out also writes it as JSON.
Peers: FlashMLA (sgl_kernel), the cuDNN front-end's DSA backward (cudnn), DeepGEMM's FP8 scores (deep_gemm); an absent one is
named with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Callable

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from slime.ops import experts, fp8  # noqa: E402
from slime.ops.vocab_logprob import linear_log_prob  # noqa: E402
from slime_plugins.models.glm5.ops import get_ops, hopper_ops, torch_ops, triton_ops  # noqa: E402

QUERIES, HEADS, KEYS, TOPK, SCALE = 2048, 64, 65536, 2048, 256**-0.5


@dataclasses.dataclass
class Row:
    operator: str
    version: str
    milliseconds: float | None
    flops: float = 0.0
    bytes: float = 0.0
    note: str = ""


class Bench:
    def __init__(self, repeats: int):
        self.rows: list[Row] = []
        self.repeats = repeats
        self._l2 = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")

    def time(self, call: Callable[[], object]) -> float:
        """Median milliseconds."""
        for _ in range(2):
            call()
        times = []
        for _ in range(self.repeats):
            self._l2.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)

    def add(
        self, operator: str, version: str, call: Callable[[], object], *, flops: float = 0, bytes: float = 0, note: str = ""
    ) -> None:
        self.rows.append(Row(operator, version, self.time(call), flops, bytes, note))

    def absent(self, operator: str, version: str, why: str) -> None:
        self.rows.append(Row(operator, version, None, note=why))

    def print(self) -> None:
        print(f"{'operator':28} {'version':34} {'ms':>9} {'TFLOP/s':>8} {'TB/s':>6}  note")
        for r in self.rows:
            ms = "-" if r.milliseconds is None else f"{r.milliseconds:.3f}"
            rate = f"{r.flops / r.milliseconds / 1e9:.0f}" if r.milliseconds and r.flops else ""
            moved = f"{r.bytes / r.milliseconds / 1e9:.2f}" if r.milliseconds and r.bytes else ""
            print(f"{r.operator:28} {r.version:34} {ms:>9} {rate:>8} {moved:>6}  {r.note}")


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

    name, pairs = "sparse MLA forward", QUERIES * HEADS * TOPK
    forward = 2 * pairs * (576 + 512)
    bench.add(name, "ours", lambda: hopper_ops.sparse_mla_forward(q, kv, indices, SCALE), flops=forward)
    flash_mla, finding = hopper_ops.find_flash_mla()
    if flash_mla is None:
        bench.absent(name, "FlashMLA", finding)
    else:
        kernel, kv3, indices3 = torch.ops.sgl_kernel.sparse_prefill_fwd, kv[:, None], indices[:, None]
        bench.add(name, "FlashMLA kernel", lambda: kernel(q, kv3, indices3, SCALE, 512, None, None), flops=forward)
    chosen = get_ops("cuda").sparse_mla
    bench.add(name, "as chosen (get_ops)", lambda: chosen(q, kv, indices, scale=SCALE, v_dim=512), flops=forward)

    name, backward = "sparse MLA backward", 2 * pairs * (576 + 512 + 576 + 576 + 512)

    def ours(store: int) -> Callable[[], object]:
        return lambda: hopper_ops.sparse_mla_backward(q, kv, indices, out, lse, grad, SCALE, store=store)

    bench.add(name, "ours, staged (default)", ours(hopper_ops.STAGE), flops=backward)
    bench.add(name, "ours, fp32 reductions", ours(hopper_ops.REDUCE), flops=backward)
    staging, hopper_ops.STAGING_BYTES = hopper_ops.STAGING_BYTES, hopper_ops.STAGING_BYTES // 4
    bench.add(name, "ours, staged in 1.25 GB", ours(hopper_ops.STAGE), flops=backward)
    hopper_ops.STAGING_BYTES = staging
    with hopper_ops.deterministic():
        bench.add(name, "ours, deterministic", ours(hopper_ops.STAGE), flops=backward)
    inputs = hopper_ops._prepare(q, kv, indices, out, lse, grad, SCALE)
    grad_q, grad_kv = torch.empty_like(q), torch.zeros(kv.shape, device="cuda")
    bench.add(
        name, "ours, kernel without stores", lambda: hopper_ops._launch_backward(inputs, grad_q, grad_kv, hopper_ops.DROP),
        flops=backward, note="dKV computed and dropped",
    )  # fmt: skip
    cudnn_backward(bench, name, backward, q, kv, out, grad, lse, indices)


def cudnn_backward(bench: Bench, name: str, flops: float, q, kv, out, grad, lse, indices) -> None:
    try:
        from cudnn.deepseek_sparse_attention import DSA

        sink = torch.full((HEADS,), -1e30, device="cuda")
        run = DSA.sparse_attention_backward_wrapper
        result = run(q, kv, out, grad, lse, sink, indices, softmax_scale=SCALE)
    except Exception as error:  # an optional peer: whatever keeps it from running is reported, not raised
        bench.absent(name, "cuDNN front-end", f"{type(error).__name__}: {str(error)[:80]}")
        return
    grad_q, _ = hopper_ops.sparse_mla_backward(q, kv, indices, out, lse, grad, SCALE)
    apart = ((result["dq"].float() - grad_q.float()).norm() / grad_q.float().norm()).item()
    bench.add(
        name, "cuDNN front-end", lambda: run(q, kv, out, grad, lse, sink, indices, softmax_scale=SCALE), flops=flops,
        note=f"dq differs from ours by {apart:.1e}",
    )  # fmt: skip


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
    flops = 2 * QUERIES * keys * 32 * 128

    def of_codes() -> torch.Tensor:
        return hopper_ops._index_topk(q_codes, k_codes, folded, k_scale, starts, ends, TOPK)

    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    bench.add(name, "ours bf16", lambda: hopper_ops.index_topk(q, k, gates, starts, ends, topk=TOPK), flops=flops)
    bench.rows[-1].note = f"scores and top-k, {(torch.cuda.max_memory_allocated() - base) / 1e6:.0f} MB extra"
    bench.add(name, "ours FP8", of_codes, flops=flops, note="scores and top-k of given codes")
    if not with_peers:
        return
    whole = "ours FP8 with quantising"
    bench.add(name, whole, lambda: hopper_ops.index_topk_fp8(q, k, gates, starts, ends, topk=TOPK), flops=flops)
    scores = torch.randn(QUERIES, keys, device="cuda")
    try:
        import deep_gemm

        def peer() -> torch.Tensor:
            return deep_gemm.fp8_mqa_logits(q_codes, (k_codes, k_scale), folded, starts, ends, clean_logits=False)

        peer()
    except Exception as error:  # an optional peer: whatever keeps it from running is reported, not raised
        bench.absent(name, "DeepGEMM scores", f"{type(error).__name__}: {str(error)[:80]}")
    else:
        bench.add(name, "DeepGEMM scores", peer, flops=flops, note="scores alone")
    bench.add(name, "torch.topk", lambda: torch.topk(scores, TOPK), note="top-k alone")


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

    def both() -> None:
        torch.autograd.grad(experts.grouped_swiglu(x, counts, w1, w2, probs), (x, w1, w2, probs), grad)

    bench.add("experts", "ours, forward", lambda: experts.grouped_swiglu(x, counts, w1, w2, probs), flops=flops)
    bench.add("experts", "ours, forward + backward", both, flops=3 * flops)


def log_prob(bench: Bench) -> None:
    rows, vocab, hidden = 16384, 38720, 6144
    x = torch.randn(rows, hidden, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocab, hidden, device="cuda") / 78).bfloat16().requires_grad_()
    targets, slopes = torch.randint(0, vocab, (rows,), device="cuda"), torch.randn(rows, device="cuda")

    def both() -> None:
        torch.autograd.grad((linear_log_prob(x, weight, targets)[0] * slopes).sum(), (x, weight))

    both()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    extra = (torch.cuda.max_memory_allocated() - base - x.nbytes - weight.nbytes) / 1e6
    flops = 2 * rows * vocab * hidden
    bench.add("linear log-prob", "ours, forward", lambda: linear_log_prob(x, weight, targets), flops=flops)
    note = f"three products counted, four made; {extra:.0f} MB beyond the gradients"
    bench.add("linear log-prob", "ours, forward + backward", both, flops=3 * flops, note=note)


def rope_and_norm(bench: Bench) -> None:
    x = torch.randn(8192, 6144, device="cuda").bfloat16()
    weight = torch.randn(6144, device="cuda").bfloat16()
    queries = torch.randn(8192, 16, 256, device="cuda").bfloat16()[..., 192:]
    angle = torch.rand(8192, 32, device="cuda")
    cos, sin = angle.cos(), angle.sin()
    versions = {
        "ours (Triton)": (triton_ops.rms_norm, triton_ops.rope_interleaved),
        "torch.compile": (torch.compile(torch_ops.rms_norm), torch.compile(torch_ops.rope_interleaved)),
    }
    for version, (norm, rope) in versions.items():
        bench.add("RMSNorm 8192 x 6144", version, lambda norm=norm: norm(x, weight, 1e-5), bytes=2 * x.nbytes)
        bench.add("RoPE 8192 x 16 x 64", version, lambda rope=rope: rope(queries, cos, sin), bytes=4 * queries.numel())


PARTS = {
    "limits": limits, "sparse_mla": sparse_mla, "indexer": indexer, "quantise": quantise, "experts": grouped_experts,
    "log_prob": log_prob, "rope_norm": rope_and_norm,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    bench = Bench(arguments.repeats)
    for name in arguments.only:
        PARTS[name](bench)
        torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {get_ops('cuda').reason}")
    bench.print()
    if arguments.out:
        arguments.out.write_text(json.dumps([dataclasses.asdict(row) for row in bench.rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
