"""What was built, said once at start: rank grid, layers and parameters per stage, tokens per rank, bytes per rank.

Every rank counts what it holds (slime.training.share); the driver, which imports no torch for it, adds up. No number here is
planned: those of a rehearsal are, and the two can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slime.config import Config


@dataclass(frozen=True)
class RankShare:
    """One rank's part of the model and of its training state; counts of numbers, and bytes."""

    rank: int
    stage: int
    grid: str
    """The sizes of all axes; equal on every rank."""
    chunks: tuple[tuple[int, ...], ...]
    """1-based layers of each of the rank's model chunks."""
    has_embedding: bool
    has_head: bool
    parameters: int
    expert_parameters: int
    trained: int
    owned: int
    """Parameters counted here alone: a shard of its own, or the first of the copies. Their sum over ranks is the model."""
    owned_experts: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    """Adam's state and fp32 main parameters, as they will be from the first step on."""
    optimizer_on_host: bool


def start_page(shares: Sequence[RankShare], config: Config) -> list[str]:
    """The page, line by line."""
    first, owned = shares[0], sum(share.owned for share in shares)
    experts = sum(share.owned_experts for share in shares)
    lines = [
        f"trainer: {len(shares)} ranks = {first.grid}",
        f"model: {owned:,} parameters, {experts:,} of them routed experts",
        *_tokens(config),
        f"{'stage':>5}  {'layers':<34}{'parameters':>17}{'on a rank':>15}{'trained':>15}"
        f"{'weights':>12}{'gradients':>12}{'optimizer':>12}",
    ]
    for stage in sorted({share.stage for share in shares}):
        mine = [share for share in shares if share.stage == stage]
        lines.append(
            f"{stage:>5}  {_layers(mine[0]):<34}{sum(share.owned for share in mine):>17,}"
            f"{_span(mine, 'parameters', '{:,}'.format):>15}{_span(mine, 'trained', '{:,}'.format):>15}"
            f"{_span(mine, 'weight_bytes', _bytes):>12}{_span(mine, 'gradient_bytes', _bytes):>12}"
            f"{_span(mine, 'optimizer_bytes', _bytes):>12}"
        )
    if config.algorithm.advantage_estimator == "ppo":
        lines.append("critic: once more as much on every rank; its output is one value a token")
    if first.optimizer_on_host:
        lines.append("       the optimizer's state is in main memory (--optimizer-cpu-offload)")
    return lines


def _tokens(config: Config) -> list[str]:
    parallel, batch = config.parallel, config.batch
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    unit = tp * batch.data_pad_size_multiplier
    padded = f"padded to multiples of {unit:,}"
    if not batch.use_dynamic_batch_size or not batch.max_tokens_per_gpu:
        return [f"micro-batch: {batch.micro_batch_size} samples, cut into {cp} context-parallel shares, {padded} rows"]
    rows = -(-batch.max_tokens_per_gpu // unit) * unit
    slices = f", {rows // tp:,} in each tensor-parallel slice" if tp > 1 else ""
    return [
        f"micro-batch: up to {batch.max_tokens_per_gpu * cp:,} tokens, {rows:,} rows on each rank{slices}; {padded}; "
        "a longer sample is alone in its own"
    ]


def _layers(share: RankShare) -> str:
    runs = " and ".join(_run(chunk) for chunk in share.chunks)
    ends = [word for word, there in (("embedding", share.has_embedding), ("output", share.has_head)) if there]
    return ", ".join([runs, *ends])


def _run(layers: tuple[int, ...]) -> str:
    if not layers:
        return "none"
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])


def _span(shares: Sequence[RankShare], name: str, text: Callable[[int], str]) -> str:
    values = [getattr(share, name) for share in shares]
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low}-{high}"


def _bytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.3f} MB"
