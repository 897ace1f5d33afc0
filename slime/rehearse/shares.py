"""What one rank of a pipeline stage holds: numbers of parameters, by how they are cut. Pure arithmetic on the weight-name table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slime.model.names import Entry, NameTable
from slime.rehearse.flops import layer_of
from slime.rehearse.stages import Chunk


@dataclass(frozen=True)
class Grid:
    """Sizes of the training ranks. Axes from fastest: tp, cp, ep, dp, pp (megatron-core's default order)."""

    world: int
    tp: int
    pp: int
    cp: int
    ep: int
    etp: int

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def edp(self) -> int:
        """Replicas of an expert."""
        return self.world // (self.etp * self.ep * self.pp)

    @property
    def ranks_per_stage(self) -> int:
        return self.world // self.pp

    def place(self, rank: int) -> dict[str, int]:
        """Coordinates of a rank, dense and expert ones."""
        inside, stage = rank % self.ranks_per_stage, rank // self.ranks_per_stage
        return {
            "tp": inside % self.tp,
            "cp": inside // self.tp % self.cp,
            "dp": inside // (self.tp * self.cp),
            "pp": stage,
            "etp": inside % self.etp,
            "ep": inside // self.etp % self.ep,
            "edp": inside // (self.etp * self.ep),
        }


@dataclass(frozen=True)
class StageShare:
    """Parameters of every rank of one stage."""

    stage: int
    layers: tuple[int, ...]
    computing: int
    """Layers among them that run an indexer."""
    dense: int
    """Everything but routed experts, after tensor parallelism."""
    experts: int
    """Routed experts of this rank."""
    frozen: int
    """Of `dense`: never trained (the indexer), so without gradient and optimizer state."""
    has_embedding: bool
    has_head: bool

    @property
    def parameters(self) -> int:
        return self.dense + self.experts

    @property
    def trained(self) -> int:
        return self.parameters - self.frozen


def stage_of(entry: Entry, chunks: Sequence[Chunk]) -> int:
    """Pipeline rank that holds an entry of the main model."""
    layer = layer_of(entry)
    if layer is None:
        return 0 if entry.name.startswith("embedding.") else chunks[-1].pp_rank
    return next(chunk.pp_rank for chunk in chunks if layer in chunk.layers)


def local_numel(entry: Entry, grid: Grid, *, padded_vocab: int | None = None) -> int:
    """Numbers of one entry on one rank that holds a part of it."""
    total = 1
    for size in entry.shape:
        total *= size
    if entry.split == "vocab" and padded_vocab:
        total = total // entry.shape[0] * padded_vocab
    if entry.split == "none":
        return total
    return total // (grid.etp if entry.expert is not None else grid.tp)


def stage_shares(table: NameTable, chunks: Sequence[Chunk], grid: Grid, *, padded_vocab: int | None = None) -> list[StageShare]:
    """One share per pipeline rank, trained and frozen parameters apart (expert biases are buffers and not counted)."""
    by_layer = {layer: chunk.pp_rank for chunk in chunks for layer in chunk.layers}
    last = chunks[-1].pp_rank
    dense, experts, frozen = ([0] * grid.pp for _ in range(3))
    computing: list[set[int]] = [set() for _ in range(grid.pp)]
    for entry in table.entries:
        if entry.float32 or entry.name.startswith("mtp."):
            continue
        layer = layer_of(entry)
        stage = by_layer[layer] if layer is not None else (0 if entry.name.startswith("embedding.") else last)
        numel = local_numel(entry, grid, padded_vocab=padded_vocab)
        if entry.expert is not None:
            experts[stage] += numel
            continue
        dense[stage] += numel
        if is_indexer(entry):
            frozen[stage] += numel
            computing[stage].add(layer)
    if table.aliases and grid.pp > 1:
        # Tied weights: the last stage has a copy of the embedding.
        dense[last] += next(
            local_numel(e, grid, padded_vocab=padded_vocab) for e in table.entries if e.name.startswith("embedding.")
        )
    return [
        StageShare(
            stage=stage,
            layers=tuple(layer for layer, owner in sorted(by_layer.items()) if owner == stage),
            computing=len(computing[stage]),
            dense=dense[stage],
            experts=experts[stage] // grid.ep,
            frozen=frozen[stage],
            has_embedding=stage == 0,
            has_head=stage == last,
        )
        for stage in range(grid.pp)
    ]


_INDEXER = (
    "self_attention.wq_b.weight",
    "self_attention.wk.weight",
    "self_attention.k_norm.weight",
    "self_attention.k_norm.bias",
    "self_attention.weights_proj.weight",
)


def is_indexer(entry: Entry) -> bool:
    return entry.name.endswith(_INDEXER)
