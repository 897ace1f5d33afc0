"""One rank of a parity run in a process of its own, so that it may use CUDA where the test process must stay able to fork.

    python gpu_rank.py JOB.pt RANK          -> RESULT-RANK.pt beside it

JOB: folder of the checkpoint, world, store file, micro-batches, choices to replay (or None to record), layouts. With
CUDA_VISIBLE_DEVICES="" it runs on the CPU over gloo, else on its own GPU over NCCL.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from model.parity import run_step  # noqa: E402
from model.replay import Choices  # noqa: E402

from slime.device import get_device  # noqa: E402


def main(job_path: str, rank: int) -> None:
    job = torch.load(job_path, weights_only=False)
    device = get_device()
    device.init_process(rank)
    store = dist.FileStore(job["store"], job["world"])
    dist.init_process_group(device.backend, store=store, rank=rank, world_size=job["world"])
    results = {}
    for name, layout in job["layouts"].items():
        choices = job["choices"] or Choices()
        result = run_step(rank, job["world"], job["folder"], job["micro_batches"], choices, **layout)
        results[name] = (result, choices.experts)
    torch.save(results, f"{Path(job_path).parent}/RESULT-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
