"""The experts that an earlier pass chose, taken again in the steps: as weights move routers choose others, and the ratio of new
and old probability would be one of two different functions.

The pass of the old log-probs records (--use-routing-replay, R2), every step takes what was recorded. Each rank keeps what its
own routers saw, so no layout has a part in it: rows of a tensor- or context-parallel rank, layers of a stage. Or the engines
have said what they chose (--use-rollout-routing-replay, R3), and the old log-probs are of that choice, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from slime.batch.layout import SequenceLayout
from slime.compat.megatron import prepare
from slime.model.local import unwrap
from slime.parallel import Ranks

prepare()

from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402


class RoutingReplay:
    """All routers of this rank's decoder layers. Without a `with` block routers choose for themselves."""

    def __init__(self, chunks: Sequence[Module]) -> None:
        routers = [m for chunk in chunks for m in unwrap(chunk).decoder.modules() if isinstance(m, TopKRouter)]
        self._layers = [router.layer_number for router in routers]
        """1-based, of the whole model."""
        self._sizes = {(r.config.num_layers, r.topk, r.config.num_moe_experts) for r in routers}
        """(layers, experts of a token, experts) of the model, where this rank has a router."""
        self.of_routers = [RouterChoices() for _ in routers]
        for router, choices in zip(routers, self.of_routers, strict=True):
            router.router_replay = choices

    @property
    def nbytes(self) -> int:
        """Of what this rank keeps in main memory."""
        return sum(kept.nbytes for choices in self.of_routers for kept in choices.kept)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """A pass without gradient inside the block is remembered, and what was remembered before is not."""
        for choices in self.of_routers:
            choices.begin("record")
            choices.kept.clear()
        try:
            yield
        finally:
            self._rest()

    def fill(self, micro_batches: Iterable[Sequence[np.ndarray]], layouts: Iterable[SequenceLayout], ranks: Ranks) -> None:
        """What the engines chose, in the place of a recording. micro_batches: of each the samples' experts
        (RolloutBatch.routed_experts) in stream order. Raises ValueError for those of another model, and for a token with one
        expert twice."""
        for choices in self.of_routers:
            choices.kept.clear()
        for samples, layout in zip(micro_batches, layouts, strict=True):
            for size in self._sizes:
                _check_model(samples, *size)
            for layer, choices in zip(self._layers, self.of_routers, strict=True):
                chosen = [one[:, layer - 1] for one in samples]
                _check_distinct(chosen, layer)
                choices.kept.append(own_rows(chosen, layout, tp_rank=ranks.tp_rank, tp_size=ranks.tp_size))

    @contextmanager
    def replaying(self, first: int) -> Iterator[None]:
        """A step inside the block takes the recorded choices. first: how many of the recorded micro-batches come before its."""
        for choices in self.of_routers:
            choices.begin("replay", first)
        try:
            yield
        finally:
            self._rest()

    def _rest(self) -> None:
        for choices in self.of_routers:
            choices.begin("rest")


class RouterChoices:
    """What megatron-core's router asks in place of its top-k."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        """Per micro-batch int16 [rows, topk] on the host."""
        self.begin("rest")

    def begin(self, mode: str, first: int = 0) -> None:
        # A layer that is recomputed runs first without gradient and, in the order of the same micro-batches, once more with it;
        # any other runs once. Each of both kinds of passes is counted by itself.
        self._mode, self._next = mode, {False: first, True: first}

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, own_topk: Callable
    ) -> tuple[Tensor, Tensor]:
        """(scores of the chosen, chosen), each [rows, topk]."""
        if self._mode == "replay":
            kind = torch.is_grad_enabled()
            chosen = self.kept[self._next[kind]].to(scores.device).long()
            self._next[kind] += 1
            if bool((chosen < 0).any()):  # padding, and tokens that no engine has seen
                own = own_topk(scores, topk, num_groups, group_topk)[1]
                chosen = torch.where(chosen < 0, own, chosen.expand_as(own))
            return scores.gather(1, chosen), chosen
        values, chosen = own_topk(scores, topk, num_groups, group_topk)
        if self._mode == "record":
            self.kept.append(chosen.to("cpu", torch.int16))
        return values, chosen


def own_rows(chosen: Sequence[np.ndarray], layout: SequenceLayout, *, tp_rank: int, tp_size: int) -> Tensor:
    """One layer's experts of a micro-batch's samples, each whole numbers [rows, topk] of its first tokens, as one rank's rows
    int16 [rows, topk].

    Those are its context-parallel share, and its tensor-parallel slice of that; -1 for tokens that the engine did not see, a
    sample's last one among them, and for padding.
    """
    topk = chosen[0].shape[1] if chosen else 1
    stream = torch.full((layout.length, topk), -1, dtype=torch.int16)
    for start, one in zip(layout.starts, chosen, strict=True):
        stream[start : start + len(one)] = torch.from_numpy(one.astype(np.int16))
    return layout.take(stream, -1).chunk(tp_size)[tp_rank].clone()


def _check_model(samples: Sequence[np.ndarray], layers: int, topk: int, experts: int) -> None:
    for one in samples:
        most = int(one.max()) if one.size else 0
        if one.shape[1:] != (layers, topk) or most >= experts:
            raise ValueError(
                f"engines named experts up to {most}, {one.shape[2]} a token in {one.shape[1]} layers; this model has "
                f"{experts} experts, {topk} a token in {layers} layers: they serve another model than the trainer's"
            )


def _check_distinct(chosen: Sequence[np.ndarray], layer: int) -> None:
    ordered = np.sort(np.concatenate(chosen), axis=-1) if chosen else np.zeros((0, 1))
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise ValueError(
            f"layer {layer}: an engine names one expert twice for a token, so it did not record this layer; is it another "
            "model, or does a stage of the engine's pipeline not report?"
        )
