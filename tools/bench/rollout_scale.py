"""What lies between the engines' answers and the trainer, at scale: seconds, and copies of the tokens.

    python3 -m tools.bench.rollout_scale samples [--count 100000]                    # filtered, made columns, planned, packed
    python3 -m tools.bench.rollout_scale copies [--samples 64] [--tokens 65536]      # bytes of a long batch, stage by stage

Seconds are the processor's. `copies` counts with tracemalloc, which NumPy's and Python's memory goes through, in copies of the
token ids at 8 bytes: what a stage keeps, and the most that it holds meanwhile. A micro-batch keeps eight columns as long as its
tokens. An id of an answer is copied into the sample's column and from there into its row of the stream; two of the eight,
the targets of the policy and of the draft layer, hold it again one and two rows earlier. Between the processes of rollout and
trainer Ray's shared memory holds the columns once on each node, which is not counted here.
"""

from __future__ import annotations

import argparse
import gc
import time
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from slime.batch.pack import pack
from slime.batch.plan import plan_steps
from slime.config import Config
from slime.config.training import BatchConfig
from slime.rollout.filter_hub.base_types import call_dynamic_filter
from slime.rollout.filter_hub.dynamic_sampling_filters import check_reward_nonzero_std
from slime.rollout.generation import read_output
from slime.rollout.metrics import rollout_metrics
from slime.rollout.to_batch import make_rollout_batch
from slime.types.sample import Sample, Status

GROUP = 8


def make_samples(count: int, lengths: np.ndarray, *, prompt: int = 64) -> list[Sample]:
    """Graded answers of so many response tokens, as a rollout makes them."""
    samples = []
    for index, length in enumerate(lengths.tolist()):
        answer = {"output_token_logprobs": [(-0.5, 1000 + position % 5000, None) for position in range(length)]}
        sample = Sample(
            index=index, group_index=index // GROUP, tokens=list(range(1, prompt + 1)), reward=float(index % 3 == 0)
        )
        tokens, log_probs = read_output(answer)
        sample.append_response_tokens(tokens=tokens, log_probs=log_probs)
        sample.status = Status.COMPLETED
        samples.append(sample)
    assert len(samples) == count
    return samples


def measure_samples(count: int, *, dp_size: int = 64, seed: int = 0) -> dict[str, float]:
    """Seconds of each stage for `count` short answers."""
    lengths = np.random.default_rng(seed).integers(8, 192, count)
    samples = make_samples(count, lengths)
    groups = [samples[start : start + GROUP] for start in range(0, count, GROUP)]
    config, seconds = Config(), {}

    def timed(name: str, call: Callable):
        started = time.process_time()
        value = call()
        seconds[name] = time.process_time() - started
        return value

    timed("filter", lambda: [call_dynamic_filter(check_reward_nonzero_std, config.args, group).keep for group in groups])
    timed("metrics", lambda: rollout_metrics(groups))
    batch = timed("columns", lambda: make_rollout_batch(groups, rollout_id=0, config=config))
    rules = BatchConfig(global_batch_size=count, use_dynamic_batch_size=True, max_tokens_per_gpu=8192, balance_data=True)
    sums = np.array([mask.sum() for mask in batch.loss_masks])

    def plan(**changed):
        own = SimpleNamespace(**{**vars(rules), **changed})
        return plan_steps(batch.total_lengths, batch.trajectories, sums, dp_size=dp_size, cp_size=1, batch=own, per_token=False)

    [step] = timed("plan", plan)
    timed("plan, even work", lambda: plan(balance_by_flops=True))
    timed("pack", lambda: [pack(batch, micro, loss_weight=step.loss_weight) for rank in step.micro_batches for micro in rank])
    return seconds


def measure_copies(samples: int, tokens: int) -> dict[str, tuple[float, float]]:
    """Stage -> (bytes kept, bytes held at most beside what was there), each as copies of the token ids at 8 bytes."""
    prompt = 64
    answers = [
        {"output_token_logprobs": [(-0.5, 1000 + p % 5000, None) for p in range(tokens - prompt)]} for _ in range(samples)
    ]
    size, found = 8.0 * samples * tokens, {}
    config = Config()
    tracemalloc.start()

    def traced(name: str, call: Callable):
        gc.collect()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        value = call()
        now, peak = tracemalloc.get_traced_memory()
        found[name] = ((now - before) / size, (peak - before) / size)
        return value

    def append() -> list[Sample]:
        made = []
        for index, answer in enumerate(answers):
            sample = Sample(
                index=index, group_index=index // GROUP, tokens=list(range(1, prompt + 1)), reward=float(index % 3 == 0)
            )
            ids, log_probs = read_output(answer)
            sample.append_response_tokens(tokens=ids, log_probs=log_probs)
            sample.status = Status.COMPLETED
            made.append(sample)
        return made

    made = traced("answers to samples (lists of Python's)", append)
    groups = [made[start : start + GROUP] for start in range(0, samples, GROUP)]
    batch = traced("samples to columns", lambda: make_rollout_batch(groups, rollout_id=0, config=config))
    weight = np.full(samples, 1.0)
    micros = traced("columns to micro-batches", lambda: [pack(batch, [row], loss_weight=weight) for row in range(samples)])
    tracemalloc.stop()
    for row, micro in enumerate(micros):
        assert np.array_equal(micro.tokens[0].numpy(), batch.tokens[row])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("samples", "copies"))
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=65_536)
    args = parser.parse_args()
    if args.what == "samples":
        for name, seconds in measure_samples(args.count).items():
            print(f"{name:20} {seconds:8.2f} s")
    else:
        for name, (kept, peak) in measure_copies(args.samples, args.tokens).items():
            print(
                f"{name:40} keeps {kept:5.2f}, holds at most {peak:5.2f} copies of {8e-6 * args.samples * args.tokens:.1f} MB"
            )


if __name__ == "__main__":
    main()
