#!/usr/bin/env python3
"""Hugging Face checkpoint (BF16 or block FP8) -> Megatron torch_dist, on as many ranks as the parallel flags say.

    source scripts/models/glm5.2-744B-A40B.sh
    torchrun --nproc-per-node 8 ... tools/convert_hf_to_torch_dist.py ${MODEL_ARGS[@]} \\
        --tensor-model-parallel-size 8 --pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 40 \\
        --expert-model-parallel-size 16 --expert-tensor-parallel-size 1 --hf-checkpoint HF_DIR --save TORCH_DIST_DIR

The layout need not be that of training: torch_dist loads under any. Weights keep the checkpoint's dtype (FP8 becomes bf16).
Writes TORCH_DIST_DIR/release and, last, TORCH_DIST_DIR/latest_checkpointed_iteration.txt. An interrupted conversion goes on
where it stopped when the same command runs again; until it is done, TORCH_DIST_DIR/.converting holds the finished tensors.
release/slime_manifest.json lists every tensor with its sha256: tools/inspect_checkpoint.py --verify compares them.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slime.config import load  # noqa: E402


def main(argv: list[str]) -> int:
    # Parsed before torch is imported: a typo answers in a second on every rank.
    config = load(argv, door="convert")
    rank, world_size = _place()
    folder = _target(config)

    import torch
    import torch.distributed as dist

    from slime.device import get_device
    from slime.model.build import build_model, padded_vocab_size
    from slime.model.conversion import fill, gather_records
    from slime.model.coverage import check_files
    from slime.model.dist_ckpt import DESCRIPTION, describe, sharded_model
    from slime.model.hf_config import read_hf_config
    from slime.model.hf_io import SafetensorsReader
    from slime.model.names import NameTable
    from slime.parallel import check_sizes, init_ranks
    from slime.training.checkpoint import begin_save

    begin = time.monotonic()
    check_sizes(config.parallel, world_size)
    hf = read_hf_config(config.checkpoint.hf_checkpoint)
    device = get_device()
    device.init_process(int(os.environ.get("LOCAL_RANK", "0")))
    joined = dist.is_initialized()
    ranks = init_ranks(config.parallel, rank=rank, world_size=world_size, device=device, seed=config.model.seed)
    say = partial(print, flush=True) if rank == 0 else (lambda *_, **__: None)
    table = NameTable.for_model(hf)
    reader = SafetensorsReader(config.checkpoint.hf_checkpoint)
    coverage = check_files(table, reader, needs_mtp=bool(config.model.mtp_num_layers))
    chunks = build_model(config, hf, ranks, device, dtype=torch.float32 if hf.is_float32 else torch.bfloat16, weights_only=True)
    say(f"{hf.model_type}: {table.num_parameters(mtp=False):,} parameters on {world_size} ranks ({device.reason})")
    if hf.num_mtp_layers and not coverage.mtp_note:
        size = f"{table.num_parameters(mtp=True):,} parameters"
        kept = "converted too" if config.model.mtp_num_layers else "left out; pass --mtp-num-layers 1 to train it"
        say(f"multi-token-prediction layer ({size}): {kept}")
    say(f"{reader.folder}: {coverage}")
    work = _open_work(folder.parent, reader.folder, argv, world_size, say)
    filled = fill(chunks, table, reader, ranks, work, padded_vocab=padded_vocab_size(config, hf), progress=_progress(rank))
    state = {
        **sharded_model(chunks, ranks),
        DESCRIPTION: describe(hf),
        "iteration": 1,
        "hf_checkpoint": str(config.checkpoint.hf_checkpoint),
    }
    tensors = gather_records(filled, table, ranks)
    begin_save(folder.parent, folder.name, state, ranks, tensors=tensors).finish()
    if rank == 0:
        shutil.rmtree(work)
        size = sum(file.stat().st_size for file in folder.iterdir())
        say(f"rank 0 read {filled.read} tensors, had {filled.restored} from before; {len(tensors)} tensors in the manifest")
        say(f"wrote {folder} ({size / 1e9:.3f} GB) in {time.monotonic() - begin:.1f} s")
    dist.barrier()
    if not joined:
        dist.destroy_process_group()
    return 0


def _open_work(save: Path, source: Path, argv: list[str], world_size: int, say: Callable[[str], None]) -> Path:
    """The folder of finished tensors, agreed on by all ranks."""
    import torch.distributed as dist

    from slime.model.conversion import open_work, plan_of

    opened: list = [None]
    if dist.get_rank() == 0:
        opened = [open_work(save, plan_of(source, argv, world_size))]
    dist.broadcast_object_list(opened, src=0)
    work, told = opened[0]
    if told:
        say(told)
    return work


def _place() -> tuple[int, int]:
    """(rank, world size) from torchrun or from SLURM; alone without either."""
    environment = os.environ
    if "RANK" in environment:
        return int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if "SLURM_PROCID" in environment and "MASTER_ADDR" in environment:
        return int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"])
    raise ValueError(
        f"start me with torchrun: {Path(sys.executable).with_name('torchrun')} --nproc-per-node N {sys.argv[0]} ..."
    )


def _target(config: object) -> Path:
    if not config.checkpoint.hf_checkpoint or not config.checkpoint.save:
        raise ValueError("--hf-checkpoint (what to read) and --save (where to write) are both needed")
    folder = Path(config.checkpoint.save) / "release"
    if Path(config.checkpoint.hf_checkpoint).resolve() in (folder.resolve(), folder.parent.resolve()):
        raise ValueError(f"--save {config.checkpoint.save} would overwrite --hf-checkpoint")
    return folder


def _progress(rank: int):
    """Rank 0 prints a line at every tenth of its tensors, with the rate."""
    if rank != 0:
        return None
    begin, shown = time.monotonic(), [0]

    def show(done: int, total: int) -> None:
        tenth = done * 10 // total
        if tenth > shown[0]:
            shown[0] = tenth
            print(f"  rank 0: {done}/{total} tensors, {time.monotonic() - begin:.1f} s", flush=True)

    return show


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as wrong:
        print(f"convert_hf_to_torch_dist: {wrong}", file=sys.stderr)
        sys.exit(1)
