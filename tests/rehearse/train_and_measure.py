"""Child process: two rollouts of training on one CPU rank; prints the peak resident memory. Arguments: checkpoint folder, tokens."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from training import tiny  # noqa: E402

from slime.types import RolloutBatch  # noqa: E402

PAGE = os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The largest resident memory inside the block (the kernel's own high-water mark would count loading too)."""

    def __enter__(self) -> Peak:
        self.bytes, self._ended = 0, False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended:
            with open("/proc/self/statm") as statm:
                self.bytes = max(self.bytes, int(statm.read().split()[1]) * PAGE)
            time.sleep(0.002)

    def __exit__(self, *error: object) -> None:
        self._ended = True
        self._thread.join()


def batch(rollout_id: int, tokens: int) -> RolloutBatch:
    rng, n, response = np.random.default_rng(rollout_id), 2, tokens // 2 - 8
    return RolloutBatch(
        rollout_id=rollout_id,
        tokens=tuple(rng.integers(1, 90, tokens // 2) for _ in range(n)),
        response_lengths=np.full(n, response),
        loss_masks=tuple(np.ones(response, np.float32) for _ in range(n)),
        rewards=np.array([1.0, -1.0], np.float32),
        raw_rewards=np.array([1.0, -1.0], np.float32),
        groups=np.arange(n),
        trajectories=np.arange(n),
        sample_ids=np.arange(n),
        truncated=np.zeros(n, bool),
        rollout_log_probs=tuple(np.full(response, -4.0, np.float32) for _ in range(n)),
    )


def main(folder: str, tokens: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as store:
        dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{store}/store")
        sizes = {
            "max_tokens_per_gpu": tokens,
            "data_pad_size_multiplier": 64,
            "global_batch_size": 2,
            "rollout_batch_size": 2,
            "n_samples_per_prompt": 1,
        }
        config = tiny.config_for(Path(folder), **sizes)
        config.model.megatron.update(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
        trainer = tiny.start(config)
        with Peak() as peak:
            for rollout_id in range(2):
                rollout = batch(rollout_id, tokens)
                trainer.train(rollout, tiny.plans(rollout, config, 1))
        print(f"PEAK {peak.bytes}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
