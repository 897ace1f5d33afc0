"""Times the sparse core of one GLM-5.2 layer sharded by queries and by heads, through the code that the trainer runs.

    python3 tools/bench/core_axis.py [--tp 4]             # one GPU: a rank's arithmetic, nothing exchanged
    torchrun --nproc-per-node 4 tools/bench/core_axis.py  # a tensor-parallel group, exchanges included

The share of one context-parallel rank of the recipe: 8,192 rows near the end of a 65,536-token stream, 64 heads, 2,048 listed
keys per row. By queries a rank has rows / tp rows of all heads, and two all-to-alls; by heads all rows of heads / tp heads.
Medians over random inputs, of the slowest rank.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import sys
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from slime_plugins.models.glm5.attention import SparseLatentAttention  # noqa: E402
from slime_plugins.models.glm5.exchange import heads_to_queries, queries_to_heads, whole_weight  # noqa: E402
from slime_plugins.models.glm5.ops import get_ops  # noqa: E402

HEADS, KEYS, TOPK = 64, 65_536, 2_048
SHAPE = SimpleNamespace(nope=192, rope_width=64, value=256, kv_latent=512, scale=256**-0.5)


def core(query: Tensor, keys: Tensor, indices: Tensor, up: Tensor) -> Tensor:
    return SparseLatentAttention.core(SimpleNamespace(shape=SHAPE), query, keys, indices, up)


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median over calls of the slowest rank's time."""
    times = []
    for number in range(repeats + 2):
        if dist.is_initialized():
            dist.barrier()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        slowest = torch.tensor(start.elapsed_time(end), device="cuda")
        if dist.is_initialized():
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        if number >= 2:
            times.append(slowest.item())
    return statistics.median(times)


def measure(tp: int, rows: int, repeats: int) -> list[tuple[str, float, float, float]]:
    """(axis, forward, forward + backward, selection) in milliseconds. Exchanges are made where there is a process group."""
    group = dist.group.WORLD if dist.is_initialized() else None
    positions = torch.arange(KEYS - rows, KEYS, device="cuda")
    keys = torch.randn(KEYS, 576, device="cuda").bfloat16().requires_grad_()
    indices = (torch.rand(rows, TOPK, device="cuda") * (positions[:, None] + 1)).int()
    width, made = SHAPE.nope + SHAPE.rope_width, SHAPE.nope + SHAPE.value

    def by_heads(query: Tensor, up: Tensor) -> Tensor:
        return core(query, keys, indices, up)

    def by_queries(query: Tensor, up: Tensor) -> Tensor:
        if group is None:
            return core(query, keys, indices[: rows // tp], up)
        out = core(heads_to_queries(query, group), keys, indices[: rows // tp], whole_weight(up, group))
        return queries_to_heads(out, group)

    found = []
    for axis, run in (("queries", by_queries), ("heads", by_heads)):
        whole = axis == "queries" and group is None
        t, heads = (rows // tp, HEADS) if whole else (rows, HEADS // tp)
        query = torch.randn(t, heads, width, device="cuda").bfloat16().requires_grad_()
        up = (torch.randn(heads * made, SHAPE.kv_latent, device="cuda") / 23).bfloat16().requires_grad_()
        grad = torch.randn(t, heads, SHAPE.value, device="cuda").bfloat16()

        def both(run=run, query=query, up=up, grad=grad) -> None:
            torch.autograd.grad(run(query, up), (query, up, keys), grad)

        with torch.no_grad():
            forward = milliseconds(lambda run=run, query=query, up=up: run(query, up), repeats)
        scored = rows // tp if axis == "queries" else rows
        found.append((axis, forward, milliseconds(both, repeats), selection(scored, repeats)))
        torch.cuda.empty_cache()
    return found


def selection(rows: int, repeats: int) -> float:
    """The indexer for `rows` queries: by heads every rank of slime scores all of its context-parallel rank's rows."""
    query, key = (torch.randn(n, *size, device="cuda").bfloat16() for n, size in ((rows, (32, 128)), (KEYS, (128,))))
    gates, ends = torch.randn(rows, 32, device="cuda"), torch.arange(KEYS - rows + 1, KEYS + 1, device="cuda").int()
    starts, pick = torch.zeros_like(ends), get_ops("cuda").index_topk
    return milliseconds(lambda: pick(query, key, gates, starts, ends, topk=TOPK), repeats)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=4, help="tensor-parallel size; under torchrun it is the number of ranks")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=10)
    asked = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("there is no CUDA device: this times kernels")
        return 1
    if "WORLD_SIZE" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
        asked.tp = dist.get_world_size()
    if HEADS % asked.tp or asked.rows % asked.tp:
        parser.error(f"--tp {asked.tp} must divide {HEADS} heads and --rows {asked.rows}")
    found = measure(asked.tp, asked.rows, asked.repeats)
    if not dist.is_initialized() or dist.get_rank() == 0:
        exchanged = "exchanges over NCCL included" if dist.is_initialized() else "arithmetic alone, nothing exchanged"
        print(f"{torch.cuda.get_device_name()}; TP{asked.tp}, {asked.rows} rows; {exchanged}; {get_ops('cuda').reason}")
        print(f"{'axis':8} {'forward':>9} {'and backward':>13} {'selection':>10}   ms")
        for axis, forward, both, selecting in found:
            print(f"{axis:8} {forward:9.2f} {both:13.2f} {selecting:10.2f}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
