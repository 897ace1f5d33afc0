"""Build training ranks for real, on the meta device with a fake process group; say what each holds. Runs as a child process:

python3 -m slime.rehearse.checks.rank_worker PICKLED-JOB    -> one JSON line per rank, then one with the process's peak memory
"""

from __future__ import annotations

import importlib
import json
import logging
import resource
import sys
import time
import warnings
from dataclasses import dataclass

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


def main(path: str) -> int:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with open(path, "rb") as stream:
        job: Job = load_pickle(stream, rooms=("slime",))
    _prepare(job)
    for rank in job.ranks:
        sys.stdout.write(json.dumps(build_rank(job, rank)) + "\n")
        sys.stdout.flush()
    sys.stdout.write(json.dumps({"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}) + "\n")
    return 0


class _OneTable:
    """Stands for NameTable inside slime.model.build: one model, so its 59,000 names are laid out once and not once per rank."""

    def __init__(self, table: NameTable) -> None:
        self.for_model = lambda hf, with_mtp=False: table


def _prepare(job: Job) -> None:
    """The layer spec reads config.json of --hf-checkpoint, which may be on the cluster only: it gets the job's."""
    from slime.compat.megatron import prepare

    prepare()
    from megatron.core.models.common.language_module.language_module import LanguageModule

    from slime.model import build

    # A copy of the embedding on the last stage (tied weights, MTP) gets the first stage's numbers while it is built, by way of
    # the device. Meta tensors have no numbers: the exchange alone is left out, the copy is built and counted.
    LanguageModule._is_in_embd_group = lambda self: False
    build.NameTable = _OneTable(build.trained_table(job.config.model, job.hf))
    if job.config.model.spec:
        module = importlib.import_module(job.config.model.spec[0])
        if hasattr(module, "read_hf_config"):
            module.read_hf_config = lambda folder: job.hf


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
    from slime.parallel.ranks import expert_tp

    started, sizes = time.monotonic(), job.config.parallel
    dist.init_process_group("fake", rank=rank, world_size=job.world, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes.tensor_model_parallel_size,
            pipeline_model_parallel_size=sizes.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=sizes.virtual_pipeline_model_parallel_size,
            context_parallel_size=sizes.context_parallel_size,
            expert_model_parallel_size=sizes.expert_model_parallel_size,
            expert_tensor_parallel_size=expert_tp(sizes),
            create_gloo_process_groups=False,
        )
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
