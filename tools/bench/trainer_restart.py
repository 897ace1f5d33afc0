"""What a lost trainer rank costs: a restart from snapshots in main memory beside one from the checkpoint on disk.

    source scripts/models/glm5.2-tiny.sh
    python3 tools/make_tiny_checkpoint.py --preset cpu --output DIR
    python3 tools/bench/trainer_restart.py --bf16 DIR/bf16 --save DIR/run [--ranks 2] [--repeats 3] -- \\
        "${MODEL_ARGS[@]}" --decoder-last-pipeline-num-layers 2

One rollout is trained, its state kept both ways; then, in turns, a rank is killed, all ranks are started anew, and the state is
taken back. Of each part the median in seconds is printed, and the ratio. There are no engines: with snapshots they stay up,
from disk they start as well.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import ray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from slime.batch.plan import plan_steps  # noqa: E402
from slime.config import Config, load  # noqa: E402
from slime.ray.placement import Placement, place  # noqa: E402
from slime.ray.snapshot_keeper import SnapshotStore  # noqa: E402
from slime.ray.standstill import Patience  # noqa: E402
from slime.ray.train_group import TrainGroup  # noqa: E402
from slime.types import RolloutBatch  # noqa: E402

SAMPLES, TOKENS = 8, 64


@dataclass
class Clock:
    """Seconds by what was measured, of every repeat."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds.setdefault(what, []).append(time.monotonic() - started)

    def median(self, what: str) -> float:
        return statistics.median(self.seconds[what])


def config_of(args: argparse.Namespace, flags: list[str]) -> Config:
    save = str(args.save)
    words = f"""--hf-checkpoint {args.bf16} --load {save} --save {save} --num-rollout 2 --debug-train-only
        --load-debug-rollout-data {save}/{{rollout_id}}.pt
        --actor-num-gpus-per-node {args.ranks} --pipeline-model-parallel-size {args.ranks}
        --rollout-batch-size {SAMPLES} --n-samples-per-prompt 1 --global-batch-size {SAMPLES}
        --rollout-max-response-len {TOKENS} --use-dynamic-batch-size --max-tokens-per-gpu 512
        --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --lr 1e-6 --lr-decay-style constant"""
    return load([*words.split(), *flags], env=os.environ)


def random_rollout(vocab_size: int) -> RolloutBatch:
    rng = np.random.default_rng(0)
    one = np.zeros(SAMPLES, np.int64)
    rewards = rng.normal(size=SAMPLES).astype(np.float32)
    return RolloutBatch(
        rollout_id=0, tokens=tuple(rng.integers(1, vocab_size, TOKENS) for _ in range(SAMPLES)),
        response_lengths=one + TOKENS // 2, loss_masks=tuple(np.ones(TOKENS // 2, np.float32) for _ in range(SAMPLES)),
        rewards=rewards, raw_rewards=rewards, groups=one, trajectories=np.arange(SAMPLES), sample_ids=np.arange(SAMPLES),
        truncated=one.astype(bool),
    )  # fmt: skip


def started(config: Config, placement: Placement) -> TrainGroup:
    group = TrainGroup(config, placement, Patience())
    group.start()
    return group


def trained(config: Config, placement: Placement) -> TrainGroup:
    """After one rollout, so that there are moments."""
    group = started(config, placement)
    group.load()
    batch = random_rollout(config.model.vocab_size)
    lengths = batch.total_lengths, batch.trajectories, batch.mask_sums
    steps = plan_steps(*lengths, dp_size=1, cp_size=1, vpp_group=1, batch=config.batch, per_token=False, costs=None)
    group.train(ray.put(batch), steps)
    return group


def after_a_death(
    clock: Clock, kind: str, group: TrainGroup, config: Config, placement: Placement, take_back: Callable[[TrainGroup], None]
) -> TrainGroup:
    """New ranks with the old state, as the driver makes them: how it misses the old ones is not measured."""
    os.kill(group.processes["trainer rank 0"].pid, signal.SIGKILL)
    with clock(f"{kind}: whole restart"):
        with clock(f"{kind}: old ranks end, new ones start"):
            group.stop_and_wait()
            group = started(config, placement)
        with clock(f"{kind}: state taken back"):
            take_back(group)
    return group


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bf16", type=Path, required=True)
    parser.add_argument("--save", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    cut = argv.index("--")
    args = parser.parse_args(argv[:cut])
    config, clock = config_of(args, argv[cut + 1 :]), Clock()
    ray.init("local", num_gpus=args.ranks, num_cpus=args.ranks + 4, include_dashboard=False, log_to_driver=False)
    placement = place(num_trainer=args.ranks, num_engine=0, colocate=False)
    store = SnapshotStore([slot.node_ip for slot in placement.trainer_slots], Patience(), peers=False)
    group = trained(config, placement)
    for number in range(args.repeats):
        with clock("snapshot: state kept"):
            sizes = group.snapshot_bytes()
            store.take(number, sizes, group.write_snapshot)
        with clock("disk: state kept"):
            group.save(number, {})
        group = after_a_death(
            clock, "snapshot", group, config, placement, lambda new, number=number: new.restore(store.bring_home(number))
        )
        resuming = config_of(args, argv[cut + 1 :])  # there is a checkpoint now
        group = after_a_death(clock, "disk", group, resuming, placement, lambda new: new.load())
    group.stop_and_wait()
    store.stop()
    ray.shutdown()
    print(f"{args.ranks} ranks, {sum(sizes) / 1e9:.3f} GB of state; medians of {args.repeats}, seconds")
    print(f"{'':38}{'snapshot':>10}{'disk':>10}{'ratio':>8}")
    for what in ("state kept", "old ranks end, new ones start", "state taken back", "whole restart"):
        memory, disk = clock.median(f"snapshot: {what}"), clock.median(f"disk: {what}")
        print(f"{what:38}{memory:>10.2f}{disk:>10.2f}{disk / memory:>8.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
