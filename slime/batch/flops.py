"""Work of one sample, for balancing: floating-point operations of a forward pass, in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def forward_flops(
    lengths: Sequence[int] | np.ndarray, model: Mapping[str, object], *, vocab_size: int, attended: int | None = None
) -> np.ndarray:
    """float64 [n]: 2 x multiply-adds of one forward pass over each sample alone; a training step costs 3 times that.

    model: values under megatron-core's TransformerConfig names (config.model.megatron). attended: keys that a query attends to
    at most (index_topk of sparse attention; None is all before it). Counted: projections, causal attention, feed-forward (the
    experts a token visits, and the shared one), output head. Not counted: the indexer's scores, norms, softmax.
    """
    tokens = np.asarray(lengths, dtype=np.float64)
    layers, hidden = int(model["num_layers"]), int(model["hidden_size"])
    projections, per_key = _attention(model, hidden)
    linear = layers * projections + _feed_forward(model, layers, hidden) + hidden * vocab_size
    return 2.0 * (tokens * linear + layers * per_key * _keys(tokens, attended))


def _attention(model: Mapping[str, object], hidden: int) -> tuple[int, int]:
    """(multiply-adds of the projections per token, of scores and values per attended key), of one layer."""
    heads = int(model["num_attention_heads"])
    if model.get("multi_latent_attention") or model.get("kv_lora_rank"):
        nope, rope, value = int(model["qk_head_dim"]), int(model["qk_pos_emb_head_dim"]), int(model["v_head_dim"])
        latent, query = int(model["kv_lora_rank"]), model.get("q_lora_rank")
        if query:
            projections = hidden * int(query) + int(query) * heads * (nope + rope)
        else:
            projections = hidden * heads * (nope + rope)
        projections += hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden
        return projections, heads * (nope + rope + value)
    width = int(model.get("kv_channels") or hidden // heads)
    groups = int(model.get("num_query_groups") or heads)
    return hidden * width * (2 * heads + 2 * groups), 2 * heads * width


def _feed_forward(model: Mapping[str, object], layers: int, hidden: int) -> int:
    """Multiply-adds per token of all feed-forward layers (gated: three matrices)."""
    dense = 3 * hidden * int(model["ffn_hidden_size"])
    if not model.get("num_moe_experts"):
        return layers * dense
    frequency = model.get("moe_layer_freq", 1)
    if isinstance(frequency, int):
        num_sparse = sum(layer % frequency == 0 for layer in range(layers))
    else:
        num_sparse = sum(frequency)
    visited = int(model.get("moe_router_topk", 2)) * int(model["moe_ffn_hidden_size"])
    visited += int(model.get("moe_shared_expert_intermediate_size") or 0)
    return (layers - num_sparse) * dense + num_sparse * 3 * hidden * visited


def _keys(tokens: np.ndarray, attended: int | None) -> np.ndarray:
    """Sum over the queries of a sample of the keys each attends to: 1 + 2 + ... + n, each term at most `attended`."""
    full = tokens * (tokens + 1) / 2
    if attended is None:
        return full
    return np.where(tokens <= attended, full, attended * (attended + 1) / 2 + (tokens - attended) * attended)
