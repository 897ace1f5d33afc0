"""A whole training step of one or several ranks, by parts, beside the dense rate of the same run.

    source scripts/models/glm5.2-mini.sh
    python3 tools/bench/train_step.py --bf16 DIR [--ranks 2] [--samples 64] [--tokens 2500] [--repeats 3] [--json FILE] -- \
        "${MODEL_ARGS[@]}" --optimizer-cpu-offload --use-precision-aware-optimizer --overlap-cpu-optimizer-d2h-h2d \
        --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 \
        --use-dynamic-batch-size --max-tokens-per-gpu 16384 --data-pad-size-multiplier 128

The trainer of a run, with the weights of the checkpoint, on random samples of about so many tokens, the last 1/24 of each its
response; behind -- the flags of a launcher that say model, layout, micro-batches and optimizer. The first step is told apart:
it compiles, and makes the optimizer's state. Model FLOPs are those of slime.rehearse.model.flops, recomputation not counted, of
all samples, shared out over the ranks; rank 0's times are told.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from slime.config import Config, load  # noqa: E402
from tools.bench.layer_parts import dense_tflops  # noqa: E402


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step."""

    log_probs: float
    """Forward of all samples, as a run with several steps a rollout needs it before them."""
    gradients: float
    optimizer: float

    @property
    def whole(self) -> float:
        return self.log_probs + self.gradients + self.optimizer


def main(argv: Sequence[str]) -> int:
    cut = list(argv).index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bf16", required=True, help="Hugging Face checkpoint")
    parser.add_argument("--ranks", type=int, default=1, help="of this machine, as the layout behind -- wants them")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2500, help="of a sample, on average")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", default="")
    args = parser.parse_args(argv[:cut])
    if args.ranks == 1:
        run_rank(0, args, argv[cut + 1 :])
    else:
        torch.multiprocessing.spawn(run_rank, args=(args, list(argv[cut + 1 :])), nprocs=args.ranks)
    return 0


