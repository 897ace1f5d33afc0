"""One decoder layer of the trainer, forward and backward with recomputation, by parts, beside the dense rate of the same run.

    source scripts/models/glm5.2-mini.sh
    python3 tools/bench/layer_parts.py --bf16 DIR [--rows 8192] [--layers 6,7] [--kernels 40] [--json FILE] -- \
        "${MODEL_ARGS[@]}"
    python3 tools/bench/layer_parts.py --bf16 DIR --ranks 2 -- "${MODEL_ARGS[@]}" --tensor-model-parallel-size 2 \
        --sequence-parallel --expert-model-parallel-size 2 --expert-tensor-parallel-size 1

The layer stands in the model as a run builds it, with the weights of the checkpoint, on one device or on --ranks of this
machine; of several, rank 0's times are told, and the exchanges of a part are in its own. Events on the device's stream stand
before and after each part: forward where it is called, backward by identity operators at its ends, which autograd meets in the
reverse order. Recomputation is a forward without gradient, then one with. FLOPs are those of slime.rehearse.model.flops, of one
sample of so many rows a rank, shared out over the ranks; the share of the dense rate is of model FLOPs, where the recomputed
forward does not count. What is between the parts (norms, residuals) is the rest. --layers counts from 0; of one that shares its
keys, the layer that it shares with is run before. --kernels lists those that take longest in one forward and backward.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from slime.model.hf_config import HfConfig  # noqa: E402
from tools.bench.one_rank import OneRank  # noqa: E402

ATTENTION = {"queries": "projections", "latents": "projections", "run_indexer": "indexer", "core": "core"}
DISPATCHER = {
    "dispatch_preprocess": "dispatch", "token_dispatch": "dispatch", "dispatch_postprocess": "dispatch",
    "combine_preprocess": "combine", "token_combine": "combine", "combine_postprocess": "combine",
}  # fmt: skip
ORDER = ("projections", "indexer", "core", "router", "dispatch", "experts", "combine", "shared expert")


class Clock:
    """Moments on the device's stream; on a machine without one, of the wall clock."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda

    def now(self) -> object:
        if not self._cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, begin: object, end: object) -> float:
        if not self._cuda:
            return 1e3 * (end - begin)
        end.synchronize()
        return begin.elapsed_time(end)


class _Moment(torch.autograd.Function):
    """Identity; its backward notes when it is met."""

    @staticmethod
    def forward(ctx, value: Tensor, clock: Clock, moments: list[object]) -> Tensor:
        ctx.clock, ctx.moments = clock, moments
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.moments.append(ctx.clock.now())
        return gradient, None, None


@dataclass
class Call:
    """One call of a part."""

    begin: object
    end: object
    graded: bool
    gradient_came: list[object] = field(default_factory=list)
    gradient_left: list[object] = field(default_factory=list)


