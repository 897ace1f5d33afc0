"""The model, rank by rank: each is built for real (layer spec, megatron-core, meta device) and the parts must add up exactly.

Building needs torch and megatron-core and happens in child processes, so that their memory and patches stay theirs.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TextIO

from slime.model.names import NameTable
from slime.model.order import model_order
from slime.model.placement import has_embedding_copy
from slime.rehearse.findings import Findings
from slime.rehearse.model.shares import StageShare
from slime.rehearse.model.weight_map import WeightMap
from slime.rehearse.reading import Reading


@dataclass(frozen=True)
class BuiltRanks:
    """What all ranks together hold."""

    num_ranks: int
    unique: int
    """Parameters of the whole model, each counted once over all ranks."""
    per_rank: tuple[int, ...]
    seconds: float
    peak_bytes: int
    """Of all child processes together."""
    errors: tuple[str, ...] = ()
    orders: dict[int, list] = field(default_factory=dict)
    """Stage -> [parameter name, experts in the stack] in the model's own order."""
    held: dict[int, dict[str, int]] = field(default_factory=dict)
    """Rank -> global Megatron name -> numbers of it there, experts one by one."""


def build_ranks(
    reading: Reading, *, ranks: Sequence[int] | None = None, processes: int = 2, timeout: float = 600.0
) -> BuiltRanks:
    """Build `ranks` (all unless said) of the layout. Raises ValueError when a child process ends without an answer."""
    world = reading.grid.world
    wanted = list(range(world)) if ranks is None else list(ranks)
    started = time.monotonic()
    # Without flags' checkpoint on this machine the parameter type would be the host's; bytes are not the matter here.
    from slime.rehearse.checks.rank_worker import Job

    job = Job(replace(reading.config, notes=()), reading.hf, world, tuple(wanted), min(processes, len(wanted)))
    with tempfile.TemporaryDirectory(prefix="slime-rehearse-") as name:
        folder = Path(name)
        (folder / "job.pkl").write_bytes(pickle.dumps(job))
        with open(folder / "err", "w") as err:
            child = _start(folder, err)
        try:
            child.wait(timeout=timeout)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # its forks too: it leads a group of its own
                child.wait()
        found = [_answer(folder / f"ranks-{number}.json") for number in range(job.processes)]
        if child.returncode != 0 or not all(found):
            raise ValueError(f"building ranks ended with status {child.returncode}:\n{(folder / 'err').read_text()[-2000:]}")
    peak = sum(answer.pop()["peak_bytes"] for answer in found)
    return _summed([row for answer in found for row in answer], len(wanted), time.monotonic() - started, peak)


def _start(folder: Path, err: TextIO) -> subprocess.Popen:
    root = str(Path(__file__).resolve().parents[3])
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "slime.rehearse.checks.rank_worker", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=err,
        env=env,
        start_new_session=True,
    )