def run_rank(rank: int, args: argparse.Namespace, flags: Sequence[str]) -> None:
    """Times the steps; rank 0 tells."""
    config = config_of(args, flags)
    trainer = trainer_of(config, rank, args.ranks)
    cuda = trainer.device.kind == "cuda"
    dense = dense_tflops() if cuda else float("nan")
    rng = np.random.default_rng(0)
    lengths = rng.integers(args.tokens * 9 // 10, args.tokens * 11 // 10 + 1, args.samples)
    times = [one_step(trainer, config, lengths, rng) for _ in range(1 + args.repeats)]
    if rank == 0:
        told = {
            "machine": torch.cuda.get_device_name() if cuda else "host", "ranks": args.ranks, "dense_tflops": dense,
            "tokens": int(lengths.sum()), "tflop": tflop(config, lengths),
            "times": [dataclasses.asdict(one) | {"whole": one.whole} for one in times],
        }  # fmt: skip
        print("\n".join(table(told)), flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(told, indent=1))
    torch.distributed.destroy_process_group()


def config_of(args: argparse.Namespace, flags: Sequence[str]) -> Config:
    words = f"""--hf-checkpoint {args.bf16} --load {args.bf16} --num-rollout 2
        --debug-train-only --load-debug-rollout-data {args.bf16}/{{rollout_id}}.pt
        --actor-num-nodes 1 --actor-num-gpus-per-node {args.ranks} --rollout-batch-size {args.samples} --n-samples-per-prompt 1
        --global-batch-size {args.samples} --rollout-max-response-len {args.tokens} --lr 1e-6 --lr-decay-style constant"""
    return load([*words.split(), *flags], env=os.environ)


def trainer_of(config: Config, rank: int, world: int):
    """A rank's trainer with the checkpoint's weights -> Trainer"""
    from slime.device import get_device
    from slime.model.build import build_model, padded_vocab_size
    from slime.model.hf_config import read_hf_config
    from slime.parallel import init_ranks
    from slime.training.trainer import Trainer
    from tools.bench.one_rank import load_weights

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29533")
    device, checkpoint = get_device(), config.checkpoint.hf_checkpoint
    device.init_process(rank)
    ranks = init_ranks(config.parallel, rank=rank, world_size=world, device=device, seed=1)
    hf = read_hf_config(checkpoint)
    chunks = build_model(config, hf, ranks, device)
    trainer = Trainer(config, device, ranks, chunks)
    load_weights(chunks, checkpoint, ranks, padded_vocab_size(config, hf))
    trainer.optimizer.reload_model_params()
    return trainer


def one_step(trainer, config: Config, lengths: np.ndarray, rng: np.random.Generator) -> StepTime:
    from slime.batch.plan import plan_steps

    batch = random_batch(lengths, config.model.vocab_size, rng)
    sizes = config.parallel
    steps = plan_steps(
        batch.total_lengths, batch.trajectories, batch.mask_sums, dp_size=sizes.data_parallel_size,
        cp_size=sizes.context_parallel_size, vpp_group=1, batch=config.batch, per_token=False, costs=None,
    )  # fmt: skip
    seconds: dict[str, float] = {}
    publish = trainer.optimizer.step_with_ready_grads

    def timed() -> object:
        trainer.device.synchronize()
        begin = time.monotonic()
        done = publish()
        trainer.device.synchronize()
        seconds["optimizer"] = time.monotonic() - begin
        return done

    trainer.optimizer.step_with_ready_grads = timed
    try:
        begin = time.monotonic()
        trainer.log_probs(batch, steps)
        trainer.device.synchronize()
        middle = time.monotonic()
        trainer.train(batch, steps)
        trainer.device.synchronize()
        end = time.monotonic()
    finally:
        del trainer.optimizer.step_with_ready_grads
    return StepTime(middle - begin, end - middle - seconds["optimizer"], seconds["optimizer"])


def random_batch(lengths: np.ndarray, vocab_size: int, rng: np.random.Generator):
    """-> RolloutBatch of random tokens and rewards."""
    from slime.types import RolloutBatch

    n, responses = len(lengths), np.maximum(1, lengths // 24).astype(np.int64)
    rewards = rng.normal(size=n).astype(np.float32)
    return RolloutBatch(
        rollout_id=0, tokens=tuple(rng.integers(1, vocab_size, length) for length in lengths), response_lengths=responses,
        loss_masks=tuple(np.ones(response, np.float32) for response in responses), rewards=rewards, raw_rewards=rewards,
        groups=np.arange(n), trajectories=np.arange(n), sample_ids=np.arange(n), truncated=np.zeros(n, bool),
    )  # fmt: skip


def tflop(config: Config, lengths: np.ndarray) -> dict[str, float]:
    """Model TFLOP of a forward and of a step over samples of these lengths."""
    from slime.model.build import trained_table
    from slime.model.hf_config import read_hf_config
    from slime.rehearse.model.flops import model_work

    hf = read_hf_config(config.checkpoint.hf_checkpoint)
    table, total = trained_table(config.model, hf), {"log_probs": 0.0, "gradients": 0.0}
    for length in lengths.tolist():
        work = model_work(table, hf, length)
        # The logits that backward makes again are recomputation too.
        step = work.training(recompute=False) - work.head
        total = {"log_probs": total["log_probs"] + length * work.forward, "gradients": total["gradients"] + length * step}
    return {name: flop / 1e12 for name, flop in total.items()}


def table(told: dict) -> list[str]:
    first, *later = told["times"]
    work = dict(told["tflop"])
    work["step (gradients, optimizer)"] = work["gradients"]
    work["whole"] = work["log_probs"] + work["gradients"]
    lines = [
        f"{told['machine']}, {told['ranks']} ranks, {told['tokens']} tokens, dense product {told['dense_tflops']:.0f} TFLOP/s",
        "| part | first, s | then, s | model TFLOP/s of a rank | of the dense rate |",
        "|---|---|---|---|---|",
    ]
    for part in ("log_probs", "gradients", "optimizer", "step (gradients, optimizer)", "whole"):
        parts = ("gradients", "optimizer") if part.startswith("step") else (part,)
        start, then = (sum(one[name] for name in parts) for one in (first, _median(later)))
        rate = work[part] / then / told["ranks"] if part in work else None
        cells = ["-", "-"] if rate is None else [f"{rate:.0f}", f"{100 * rate / told['dense_tflops']:.0f} %"]
        lines.append("| " + " | ".join([part, f"{start:.2f}", f"{then:.2f}", *cells]) + " |")
    return lines


def _median(times: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in times) for name in times[0]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