class Parts:
    """Notes every call of the parts that are marked."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.calls: dict[str, list[Call]] = {}

    def mark(self, part: str, owner: object, name: str) -> None:
        own: Callable = getattr(owner, name)

        def marked(*args: object, **kwargs: object) -> object:
            call = Call(None, None, torch.is_grad_enabled())
            args = [self._noted(arg, call.gradient_left) for arg in args]
            kwargs = {key: self._noted(arg, call.gradient_left) for key, arg in kwargs.items()}
            call.begin = self.clock.now()
            out = own(*args, **kwargs)
            call.end = self.clock.now()
            self.calls.setdefault(part, []).append(call)
            if isinstance(out, tuple):
                return tuple(self._noted(one, call.gradient_came) for one in out)
            return self._noted(out, call.gradient_came)

        setattr(owner, name, marked)

    def _noted(self, value: object, moments: list[object]) -> object:
        wants = isinstance(value, Tensor) and value.requires_grad and not value.is_leaf
        return _Moment.apply(value, self.clock, moments) if wants else value

    def times(self) -> dict[str, tuple[float, float]]:
        """Part -> milliseconds of (one forward, one backward), over all calls since the last asking."""
        told = {}
        for part, calls in self.calls.items():
            forward = sum(self.clock.milliseconds(call.begin, call.end) for call in calls if call.graded)
            backward = sum(
                self.clock.milliseconds(call.gradient_came[0], call.gradient_left[-1])
                for call in calls
                if call.gradient_came and call.gradient_left
            )
            told[part] = (forward, backward)
        self.calls = {}
        return told


@dataclass(frozen=True)
class PartTime:
    part: str
    forward_ms: float
    backward_ms: float
    model_flops: float | None
    """Of forward and backward, recomputation not counted; None where a part only moves data."""

    @property
    def ms(self) -> float:
        """With the forward done twice."""
        return 2 * self.forward_ms + self.backward_ms


def main(argv: Sequence[str]) -> int:
    args, model_args = _parse(argv)
    if args.ranks == 1:
        run_rank(0, args, model_args)
    else:
        torch.multiprocessing.spawn(run_rank, args=(args, model_args), nprocs=args.ranks)
    return 0


def run_rank(rank: int, args: argparse.Namespace, model_args: Sequence[str]) -> None:
    """Times the layers; rank 0 tells."""
    from slime.config import load

    config = load([*model_args, "--hf-checkpoint", args.bf16, "--save", args.bf16], door="convert")
    trainer = OneRank(config, args.bf16, args.bf16, rank=rank, world=args.ranks)
    cuda = trainer.device.kind == "cuda"
    dense = dense_tflops() if cuda else float("nan")
    machine = torch.cuda.get_device_name() if cuda else "host"
    told = {"machine": machine, "ranks": args.ranks, "rows": args.rows, "dense_tflops": dense, "layers": {}}
    for layer in args.layers:
        parts = time_layer(trainer, layer, args.rows, args.repeats, kernels=args.kernels)
        told["layers"][layer] = [dataclasses.asdict(part) for part in parts]
        if rank == 0:
            print("\n".join(table(layer, parts, args.rows, dense)), flush=True)
    if args.json and rank == 0:
        Path(args.json).write_text(json.dumps(told, indent=1))
    torch.distributed.destroy_process_group()


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    cut = list(argv).index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bf16", required=True, help="Hugging Face checkpoint")
    parser.add_argument("--rows", type=int, default=8192, help="of a rank")
    parser.add_argument("--ranks", type=int, default=1, help="of this machine, as the layout behind -- wants them")
    parser.add_argument("--layers", type=lambda text: [int(word) for word in text.split(",")], default=[6, 7])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--kernels", type=int, default=0, help="how many of a layer's kernels are listed, longest first")
    parser.add_argument("--json", default="")
    return parser.parse_args(argv[:cut]), list(argv[cut + 1 :])


def dense_tflops(width: int = 8192, repeats: int = 20) -> float:
    """Of a bf16 matrix product of random numbers, the median of its times."""
    left, right = (torch.randn(width, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    clock, times = Clock(True), []
    for _ in range(repeats):
        begin = clock.now()
        left @ right
        times.append(clock.milliseconds(begin, clock.now()))
    return 2 * width**3 / statistics.median(times) / 1e9


def time_layer(trainer: OneRank, number: int, rows: int, repeats: int, *, kernels: int = 0) -> list[PartTime]:
    """Medians over the repeats, after three that are not counted; the last line is what the parts leave of the whole layer.

    rows: of this rank, a sequence-parallel slice of one sample. Prints the `kernels` that take longest.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    from slime.model.local import unwrap

    [chunk] = trainer.chunks
    layers = unwrap(chunk).decoder.layers
    layer = layers[number].train()
    clock = Clock(trainer.device.kind == "cuda")
    length = rows * trainer.ranks.tp_size
    bounds = torch.tensor([0, length], dtype=torch.int32, device=trainer.device.torch_device)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=length, max_seqlen_kv=length
    )
    dtype = next(layer.parameters()).dtype
    hidden = torch.randn(
        rows, 1, trainer.hf["hidden_size"], device=trainer.device.torch_device, dtype=dtype, requires_grad=True
    )

    def run(which) -> Tensor:
        out = which(hidden_states=hidden, attention_mask=None, packed_seq_params=packed)
        return out[0] if isinstance(out, tuple) else out

    source = layers[trainer.hf.index_source(number)]
    if source is not layer:  # leaves its keys on `packed`
        with torch.no_grad():
            run(source)
    gradient = torch.randn_like(hidden)
    if kernels:
        listed = longest_kernels(lambda: run(layer).backward(gradient), kernels)  # of all ranks, which exchange
        if trainer.ranks.rank == 0:
            print(listed)
    parts = Parts(clock)
    _mark(parts, layer)
    measured: list[dict[str, tuple[float, float]]] = []
    for _ in range(3 + repeats):
        with torch.no_grad():
            run(layer)
        begin = clock.now()
        out = run(layer)
        middle = clock.now()
        out.backward(gradient)
        end = clock.now()
        whole = (clock.milliseconds(begin, middle), clock.milliseconds(middle, end))
        measured.append(parts.times() | {"layer": whole})
        for parameter in [hidden, *layer.parameters()]:
            parameter.grad = None
    flops = {part: work / trainer.ranks.tp_size for part, work in model_flops(trainer.hf, number, length).items()}
    medians = {
        part: tuple(statistics.median(one[part][side] for one in measured[3:]) for side in (0, 1)) for part in measured[-1]
    }
    whole = medians.pop("layer")
    listed = [PartTime(part, *medians[part], flops.get(part)) for part in ORDER if part in medians]
    rest = [whole[side] - sum(times[side] for times in medians.values()) for side in (0, 1)]
    return [*listed, PartTime("norms, residuals, the rest", *rest, None), PartTime("layer", *whole, sum(flops.values()))]


