"""Which layers a pipeline stage holds, which cuts are legal for index sharing, and which of them are balanced. Pure arithmetic.

Layers are 0-based. megatron-core's own rules are followed (a test compares every case with its functions), so that a laptop
without megatron-core knows the same answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from slime.config.resolve_model import unrolled_layout
from slime.model.hf_config import HfConfig
from slime.model.splits import legal_splits


@dataclass(frozen=True)
class Chunk:
    """One model chunk: a pipeline stage, or one of its parts under virtual pipelining."""

    pp_rank: int
    vp_stage: int
    layers: range


@dataclass(frozen=True)
class Cut:
    """How --decoder-first/last-..., --pipeline-model-parallel-layout and the virtual size cut the layers."""

    num_layers: int
    pp_size: int
    vpp_size: int = 1
    first: int | None = None
    last: int | None = None
    layout: str | None = None


def cut_layers(cut: Cut) -> list[Chunk]:
    """All chunks in the order in which a token passes them. Raises ValueError, with the numbers, when layers do not divide."""
    if cut.layout is not None:
        return _from_layout(cut)
    sizes = _chunk_sizes(cut)
    chunks, start = [], 0
    for vp_stage in range(cut.vpp_size):
        for pp_rank in range(cut.pp_size):
            chunks.append(Chunk(pp_rank, vp_stage, range(start, start + sizes[pp_rank])))
            start += sizes[pp_rank]
    assert start == cut.num_layers, f"{start} of {cut.num_layers} layers were placed"
    return chunks


def _chunk_sizes(cut: Cut) -> list[int]:
    """Layers of one chunk of each pipeline rank."""
    named = [value for value in (cut.first, cut.last) if value is not None]
    if cut.pp_size == 1:
        return [cut.num_layers]
    rest, stages = cut.num_layers - sum(named), cut.pp_size - len(named)
    if rest < 0 or (stages and rest % stages) or (not stages and rest):
        raise ValueError(
            f"{cut.num_layers} layers minus first/last {named} leave {rest} for {stages} stages, which does not divide"
        )
    middle = rest // stages if stages else 0
    per_stage = [middle] * cut.pp_size
    if cut.first is not None:
        per_stage[0] = cut.first
    if cut.last is not None:
        per_stage[-1] = cut.last
    if any(size % cut.vpp_size for size in per_stage):
        raise ValueError(f"stages of {per_stage} layers do not divide into {cut.vpp_size} virtual chunks each")
    return [size // cut.vpp_size for size in per_stage]


def _from_layout(cut: Cut) -> list[Chunk]:
    text = unrolled_layout(cut.layout.replace(",", "").replace(" ", ""))
    if unknown := sorted(set(text) - set("EtLm|")):
        raise ValueError(
            f"--pipeline-model-parallel-layout has {''.join(unknown)!r}; "
            "it is made of E (embedding), t (layer), L (loss), m, | and *"
        )
    parts = text.split("|")
    if len(parts) % cut.pp_size:
        raise ValueError(
            f"--pipeline-model-parallel-layout has {len(parts)} stages, "
            f"no multiple of --pipeline-model-parallel-size {cut.pp_size}"
        )
    if text.count("t") != cut.num_layers:
        raise ValueError(
            f"--pipeline-model-parallel-layout places {text.count('t')} layers (t), the model has {cut.num_layers}"
        )
    if not text.startswith("E") or not text.endswith("L") or text.count("E") != 1 or text.count("L") != 1:
        raise ValueError(
            "--pipeline-model-parallel-layout must begin with the only E (embedding) and end with the only L (loss)"
        )
    chunks, start = [], 0
    for number, part in enumerate(parts):
        size = part.count("t")
        chunks.append(Chunk(number % cut.pp_size, number // cut.pp_size, range(start, start + size)))
        start += size
    return chunks


def wrong_starts(hf: HfConfig, chunks: Iterable[Chunk]) -> list[Chunk]:
    """Chunks that begin on a layer which reuses the indices of a layer on another chunk."""
    if not hf.has_indexer:
        return []
    return [chunk for chunk in chunks if len(chunk.layers) and not hf.runs_indexer(chunk.layers.start)]


@dataclass(frozen=True)
class Split:
    """A legal cut: layers per stage, and how even it is (mean stage cost / greatest stage cost)."""

    sizes: tuple[int, ...]
    balance: float

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


def legal_first_last(
    hf: HfConfig, pp_size: int, layer_costs: Sequence[float], head_cost: float, *, any_start: bool = False
) -> list[Split]:
    """Every (first, last) pair for which stages divide and start on computing layers, best balanced first.

    any_start: indices travel between stages (--dsa-send-indices), so that every layer may begin one.
    """
    found = [
        Split(sizes, balance(stage_costs(sizes, layer_costs, head_cost)))
        for sizes in legal_splits(hf, pp_size, any_start=any_start)
    ]
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
    return Split(sizes, balance(stage_costs(sizes, layer_costs, head_cost)))


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
