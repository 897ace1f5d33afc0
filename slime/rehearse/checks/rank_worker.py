"""Build training ranks for real, on the meta device with a fake process group; say what each holds. Runs as a child process:

python3 -m slime.rehearse.checks.rank_worker FOLDER    reads FOLDER/job.pkl, writes FOLDER/ranks-0.json, ...

torch and megatron-core are imported once; the processes that share the ranks are forks. Each writes one JSON line per rank, and
one with the memory that it added.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import resource
import sys
import time
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from slime.compat.pickles import load_pickle
from slime.config import Config
from slime.model.hf_config import HfConfig
from slime.model.names import NameTable


@dataclass(frozen=True)
class Job:
    config: Config
    hf: HfConfig
    world: int
    ranks: tuple[int, ...]
    processes: int = 1


def main(folder: str) -> int:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with open(Path(folder) / "job.pkl", "rb") as stream:
        job: Job = load_pickle(stream, rooms=("slime",))
    _prepare(job)
    shared = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = []
    for number in range(1, job.processes):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _write(job, Path(folder), number, shared)
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(pid)
    _write(job, Path(folder), 0, 0)
    return max([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in children], default=0)


def _write(job: Job, folder: Path, number: int, shared: int) -> None:
    """Process `number`'s ranks. shared: KiB that it has from the process that forked it."""
    with open(folder / f"ranks-{number}.json", "w") as out:
        for rank in job.ranks[number :: job.processes]:
            out.write(json.dumps(build_rank(job, rank)) + "\n")
        added = max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - shared)
        out.write(json.dumps({"peak_bytes": added * 1024}) + "\n")


class _OneTable:
    """Stands for NameTable inside slime.model.build: one model, so its 59,000 names are laid out once and not once per rank."""

    def __init__(self, table: NameTable) -> None:
        self.for_model = lambda hf, with_mtp=False: table


def _prepare(job: Job) -> None:
    """The layer spec reads config.json of --hf-checkpoint, which may be on the cluster only: it gets the job's."""
    from slime.compat.megatron import prepare

    prepare()
    from megatron.core import parallel_state
    from megatron.core.models.common.language_module.language_module import LanguageModule

    from slime.model import build

    _leave_out_other_groups(parallel_state)

    # A copy of the embedding on the last stage (tied weights, MTP) gets the first stage's numbers while it is built, by way of
    # the device. Meta tensors have no numbers: the exchange alone is left out, the copy is built and counted.
    LanguageModule._is_in_embd_group = lambda self: False
    build.NameTable = _OneTable(build.trained_table(job.config.model, job.hf))
    if job.config.model.spec:
        module = importlib.import_module(job.config.model.spec[0])
        if hasattr(module, "read_hf_config"):
            module.read_hf_config = lambda folder: job.hf


def _leave_out_other_groups(parallel_state: object) -> None:
    """Of some 1,100 groups of 256 ranks a rank is in twenty; of the others torch makes NON_GROUP_MEMBER all the same, a
    thousand times for each rank. Which ranks make a group does not depend on the rank that asks.
    """
    import torch.distributed as dist

    create = parallel_state.create_group

    def create_own(ranks: list[int], *args: object, **kwargs: object) -> object:
        return create(ranks, *args, **kwargs) if dist.get_rank() in ranks else dist.GroupMember.NON_GROUP_MEMBER

    parallel_state.create_group = create_own
    generate = parallel_state.generate_masked_orthogonal_rank_groups
    known = lru_cache(lambda world, sizes, mask: generate(world, list(sizes), list(mask)))
    parallel_state.generate_masked_orthogonal_rank_groups = lambda world, sizes, mask: [
        list(group) for group in known(world, tuple(sizes), tuple(mask))
    ]


def build_rank(job: Job, rank: int) -> dict[str, object]:
    """Names and sizes of one rank's tensors, summed into what the proof needs; `error` instead when it cannot be built."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from slime.compat.megatron import prepare

    prepare()
    from megatron.core import parallel_state

    from slime.device.host import HostDevice
    from slime.model.build import build_model
    from slime.parallel import init_ranks
    from slime.parallel.ranks import make_groups

    started, sizes = time.monotonic(), job.config.parallel
    dist.init_process_group("fake", rank=rank, world_size=job.world, store=FakeStore())
    try:
        make_groups(sizes, create_gloo_process_groups=False)
        place = init_ranks(sizes, rank=rank, world_size=job.world, device=HostDevice())
        with torch.device("meta"):
            chunks = build_model(job.config, job.hf, place, HostDevice())
        return _described(chunks, job, place, time.monotonic() - started)
    except (ValueError, AssertionError, RuntimeError, KeyError, TypeError) as error:
        return {"rank": rank, "error": f"{type(error).__name__}: {error}"}
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _described(chunks: list, job: Job, place: object, seconds: float) -> dict[str, object]:
    """Sizes of the rank's tensors: `dense` name -> [numbers, cut by tensor parallelism?], `stacks` name -> [first expert, how
    many, numbers of one], `buffers` name -> numbers."""
    from slime.model import build
    from slime.model.local import check_shapes, local_tensors

    table = build.NameTable.for_model(job.hf)
    check_shapes(chunks, table, place, build.padded_vocab_size(job.config, job.hf))
    dense: dict[str, list[int]] = {}
    stacks: dict[str, list[int]] = {}
    buffers: dict[str, int] = {}
    experts = total = 0
    off_meta = []
    order = []
    for local in local_tensors(chunks, place, experts=False):
        numel = local.tensor.numel()
        if local.parameter is None:
            buffers[local.name] = numel
            continue
        total += numel
        if local.tensor.device.type != "meta":
            off_meta.append(local.name)
        if local.is_expert:
            count = local.tensor.shape[0]
            experts += numel
            stacks[local.name] = [place.ep_rank * count, count, numel // count]
            order.append([local.name, count])
        else:
            entry = table[local.name]
            dense[local.name] = [numel, int(entry.split != "none" and place.tp_size > 1)]
            order.append([local.name, 0])
    return {
        "rank": place.rank,
        "tp": place.tp_rank,
        "pp": place.pp_rank,
        "cp": place.cp_rank,
        "dp": place.dp_rank,
        "ep": place.ep_rank,
        "edp": place.edp_rank,
        "etp": place.etp_rank,
        "parameters": total,
        "experts": experts,
        "dense": dense,
        "stacks": stacks,
        "buffers": buffers,
        "off_meta": off_meta,
        "seconds": seconds,
        "order": order if place.tp_rank == place.cp_rank == place.dp_rank == 0 and place.ep_rank == 0 else [],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
