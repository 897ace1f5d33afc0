"""How many parameters one rank of a pipeline stage holds, by how they are cut. Pure arithmetic on the weight-name table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slime.config.stages import Chunk
from slime.model.names import Entry, NameTable
from slime.model.placement import Grid, has_embedding_copy
from slime.rehearse.model.kinds import kinds


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
    has_draft: bool = False
    """A trained multi-token-prediction layer."""

    @property
    def parameters(self) -> int:
        return self.dense + self.experts

    @property
    def stored_inputs(self) -> int:
        """Tensors [rows, hidden] that full recomputation keeps; the MTP layer has two: hidden states and embeddings."""
        return len(self.layers) + 2 * self.has_draft

    @property
    def trained(self) -> int:
        return self.parameters - self.frozen


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


@dataclass(frozen=True)
class StageParts:
    """The tensors of one stage, alike ones counted: what `stage_shares` needs of a table, whatever the grid."""

    layers: tuple[int, ...]
    computing: int
    kinds: Mapping[Entry, int]
    """One entry of each size and cut -> how many there are."""
    has_draft: bool = False


def stage_parts(table: NameTable, chunks: Sequence[Chunk], pp: int, *, mtp: bool = False) -> list[StageParts]:
    """Trained and frozen parameters; expert biases are buffers and not counted. mtp: with the MTP layer, on the last stage."""
    owner = {layer: chunk.pp_rank for chunk in chunks for layer in chunk.layers}
    last = chunks[-1].pp_rank
    counts: list[Counter] = [Counter() for _ in range(pp)]
    first: dict[tuple, Entry] = {}
    computing: list[set[int]] = [set() for _ in range(pp)]
    for entry, number in kinds(table):
        if entry.float32 or (entry.is_mtp and not mtp):
            continue
        layer = entry.layer
        stage = owner[layer] if layer is not None else (0 if entry.name.startswith("embedding.") else last)
        frozen = is_indexer(entry)
        kind = (entry.shape, entry.split, entry.expert is not None, frozen)
        first.setdefault(kind, entry)
        counts[stage][kind] += number
        if frozen:
            computing[stage].add(-1 if layer is None else layer)  # the MTP layer runs an indexer of its own
    if has_embedding_copy(table, pp, mtp=mtp):
        embedding = next(entry for entry in table.entries if entry.name.startswith("embedding."))
        counts[last][embedding.shape, embedding.split, False, False] += 1
    return [
        StageParts(
            tuple(layer for layer, owning in sorted(owner.items()) if owning == stage),
            len(computing[stage]),
            {first[kind]: count for kind, count in counts[stage].items()},
            mtp and stage == last,
        )
        for stage in range(pp)
    ]


def shares_of(parts: Sequence[StageParts], grid: Grid, *, padded_vocab: int | None = None) -> list[StageShare]:
    """One share per pipeline rank."""
    shares = []
    for stage, part in enumerate(parts):
        dense = experts = frozen = 0
        for entry, count in part.kinds.items():
            numel = local_numel(entry, grid, padded_vocab=padded_vocab) * count
            if entry.expert is not None:
                experts += numel
            else:
                dense += numel
                frozen += numel if is_indexer(entry) else 0
        ends = stage == 0, stage == len(parts) - 1
        shares.append(StageShare(stage, part.layers, part.computing, dense, experts // grid.ep, frozen, *ends, part.has_draft))
    return shares


def stage_shares(
    table: NameTable, chunks: Sequence[Chunk], grid: Grid, *, padded_vocab: int | None = None, mtp: bool = False
) -> list[StageShare]:
    """One share per pipeline rank, trained and frozen parameters apart."""
    return shares_of(stage_parts(table, chunks, grid.pp, mtp=mtp), grid, padded_vocab=padded_vocab)


_INDEXER = (
    "self_attention.wq_b.weight",
    "self_attention.wk.weight",
    "self_attention.k_norm.weight",
    "self_attention.k_norm.bias",
    "self_attention.weights_proj.weight",
)


def is_indexer(entry: Entry) -> bool:
    return entry.name.endswith(_INDEXER)
