"""An engine as a sync of weights sees it: its GPUs, and which of them keep which tensors. By SGLang's rules, without SGLang."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from slime.model.names import Entry

CUTS_OTHERWISE = re.compile(
    r"(^|_)(dp|cp|dcp|dwdp|a2a|deepep|elastic)(_|$)|attn_tp|dense_tp|data_parallel|context_parallel|max_ep_size|presharded"
)
"""In the name of an option: with it not every matrix is cut over all tensor-parallel ranks, and which are depends on the model
and the version."""
HEAD_IS_CUT = re.compile(r"^(enable_dp_attention|(attn_)?dp_size|moe_dense_tp_size|moe_a2a_backend|deepep_\w+)$")
"""Of these options, those beside which the output layer is cut over all tensor-parallel ranks in every model and version,
unless enable_dp_lm_head says otherwise (`use_attn_tp_group` of SGLang's ParallelLMHead)."""


class ServingSpec(Protocol):
    """The part of an engine's spec that decides what its ranks keep."""

    @property
    def engine_id(self) -> int: ...
    @property
    def gpu_offset(self) -> int: ...
    @property
    def tp_size(self) -> int: ...
    @property
    def pp_size(self) -> int: ...
    @property
    def ep_size(self) -> int: ...
    @property
    def settings(self) -> Mapping[str, object]: ...


@dataclass(frozen=True)
class Receiver:
    """One engine that takes the trainer's weights."""

    engine: int
    """Its engine_id."""
    gpus: tuple[int, ...]
    """Global GPU of each rank, pipeline stage by pipeline stage: rank = stage x tp + tp_rank."""
    tp: int
    pp: int = 1
    ep: int = 1
    drafts: bool = False
    """Its draft model is the multi-token-prediction layer, which it takes too."""
    fixed_experts: bool = True
    """An expert stays on its ranks; with redundant or moving experts each rank takes all of them."""
    cuts: bool = False
    """Its tensor-parallel ranks load equal shares of the matrices that tensor parallelism cuts (`slime.weights.shares`); else
    each of them is given whole ones."""
    cuts_head: bool = False
    """They load equal shares of the output layer, whatever they do with the rest."""

    @staticmethod
    def of(spec: ServingSpec, *, first_gpu: int) -> Receiver:
        """first_gpu: global GPU of the first rollout slot, 0 where engines share the trainer's GPUs."""
        start = first_gpu + spec.gpu_offset
        otherwise = [name for name in spec.settings if CUTS_OTHERWISE.search(name) and _is_on(spec.settings, name)]
        return Receiver(
            spec.engine_id,
            tuple(range(start, start + spec.tp_size * spec.pp_size)),
            tp=spec.tp_size,
            pp=spec.pp_size,
            ep=spec.ep_size,
            drafts=drafts_with_mtp(spec.settings),
            fixed_experts=not _moves_experts(spec.settings),
            cuts=spec.tp_size > 1 and not otherwise,
            cuts_head=spec.tp_size > 1 and all(map(HEAD_IS_CUT.match, otherwise)),
        )

    def keepers(self, entry: Entry, *, num_experts: int, num_layers: int) -> tuple[int, ...]:
        """GPUs whose ranks load the entry's tensors, or a slice of them that the loader cuts itself."""
        if entry.is_mtp and not self.drafts:
            return ()
        ranks = range(self.tp)
        if entry.expert is not None and self.fixed_experts:
            ranks = expert_ranks(entry.expert, num_experts=num_experts, tp=self.tp, ep=self.ep)
        stages = self._stages(entry, num_layers)
        return tuple(self.gpus[stage * self.tp + rank] for stage in stages for rank in ranks)

    def _stages(self, entry: Entry, num_layers: int) -> tuple[int, ...]:
        """Pipeline stages that load it. Embedding and output layer go to both ends, for tied weights are on both."""
        if self.pp == 1:
            return (0,)
        if entry.layer is not None:
            return (stage_of_layer(entry.layer, num_layers=num_layers, pp=self.pp),)
        ends = entry.name.startswith(("embedding.", "output_layer."))
        return (0, self.pp - 1) if ends else (self.pp - 1,)


def expert_ranks(expert: int, *, num_experts: int, tp: int, ep: int) -> range:
    """Tensor-parallel ranks that keep a routed expert: consecutive blocks of experts lie on consecutive ranks."""
    share = tp // ep
    first = expert // (num_experts // ep) * share
    return range(first, first + share)


def stage_of_layer(layer: int, *, num_layers: int, pp: int) -> int:
    """SGLang's own cut (get_pp_indices): equal stages, with one layer more in each of the last where they do not divide."""
    each, more = divmod(num_layers, pp)
    small = (pp - more) * each
    return layer // each if layer < small else pp - more + (layer - small) // (each + 1)


def drafts_with_mtp(settings: Mapping[str, object]) -> bool:
    """Whether an engine's draft model is the trained model's own multi-token-prediction layer."""
    return bool(settings.get("speculative_algorithm"))


def _moves_experts(settings: Mapping[str, object]) -> bool:
    return _is_on(settings, "enable_eplb") or _is_on(settings, "ep_num_redundant_experts")


def _is_on(settings: Mapping[str, object], name: str) -> bool:
    return str(settings.get(name, "")).lower() not in ("", "0", "none", "false")
