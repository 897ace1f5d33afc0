"""Which cuts of the layers are legal for index sharing, and which of them are balanced. Pure arithmetic; layers are 0-based."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slime.config.stages import Chunk, Cut, cut_layers, legal_splits, wrong_starts
from slime.model.hf_config import HfConfig


@dataclass(frozen=True)
class Split:
    """A legal cut."""

    sizes: tuple[int, ...]
    """Layers as flags name them: of each stage, of a list under virtual stages of each chunk."""
    costs: tuple[float, ...]
    """Training FLOPs per token of each stage, all its chunks together."""

    @property
    def balance(self) -> float:
        return balance(self.costs)

    @property
    def stage_layers(self) -> tuple[tuple[int, ...], ...]:
        """Layers of each stage's chunks, as far as `sizes` tells them apart."""
        return tuple(self.sizes[stage :: len(self.costs)] for stage in range(len(self.costs)))

    @property
    def first_last(self) -> tuple[int, int]:
        return self.sizes[0], self.sizes[-1]


def balance(costs: Sequence[float]) -> float:
    """Share of the pipeline's time in which an average stage works, bubbles aside: mean cost / greatest cost."""
    return sum(costs) / len(costs) / max(costs)


def stage_costs(sizes: Sequence[int], layer_costs: Sequence[float], head_cost: float) -> list[float]:
    costs, start = [], 0
    for size in sizes:
        costs.append(sum(layer_costs[start : start + size]))
        start += size
    costs[-1] += head_cost
    return costs


def rank_costs(chunks: Sequence[Chunk], layer_costs: Sequence[float], head_cost: float) -> list[float]:
    """Cost of each pipeline rank, whatever chunks it has."""
    costs = [0.0] * (1 + max(chunk.pp_rank for chunk in chunks))
    for chunk in chunks:
        costs[chunk.pp_rank] += sum(layer_costs[layer] for layer in chunk.layers)
    costs[chunks[-1].pp_rank] += head_cost
    return costs


def legal_first_last(
    hf: HfConfig, pp_size: int, layer_costs: Sequence[float], head_cost: float, *, any_start: bool = False, vpp: int = 1
) -> list[Split]:
    """Every (first, last) pair for which stages divide and start on computing layers, best balanced first.

    any_start: indices travel between stages (--dsa-send-indices), so that every layer may begin one. vpp: chunks of a stage,
    which interleave, so that each must start legally; `sizes` are then the layers of whole stages.
    """
    found = []
    for sizes in legal_splits(hf, pp_size, any_start=any_start or vpp > 1):
        if any(size % vpp for size in sizes):
            continue
        chunks = cut_layers(Cut(hf.num_layers, pp_size, vpp, sizes[0], sizes[-1]))
        if any_start or not wrong_starts(hf, chunks):
            found.append(Split(sizes, tuple(rank_costs(chunks, layer_costs, head_cost))))
    return sorted(found, key=lambda split: (-split.balance, split.sizes))


def best_list(
    hf: HfConfig, pp_size: int, layer_costs: Sequence[float], head_cost: float, *, any_start: bool = False
) -> Split | None:
    """The per-stage list whose slowest stage is fastest; of several the one with the least sum of squares. None: none is legal.

    Dynamic programming over legal cut positions: best[stage][position] = (greatest cost, sum of squares) of the stages so far.
    """
    num_layers = hf.num_layers
    cuts = [layer for layer in range(1, num_layers) if any_start or not hf.has_indexer or hf.runs_indexer(layer)]
    prefix = [0.0]
    for cost in layer_costs:
        prefix.append(prefix[-1] + cost)
    slowest = _least_slowest(pp_size, cuts, prefix, head_cost, num_layers)
    if slowest is None:
        return None
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(pp_size):
        ends = [num_layers] if stage == pp_size - 1 else cuts
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start, (squares, sizes) in best.items():
            for end in ends:
                cost = prefix[end] - prefix[start] + (head_cost if end == num_layers else 0.0) if end > start else None
                if cost is None or cost > slowest * (1 + 1e-12):
                    continue
                candidate = (squares + cost * cost, (*sizes, end - start))
                if end not in following or candidate < following[end]:
                    following[end] = candidate
        best = following
    sizes = best[num_layers][1]
    return Split(sizes, tuple(stage_costs(sizes, layer_costs, head_cost)))


def _least_slowest(pp_size: int, cuts: list[int], prefix: list[float], head_cost: float, num_layers: int) -> float | None:
    best = {0: 0.0}
    for stage in range(pp_size):
        ends = [num_layers] if stage == pp_size - 1 else cuts
        following: dict[int, float] = {}
        for start, slowest in best.items():
            for end in ends:
                if end <= start:
                    continue
                cost = max(slowest, prefix[end] - prefix[start] + (head_cost if end == num_layers else 0.0))
                if cost < following.get(end, float("inf")):
                    following[end] = cost
        best = following
    return best.get(num_layers)
