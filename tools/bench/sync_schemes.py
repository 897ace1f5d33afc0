"""Other ways to send GLM-5.2's weights, as sends for the model of links: what the plan is compared with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slime.model.hf_config import HfConfig
from slime.model.names import NameTable
from slime.model.placement import Places
from slime.weights.lanes import Trainer
from slime.weights.serving import Receiver, expert_ranks
from slime.weights.wire import Format
from tools.bench.link_model import Send


@dataclass(frozen=True)
class Sizes:
    """Bytes on the wire of every (stage, layer, expert); layer and expert None for what has none."""

    nbytes: dict[tuple[int, int | None, int | None], int]

    @staticmethod
    def of(table: NameTable, hf: HfConfig, trainer: Trainer) -> Sizes:
        form = Format.of(hf)
        places = Places(table, trainer.grid, trainer.chunks, trainer.mtp, trainer.padded_vocab)
        found: dict[tuple[int, int | None, int | None], int] = defaultdict(int)
        for entry in table.entries:
            if entry.is_mtp:
                continue
            for tensor in entry.hf:
                found[places.stages(entry)[0], entry.layer, entry.expert] += form.nbytes(entry, tensor)
        return Sizes(dict(found))


def _ring(number: int, source: int, num_gpus: int, nbytes: int) -> Iterator[Send]:
    """A broadcast in small chunks: each GPU passes on to the next what it gets, all at once."""
    for step in range(num_gpus - 1):
        yield number, 0, (source + step) % num_gpus, (source + step + 1) % num_gpus, nbytes


def broadcast(sizes: Sizes, trainer: Trainer) -> Iterator[Send]:
    """Every source sends all it has to all GPUs, one source after another."""
    grid = trainer.grid
    experts_per_rank = len({expert for _, _, expert in sizes.nbytes} - {None}) // grid.ep
    of_source: dict[int, int] = defaultdict(int)
    for (stage, _, expert), nbytes in sizes.nbytes.items():
        shard = 0 if expert is None else expert // experts_per_rank
        of_source[stage * grid.ranks_per_stage + shard * grid.etp] += nbytes
    for number, (source, nbytes) in enumerate(sorted(of_source.items())):
        yield from _ring(number, source, grid.world, nbytes)


def layer_by_layer(sizes: Sizes, trainer: Trainer, receivers: Sequence[Receiver]) -> Iterator[Send]:
    """One layer at a time: its owners send each expert straight to the ranks that serve it, one rank the rest to all GPUs."""
    grid = trainer.grid
    experts = len({expert for _, _, expert in sizes.nbytes} - {None})
    layers = sorted({layer for _, layer, _ in sizes.nbytes}, key=lambda layer: -1 if layer is None else layer)
    for number, layer in enumerate(layers):
        for (stage, its_layer, expert), nbytes in sizes.nbytes.items():
            if its_layer != layer:
                continue
            first = stage * grid.ranks_per_stage
            if expert is None:
                yield from _ring(number, first, grid.world, nbytes)
                continue
            owner = first + expert // (experts // grid.ep) * grid.etp
            for receiver in receivers:
                for rank in expert_ranks(expert, num_experts=experts, tp=receiver.tp, ep=receiver.ep):
                    if receiver.gpus[rank] != owner:
                        yield number, 0, owner, receiver.gpus[rank], nbytes