def longest_kernels(work: Callable[[], object], count: int) -> str:
    """A table of what `work` has the device do in its third call."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        work()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as told:
        work()
    return told.key_averages(group_by_input_shape=True).table(
        sort_by="self_device_time_total", row_limit=count, max_name_column_width=70, max_shapes_column_width=90
    )


def _mark(parts: Parts, layer: torch.nn.Module) -> None:
    attention, mlp = layer.self_attention, layer.mlp
    for name, part in ATTENTION.items():
        if name != "run_indexer" or attention.runs_indexer:
            parts.mark(part, attention, name)
    parts.mark("projections", attention.linear_proj, "forward")
    parts.mark("router", mlp.router, "forward")
    for name, part in DISPATCHER.items():
        parts.mark(part, mlp.token_dispatcher, name)
    parts.mark("experts", mlp.experts, "forward")
    parts.mark("shared expert", mlp.shared_experts, "forward")


def model_flops(hf: HfConfig, number: int, rows: int) -> dict[str, float]:
    """Part -> FLOPs of forward and backward of one MoE layer over a sample of so many rows."""
    from slime.rehearse.model import flops

    hidden, inner = hf["hidden_size"], hf["moe_intermediate_size"]
    heads, rope, value = hf["num_attention_heads"], hf["qk_rope_head_dim"], hf["v_head_dim"]
    query, latent = hf["q_lora_rank"], hf["kv_lora_rank"]
    up = hf["qk_nope_head_dim"] + value
    projections = query * (hidden + heads * (hf["qk_nope_head_dim"] + rope)) + hidden * (latent + rope) + heads * value * hidden
    # Absorbed into the core: each head's key and value projection meets queries and outputs instead of keys and values.
    absorbed = heads * latent * up
    forward, backward = flops.core(hf, rows)
    # The indexer has no gradient: scores over all earlier keys, and its own projections.
    width = hf["index_n_heads"] * hf["index_head_dim"]
    own = 2.0 * (query * width + hidden * hf["index_head_dim"] + hidden * hf["index_n_heads"])
    indexer = flops.indexer(hf, number, rows) + own if hf.runs_indexer(number) else 0.0
    per_token = {
        "projections": 6.0 * projections,
        "indexer": indexer,
        "core": 6.0 * absorbed + forward + backward,
        "router": 6.0 * hidden * hf.num_experts,
        "experts": 6.0 * 3 * hidden * inner * hf["num_experts_per_tok"],
        "shared expert": 6.0 * 3 * hidden * inner * hf["n_shared_experts"],
    }
    return {part: rows * work for part, work in per_token.items()}


def table(layer: int, parts: Sequence[PartTime], rows: int, dense: float) -> list[str]:
    lines = [
        f"layer {layer} (0-based), {rows} rows, dense product {dense:.0f} TFLOP/s",
        "| part | forward, ms | backward, ms | with recomputation, ms | model TFLOP/s | of the dense rate |",
        "|---|---|---|---|---|---|",
    ]
    for part in parts:
        rate = part.model_flops / part.ms / 1e9 if part.model_flops and part.ms > 0 else None
        told = ["-", "-"] if rate is None else [f"{rate:.0f}", f"{100 * rate / dense:.0f} %"]
        lines.append(
            "| " + " | ".join([part.part, f"{part.forward_ms:.2f}", f"{part.backward_ms:.2f}", f"{part.ms:.2f}", *told]) + " |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
