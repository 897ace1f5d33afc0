"""Changes of a few words after which a refused run passes. Nothing is named that was not tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from slime.rehearse.advice.curves import node_variant
from slime.rehearse.advice.layouts import smaller_batches
from slime.rehearse.advice.variants import Bench, Variant
from slime.rehearse.assess import Assessment, num_samples
from slime.rehearse.findings import Findings
from slime.rehearse.reading import Reading

FRACTIONS = (-0.05, -0.1, -0.15, -0.2, 0.05, 0.1, 0.15)
"""Steps of --sglang-mem-fraction-static, the smallest change first."""
DEFAULT_FRACTION = 0.8


@dataclass(frozen=True)
class Remedy:
    what: str
    variant: Variant


class Accepts:
    """Whether words behind the run's flags bring nothing wrong that is not wrong already. whole: memory is judged, too."""

    def __init__(self, bench: Bench, findings: Findings, *, whole: bool):
        self._bench, self._whole = bench, whole
        self._wrong = {finding.what for finding in findings.of("violation")}

    def __call__(self, words: str) -> bool:
        variant = Variant(tuple(words.split()))
        if self._whole:
            return set(self._bench.tried(variant).wrong) <= self._wrong
        return {finding.what for finding in self._bench.read(variant)[1].of("violation")} <= self._wrong


def remedies(bench: Bench, now: Assessment, splits: list[str]) -> tuple[Remedy, ...]:
    """splits: words that cut the layers otherwise. Of each kind the first that passes."""
    found = []
    for what, variants in _kinds(bench, now, splits):
        passing = next((variant for variant in variants if bench.tried(variant).fits), None)
        if passing is not None:
            found.append(Remedy(what, passing))
    return tuple(found)


def _kinds(bench: Bench, now: Assessment, splits: list[str]) -> Iterator[tuple[str, Iterator[Variant]]]:
    reading, config = now.reading, now.reading.config
    yield "other stages", (Variant(tuple(words.split())) for words in splits)
    yield "smaller micro-batches", iter(smaller_batches(reading)[1:])
    if not config.optimizer.optimizer_cpu_offload or config.optimizer.optimizer_offload_fraction < 1:
        words = ("--optimizer-cpu-offload", "--optimizer-offload-fraction", "1.0")
        yield "the optimizer in main memory", iter([Variant(words)])
    if config.upkeep.snapshot_interval is not None:
        yield "fewer snapshots", (Variant(tuple(words.split())) for words in ("--snapshot-versions 1", "--no-snapshot-peer"))
    words = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
    yield "every layer recomputed", iter([Variant(words)])
    yield "all samples of a rollout in one step", iter([Variant(("--global-batch-size", str(num_samples(config))))])
    yield "another share of the GPU for the engines", _fractions(reading)
    nodes = config.cluster.actor_num_nodes
    more = (node_variant(now, count) for count in (nodes * 2, nodes * 4, nodes * 8))
    yield "more nodes", (variant for variant in more if variant is not None and config.cluster.colocate)


def _fractions(reading: Reading) -> Iterator[Variant]:
    """Where the flags say it; a group's own share stays."""
    said = str(reading.config.engine.sglang.get("mem_fraction_static", DEFAULT_FRACTION))
    try:
        now = float(said)
    except ValueError:
        return
    for step in FRACTIONS:
        if 0.1 < now + step < 0.95:
            yield Variant(("--sglang-mem-fraction-static", f"{now + step:.2f}"))