def _answer(path: Path) -> list[dict]:
    """One row for each rank, then the memory; none of a process that did not come to its end."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return rows if rows and "peak_bytes" in rows[-1] else []


def _summed(rows: list[dict], num_ranks: int, seconds: float, peak: int) -> BuiltRanks:
    """Each tensor once: a replicated one from tensor-parallel rank 0, shards from all, experts from every expert shard."""
    errors = [f"rank {row['rank']}: {row['error']}" for row in rows if "error" in row]
    built = sorted((row for row in rows if "error" not in row), key=lambda row: row["rank"])
    unique = 0
    orders: dict[int, list] = {}
    for row in built:
        if row["off_meta"]:
            errors.append(f"rank {row['rank']}: {row['off_meta'][0]} was allocated for real")
        if row["cp"] == 0 and row["dp"] == 0:
            unique += sum(numel for numel, cut in row["dense"].values() if cut or row["tp"] == 0)
        if row["edp"] == 0:
            unique += row["experts"]
        if row["order"]:
            orders.setdefault(row["pp"], row["order"])
    held = {row["rank"]: _held(row) for row in built}
    return BuiltRanks(num_ranks, unique, tuple(row["parameters"] for row in built), seconds, peak, tuple(errors), orders, held)


def _held(row: dict) -> dict[str, int]:
    stacked = {
        f"{name}{first + number}": numel for name, (first, count, numel) in row["stacks"].items() for number in range(count)
    }
    return {name: numel for name, (numel, _) in row["dense"].items()} | row["buffers"] | stacked


def check_ranks(
    reading: Reading, shares: Sequence[StageShare], findings: Findings, *, build: Callable[[Reading], BuiltRanks] = build_ranks
) -> BuiltRanks | None:
    """Build all ranks and compare their sums with the weight table and with the arithmetic of the other parts."""
    try:
        built = build(reading)
    except (ValueError, subprocess.TimeoutExpired, ImportError) as error:
        findings.violation(
            "ranks",
            f"the ranks could not be built: {error}",
            "",
            "run `python3 -m slime.rehearse` in the environment of scripts/setup.sh",
        )
        return None
    for error in sorted(set(text.partition(": ")[2] for text in built.errors))[:8]:
        findings.violation(
            "ranks", error, f"{sum(text.endswith(error) for text in built.errors)} ranks", "the message says what to change"
        )
    if built.errors:
        return built
    wanted = reading.num_parameters
    copied = has_embedding_copy(reading.table, reading.grid.pp, mtp=reading.trains_mtp)
    padding = (reading.config.model.padded_vocab_size or reading.hf["vocab_size"]) - reading.hf["vocab_size"]
    copies = copied + (1 if reading.table.aliases else 2)
    expected = (
        wanted
        + padding * reading.hf["hidden_size"] * copies
        + (reading.hf["vocab_size"] * reading.hf["hidden_size"] if copied else 0)
    )
    findings.check(
        built.unique == expected,
        "ranks",
        f"all {built.num_ranks} ranks built; their parameters add up to the checkpoint's {wanted:,}",
        values=f"{built.seconds:.1f} s, {built.peak_bytes / 2**30:.2f} GiB"
        + (f", {padding} padded vocabulary rows" if padding else ""),
        wrong=f"the ranks hold {built.unique:,} parameters, the checkpoint has {expected:,}",
        fix="this is a defect of the layer spec or the weight table; please report it",
    )
    per_stage = reading.grid.ranks_per_stage
    off = [
        rank
        for rank, count in enumerate(built.per_rank)
        if len(built.per_rank) == reading.grid.world and count != shares[rank // per_stage].parameters
    ]
    findings.check(
        not off,
        "ranks",
        "each rank holds what the memory model counts",
        wrong=f"{len(off)} ranks hold another number of parameters than the memory model counts",
        values=f"rank {off[0]}: {built.per_rank[off[0]]:,} built"
        if off
        else f"{min(built.per_rank):,} to {max(built.per_rank):,} parameters",
        fix="report it with this output",
    )
    return built


def check_order(reading: Reading, built: BuiltRanks | None, findings: Findings) -> None:
    """The weight map assumes an order of dense parameters within a stage; the built ranks have one."""
    if built is None or built.errors:
        return
    entries, aliases = {entry.name: entry for entry in reading.table.entries}, reading.table.aliases
    for stage, order in built.orders.items():
        dense = [name for name, experts in order if not experts and name not in aliases]
        assumed = sorted(dense, key=lambda name: model_order(entries[name]))
        if dense != assumed:
            at = next(number for number, pair in enumerate(zip(dense, assumed, strict=True)) if pair[0] != pair[1])
            findings.violation(
                "weights",
                f"stage {stage} registers {dense[at]} where the weight map has {assumed[at]}",
                f"parameter {at} of {len(dense)}",
                "this is a defect of the weight map; please report it",
            )
            return
    findings.ok(
        "weights", "the built ranks register their parameters in the order of the weight map", f"{len(built.orders)} stages"
    )


def check_held(reading: Reading, built: BuiltRanks | None, weights: WeightMap, findings: Findings) -> None:
    """The weight map says which ranks hold which part of every tensor; the built ranks must hold exactly that."""
    if built is None or built.errors:
        return
    wrong = list(differences(reading.table, built, weights))
    tensors = sum(len(names) for names in built.held.values())
    findings.check(
        not wrong,
        "weights",
        "every built rank holds the tensors that the weight map has there, and no others",
        values=f"{tensors:,} on {len(built.held):,} ranks",
        wrong=f"built ranks hold other tensors than the weight map has there, {len(wrong)} times",
        fix=f"this is a defect of the weight map; please report it ({'; '.join(wrong[:3])})",
    )


def differences(table: NameTable, built: BuiltRanks, weights: WeightMap) -> Iterator[str]:
    """Where a built rank and the weight map disagree about a tensor; padded vocabulary rows are the rank's own."""
    expected: dict[int, Counter[str]] = {rank: Counter() for rank in built.held}
    for row in weights.rows:
        name, numel = table.by_hf(row.name).name, prod(row.shape)
        for part in row.holders.parts:
            for rank in part.ranks:
                if rank in expected:
                    expected[rank][name] += numel // row.length * (part.stop - part.start)
    for rank, names in built.held.items():
        found = {table.aliases.get(name, name): numel for name, numel in names.items()}
        for name in sorted(found.keys() | expected[rank].keys()):
            has, should = found.get(name, 0), expected[rank][name]
            padded = table[name].split == "vocab" and has > should > 0
            if has != should and not padded:
                yield f"rank {rank} holds {has:,} numbers of {name}, the weight map has {should:,} there"
