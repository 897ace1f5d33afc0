"""The checkpoint's index and its shards: every tensor by name, every file whole, one number format."""

from __future__ import annotations

import json
from pathlib import Path

from slime.model.coverage import mtp_is_absent, unnamed_mtp
from slime.model.hf_headers import INDEX, check_start
from slime.model.names import NameTable
from slime.rehearse.findings import Findings
from slime.rehearse.model.weight_map import checkpoint_bytes
from slime.rehearse.reading import Reading
from slime.weights.wire import Format

_SHOWN = 4


def check_index(reading: Reading, findings: Findings, given: str | None) -> None:
    """model.safetensors.index.json against the weight-name table: missing, unexpected, total size; then its files."""
    folder = reading.config.checkpoint.hf_checkpoint
    file = Path(given) if given else Path(folder or ".") / INDEX
    if reading.table is None:
        return
    if not file.is_file():
        if given:
            findings.violation(
                "weights",
                f"--checkpoint-index {given} {'is no file' if file.exists() else 'does not exist'}",
                "",
                f"name the checkpoint's {INDEX}",
            )
        elif folder:
            findings.unchecked("weights", f"the checkpoint's index {file} is not on this machine")
        return
    index = _read(file, findings)
    if index is None:
        return
    names, total = index
    _check_names(reading, findings, file, set(names), total)
    if not given:
        _check_shards(sorted({file.parent / name for name in names.values()}), file, findings)


def _read(file: Path, findings: Findings) -> tuple[dict[str, str], object] | None:
    """(tensor -> file, the announced bytes); None after a violation."""
    try:
        index = json.loads(file.read_bytes())
        listed, metadata = index["weight_map"], index.get("metadata")
        if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
            raise ValueError("weight_map is no mapping of tensors to files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        findings.violation("weights", f"{file} is no safetensors index ({error})", "", "download it again")
        return None
    return listed, metadata.get("total_size") if isinstance(metadata, dict) else None


def _check_names(reading: Reading, findings: Findings, file: Path, present: set[str], total: object) -> None:
    table = reading.table
    if mtp_is_absent(table, present) and not reading.config.model.mtp_num_layers:
        findings.ok("weights", f"{file} holds no multi-token-prediction layer; nothing here trains one")
        table = NameTable.for_model(reading.hf, with_mtp=False)
    expected = set(table.hf_names())
    scales = {tensor.scale_name for tensor in table.hf_tensors() if tensor.fp8}
    fp8 = bool(present & scales)
    missing = sorted((expected | (scales if fp8 else set())) - present)
    unexpected = sorted(present - expected - scales - set(table.duplicates) - unnamed_mtp(table, present))
    for names, kind, fix in (
        (missing, "missing from", "download the checkpoint again; a shard is incomplete"),
        (unexpected, "unexpected in", "is config.json of the same model? remove stray files"),
    ):
        if names:
            findings.violation(
                "weights",
                f"{len(names)} tensors are {kind} {file}",
                ", ".join(names[:6]) + (" ..." if len(names) > 6 else ""),
                fix,
            )
    block = Format.of(reading.hf).block
    if fp8 != (block is not None) and reading.basis == "file":
        findings.violation(
            "weights",
            f"{file} has {'scales of FP8 blocks' if fp8 else 'no scales'}, config.json "
            f"{'has a quantization_config' if block is not None else 'no quantization_config'}: engines would take the weights "
            "for another format",
            "",
            "take config.json and shards of one checkpoint",
        )
    if missing or unexpected:
        return
    findings.ok(
        "weights",
        f"{file}: {len(present):,} tensors, each in the table exactly once",
        f"{total:,} bytes" if isinstance(total, int) else "",
    )
    wanted = checkpoint_bytes(table, fp8=fp8)
    if isinstance(total, int) and not present & set(table.duplicates) and total != wanted:
        findings.violation(
            "weights",
            f"{file} announces {total:,} bytes, the table's shapes and types give {wanted:,}",
            "",
            "are the tensors bf16 (or block FP8)?",
        )


def _check_shards(files: list[Path], index: Path, findings: Findings) -> None:
    """Every file is there and begins as a safetensors file does, not empty, cut short or a pointer."""
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        findings.violation(
            "weights",
            f"{len(absent)} of {len(files)} safetensors files that {index} names are not there",
            ", ".join(absent[:_SHOWN]),
            "download them",
        )
    torn = []
    for path in files:
        try:
            if path.is_file():
                check_start(path)
        except (ValueError, OSError) as error:
            torn.append(str(error))
    if torn:
        findings.violation(
            "weights",
            f"{len(torn)} of {len(files)} safetensors files of {index.parent} are not whole",
            "; ".join(torn[:_SHOWN]),
            "download them again (git lfs pull, where they are pointers)",
        )
