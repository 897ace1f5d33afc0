"""Which layers a pipeline stage holds, and the layout string that says so. Pure arithmetic.

Layers are 0-based. megatron-core's own rules are followed (a test compares every case with its functions), so that a laptop
without megatron-core knows the same answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from slime.config.hf_config import HfConfig


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


def layout_string(sizes: Sequence[int], *, mtp: int = 0) -> str:
    """[10, 8] -> Et*10|t*8L: embedding before the first layer, `mtp` prediction layers and the loss after the last."""
    return "E" + "|".join(f"t*{size}" for size in sizes) + "m" * mtp + "L"


MOST_REPEATED = 1000
"""Times that a layout string repeats a part; no model has as many layers."""


def unrolled_layout(text: str) -> str:
    """The layout string with its multiplications written out, as megatron-core reads them. Raises ValueError."""
    if most := max((int(count) for count in re.findall(r"\*(\d{1,20})", text)), default=0):
        if most > MOST_REPEATED:
            raise ValueError(f"--pipeline-model-parallel-layout repeats {most} times; {MOST_REPEATED} are the most")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(pattern, lambda match: match.group(1) * int(match.group(2)), text)
    return text


def computing_layers(hf: HfConfig) -> list[int]:
    """Layers that run an indexer of their own, 1-based as logs and flags count them."""
    return [layer + 1 for layer in range(hf.num_layers) if hf.runs_indexer(layer)]


def stages_can_start(hf: HfConfig, sizes: Sequence[int]) -> bool:
    """Whether no stage begins on a layer that reuses the indices of an earlier stage. sizes: layers per stage."""
    return not hf.has_indexer or all(hf.runs_indexer(layer) for layer in accumulate(sizes[:-1]))


def legal_splits(hf: HfConfig, num_stages: int, *, any_start: bool = False) -> list[tuple[int, ...]]:
    """Layers per stage for every --decoder-first/last-pipeline-num-layers whose middle stages are equal and start legally.

    any_start: indices travel between stages (--dsa-send-indices), so that every layer may begin one.
    """
    found = []
    for first in range(1, hf.num_layers) if num_stages > 1 else ():
        for last in range(1, hf.num_layers - first + 1):
            rest, middle = hf.num_layers - first - last, num_stages - 2
            if (rest % middle or not rest) if middle else rest:
                continue
            sizes = (first, *[rest // middle] * middle, last) if middle else (first, last)
            if any_start or stages_can_start(hf, sizes):
                found.append(sizes)
    return found
