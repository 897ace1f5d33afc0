"""Choices of one run, taken again by another: keys that attention selects, experts that routers pick.

Both are top-k choices, so rounding flips near-ties, and one flip changes everything after it. A comparison across dtypes or
kernels replays them and then measures arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from megatron.core.transformer.moe.router import TopKRouter

from slime.model.local import unwrap
from slime.parallel import Ranks
from slime_plugins.models.glm5.attention import SparseLatentAttention

Key = tuple[int, int]
"""(micro-batch, 1-based layer)."""


@dataclass
class Choices:
    """By stream row of a whole micro-batch: key rows int32 [T, topk], experts int64 [T, k] (recorded by a run on one rank)."""

    keys: dict[Key, torch.Tensor] = field(default_factory=dict)
    experts: dict[Key, torch.Tensor] = field(default_factory=dict)
    replays: bool = False
    _number: int = 0
    _rows: torch.Tensor | None = None

    def attach(self, chunks: Sequence[torch.nn.Module], ranks: Ranks) -> None:
        for chunk in chunks:
            for module in unwrap(chunk).modules():
                if isinstance(module, TopKRouter):
                    module.router_replay = _Experts(self, module, ranks)
                elif isinstance(module, SparseLatentAttention) and module.runs_indexer and self.replays:
                    module.run_indexer = self._replayed(module, module.run_indexer, ranks)

    def begin(self, number: int, rows: torch.Tensor) -> None:
        """The next forward pass is of this micro-batch, whose rows this context-parallel rank holds (-1: padding)."""
        self._number, self._rows = number, rows.cpu()

    def rows(self, count: int, ranks: Ranks) -> torch.Tensor:
        """Of a tensor with so many rows: all of this rank's, or its tensor-parallel slice."""
        return self._rows if count == len(self._rows) else self._rows.chunk(ranks.tp_size)[ranks.tp_rank]

    def _replayed(self, module: SparseLatentAttention, own: Callable, ranks: Ranks) -> Callable:
        def run_indexer(*args: object, **kwargs: object) -> torch.Tensor:
            picked = own(*args, **kwargs)
            rows = self.rows(len(picked), ranks)
            real = rows >= 0
            picked[real.to(picked.device)] = self.keys[self._number, module.layer_number][rows[real]].to(picked.device)
            return picked

        return run_indexer


@dataclass(frozen=True)
class _Experts:
    """What megatron-core's router asks in place of its top-k."""

    choices: Choices
    router: TopKRouter
    ranks: Ranks

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: int | None, group_topk: int | None, default_compute_topk: Callable
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values, picked = default_compute_topk(scores, topk, num_groups, group_topk)
        key, rows = (self.choices._number, self.router.layer_number), self.choices.rows(len(scores), self.ranks)
        if not self.choices.replays:
            self.choices.experts[key] = picked.cpu()
            return values, picked
        real = rows >= 0
        picked[real.to(picked.device)] = self.choices.experts[key][rows[real]].to(picked.device)
        return scores.gather(1, picked), picked
