"""Floating-point operations of one token: linear layers, the attention core over the keys it reads, the indexer.

A multiply-add counts as two. `forward = 2 x active parameters + core + indexer`. Backward doubles the linear part, costs the
sparse core its five products (S again, dP, dQ, dK, dV), and the indexer nothing, because it has no gradient. With full
recomputation every layer's forward runs twice. The output layer's always does, because backward makes the logits again
(slime.ops.vocab_logprob). The context of a token is averaged over a causal sequence of `length`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from slime.model.hf_config import HfConfig
from slime.model.names import NameTable
from slime.rehearse.model.kinds import kinds


@dataclass(frozen=True)
class LayerWork:
    """Forward and backward FLOPs per token of one layer's parts."""

    linear: float
    core_forward: float
    core_backward: float
    indexer: float

    @property
    def forward(self) -> float:
        return self.linear + self.core_forward + self.indexer

    def training(self, *, recompute: bool) -> float:
        once = 3 * self.linear + self.core_forward + self.core_backward + self.indexer
        return once + (self.forward if recompute else 0.0)


@dataclass(frozen=True)
class ModelWork:
    layers: tuple[LayerWork, ...]
    head: float
    """Forward of the output layer."""
    draft: LayerWork | None = None
    """The multi-token-prediction layer where it is trained; it runs in training only."""

    @property
    def forward(self) -> float:
        return sum(layer.forward for layer in self.layers) + self.head

    def training(self, *, recompute: bool) -> float:
        return sum(layer.training(recompute=recompute) for layer in self.layers) + self.tail(recompute=recompute)

    def tail(self, *, recompute: bool) -> float:
        """Training FLOPs behind the last layer: the output layer forward, again in backward, and its two gradients; of the
        draft's pass its weight gets none."""
        return 4 * self.head + (self.draft.training(recompute=recompute) + 3 * self.head if self.draft else 0.0)


def active_parameters(table: NameTable, hf: HfConfig) -> int:
    """Weights that one token multiplies in the main model: its routed experts only, no embedding, no norms."""
    per_layer, head = _active(table, hf)
    return sum(per_layer[: hf.num_layers]) + head


def model_work(table: NameTable, hf: HfConfig, length: int, *, mtp: bool = False) -> ModelWork:
    """Work per token of a causal sequence of `length` tokens. mtp: the multi-token-prediction layer is trained."""
    per_layer, head = _active(table, hf)
    layers = []
    for layer, parameters in enumerate(per_layer):
        forward, backward = core(hf, length)
        layers.append(LayerWork(2.0 * parameters, forward, backward, indexer(hf, layer, length)))
    return ModelWork(tuple(layers[: hf.num_layers]), 2.0 * head, layers[hf.num_layers] if mtp else None)


def core(hf: HfConfig, length: int) -> tuple[float, float]:
    """(forward, backward) of attention between the projections, per token and layer."""
    heads = hf["num_attention_heads"]
    if hf.has_indexer:
        # Absorbed MLA: every head reads one shared latent, scores over latent + rope, values over the latent.
        scores, values = hf["kv_lora_rank"] + hf["qk_rope_head_dim"], hf["kv_lora_rank"]
        keys = mean_selected(hf["index_topk"], length)
    else:
        keys = (length + 1) / 2
        if hf.is_mla:
            scores, values = hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"], hf["v_head_dim"]
        else:
            scores = values = hf.head_dim
    unit = 2.0 * heads * keys
    return unit * (scores + values), unit * (scores + values + scores + scores + values)


def mean_selected(topk: int, length: int) -> float:
    """Mean over a causal sequence of min(keys visible, topk)."""
    if length <= topk:
        return (length + 1) / 2
    return topk * (1 - (topk - 1) / (2 * length))


def indexer(hf: HfConfig, layer: int, length: int) -> float:
    """Scoring all earlier tokens, on computing layers."""
    if not hf.runs_indexer(layer):
        return 0.0
    return 2.0 * hf["index_n_heads"] * hf["index_head_dim"] * length / 2


def _active(table: NameTable, hf: HfConfig) -> tuple[tuple[int, ...], int]:
    """(matrix weights per layer that one token meets, those of the output layer). The MTP layer comes behind the last one."""
    tied = hf["vocab_size"] * hf["hidden_size"]
    return _met(table, hf.num_layers, hf.get("num_experts_per_tok", 0), hf.num_experts, tied)


@lru_cache(maxsize=8)
def _met(table: NameTable, num_layers: int, topk: int, num_experts: int, tied: int) -> tuple[tuple[int, ...], int]:
    always, routed, head = [0] * (num_layers + 1), [0] * (num_layers + 1), 0
    for entry, count in kinds(table):
        if len(entry.shape) != 2 or entry.name.startswith("embedding."):
            continue
        numel = entry.shape[0] * entry.shape[1] * count
        layer = num_layers if entry.is_mtp else entry.layer
        if layer is None:
            head = numel
        elif entry.expert is None:
            always[layer] += numel
        else:
            routed[layer] += numel
    if table.aliases:
        head = tied
    met = (kept + (some * topk // num_experts if some else 0) for kept, some in zip(always, routed, strict=True))
    return tuple(met), head
