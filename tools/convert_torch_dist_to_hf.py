#!/usr/bin/env python3
"""Megatron torch_dist checkpoint -> Hugging Face folder, in one process, one tensor at a time.

    python tools/convert_torch_dist_to_hf.py --input-dir CKPT/iter_0000020 --output-dir OUT --origin-hf-dir HF_DIR

--input-dir: an iter_NNNNNNN or release folder, or its parent (the tracker file then says which). --origin-hf-dir gives
config.json and the tokenizer; with --add-missing-from-origin-hf also the tensors that were not trained (the
multi-token-prediction layer). Without them the written config.json stops announcing that layer. Weights are written in the
origin's dtype, FP8 origins in bf16.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(argv: list[str]) -> int:
    options = _parse(argv)
    import torch

    from slime.model.coverage import check_files
    from slime.model.dist_reader import TorchDistReader, checkpoint_of
    from slime.model.hf_config import read_hf_config
    from slime.model.hf_io import SafetensorsReader, write_hf
    from slime.model.names import NameTable
    from slime.training.checkpoint import check_manifest

    begin = time.monotonic()
    hf = read_hf_config(options.origin_hf_dir)
    # Before anything of it is unpickled.
    print(check_manifest(checkpoint_of(options.input_dir)), flush=True)
    reader = TorchDistReader(options.input_dir, hf)
    output = Path(options.output_dir)
    if output.exists() and any(output.iterdir()) and not options.force:
        raise ValueError(f"{output} is not empty; pass --force to write into it")
    has_mtp = any(name.startswith("mtp.") for name in reader.names())
    origin = SafetensorsReader(options.origin_hf_dir) if options.add_missing_from_origin_hf else None
    in_origin = origin is not None and not check_files(NameTable.for_model(hf), origin).mtp_note
    keep_mtp = hf.num_mtp_layers > 0 and (has_mtp or in_origin)
    table = NameTable.for_model(hf, with_mtp=keep_mtp)
    dtype = torch.float32 if hf.is_float32 else torch.bfloat16
    size = write_hf(
        output, _tensors(table, reader, origin, dtype), origin=options.origin_hf_dir, table=table, mtp_kept=keep_mtp,
        max_bytes=options.chunk_size,
    )  # fmt: skip
    note = "" if keep_mtp or not hf.num_mtp_layers else "; without the multi-token-prediction layer, which was not trained"
    print(f"wrote {output}: {len(table.hf_names())} tensors, {size / 1e9:.3f} GB in {time.monotonic() - begin:.1f} s{note}")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--input-dir", required=True)
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--origin-hf-dir", required=True)
    parser.add_argument("-f", "--force", action="store_true")
    parser.add_argument("-a", "--add-missing-from-origin-hf", action="store_true")
    parser.add_argument("--chunk-size", type=int, default=5 * 2**30, help="largest size of one file in bytes")
    return parser.parse_args(argv)


def _tensors(table: object, reader: object, origin: object | None, dtype: object) -> Iterator[tuple[str, object]]:
    """Every HF tensor of the table, from the checkpoint or, where it has none, from the origin (de-quantised)."""
    from slime.model.layout import unmerge, unshard

    absent = []
    for entry in table.entries:
        if entry.name in reader:
            whole = unshard(entry, [reader.read(entry.name)])
            if tuple(whole.shape) != entry.shape:
                raise ValueError(f"{entry.name}: checkpoint has {list(whole.shape)}, config.json says {list(entry.shape)}")
            for tensor, piece in zip(entry.hf, unmerge(entry, whole), strict=True):
                yield tensor.name, piece if entry.float32 else piece.to(dtype)
        elif origin is not None:
            for tensor in entry.hf:
                yield tensor.name, origin.read(tensor, dtype)
        else:
            absent.append(entry.name)
    if absent:
        raise ValueError(
            f"the checkpoint lacks {len(absent)} tensors, e.g. {', '.join(absent[:5])}; pass "
            "--add-missing-from-origin-hf to take them from the origin"
        )


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as wrong:
        print(f"convert_torch_dist_to_hf: {wrong}", file=sys.stderr)
        sys.exit(1)
