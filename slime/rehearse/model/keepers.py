"""Which ranks of each engine keep which part of a tensor, in words and in numbers of parts."""

from __future__ import annotations

from collections.abc import Sequence

from slime.engine.spec import EngineSpec
from slime.model.names import Entry, HfTensor
from slime.model.placement import ranges
from slime.weights.serving import drafts_with_mtp, expert_ranks


class Keepers:
    """Which ranks of each engine keep a part of a tensor.

    By SGLang's rules: routed experts lie on consecutive expert-parallel ranks; attention and embedding are cut over the ranks
    of an attention replica, an MLP over all ranks unless moe_dense_tp_size (dense) or an all-to-all backend (shared experts)
    keeps it whole, the output layer as the embedding with enable_dp_lm_head and over all ranks without.
    """

    def __init__(self, engines: Sequence[EngineSpec], num_experts: int):
        self._engines, self._num_experts = engines, num_experts
        self._said: dict[tuple, str] = {}

    def text(self, entry: Entry, tensor: HfTensor) -> str:
        """`0-3:all@0-63` (engines 0 to 3, each rank the whole tensor), `0:1/4@0-63;1:all@0-7` (a quarter on each)."""
        engines = [engine for engine in self._engines if not entry.is_mtp or drafts_with_mtp(engine.settings)]
        cuts = tuple(self.cut(entry, tensor, engine) for engine in engines)
        if (entry.expert, entry.is_mtp, cuts) not in self._said:
            said: dict[str, list[int]] = {}
            for engine, cut in zip(engines, cuts, strict=True):
                words = ("all" if cut == 1 else f"1/{cut}") + f"@{ranges(self._ranks(entry, engine))}"
                words += " of a pipeline stage" if engine.pp_size > 1 else ""
                said.setdefault(words, []).append(engine.engine_id)
            self._said[entry.expert, entry.is_mtp, cuts] = ";".join(f"{ranges(ids)}:{words}" for words, ids in said.items())
        return self._said[entry.expert, entry.is_mtp, cuts]

    def _ranks(self, entry: Entry, engine: EngineSpec) -> range:
        if entry.expert is None:
            return range(engine.tp_size)
        return expert_ranks(entry.expert, num_experts=self._num_experts, tp=engine.tp_size, ep=engine.ep_size)

    @staticmethod
    def cut(entry: Entry, tensor: HfTensor, engine: EngineSpec) -> int:
        """Into how many parts the engine cuts it."""
        attention, settings = engine.tp_size // engine.dp_size, engine.settings
        if entry.expert is not None:
            return engine.tp_size // engine.ep_size
        if entry.split == "none":
            return 1
        if ".mlp.shared_experts." in entry.name:
            return engine.tp_size if str(settings.get("moe_a2a_backend", "none")) == "none" else 1
        if ".mlp." in entry.name:
            return 1 if str(settings.get("moe_dense_tp_size")) == "1" else engine.tp_size
        if entry.name.startswith("output_layer."):
            return attention if str(settings.get("enable_dp_lm_head", "")).lower() in ("true", "1") else engine.tp_size
        if entry.groups and tensor is not entry.hf[0]:
            return min(attention, entry.groups[0])  # with more ranks than key/value heads, some have the same one
        return attention
